// 256 neighbouring elements as a 16 x 16 matrix, turned: what lies side by side in a group comes to lie in one lane.
#pragma once

#include "common.h"

namespace fp4 {

#if defined(FP4_AVX512)

inline __m512 load_16(const float* in) { return _mm512_loadu_ps(in); }
inline __m512 load_16(const uint16_t* in) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Lane i of vector j becomes lane j of vector i.
inline void transpose(__m512 (&a)[16]) {
  __m512 b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xDD);
  }
}

// out[element][group], from float32 or bf16.
template <class Source>
void transpose(const Source* in, float (&out)[16][16]) {
  __m512 a[16];
  for (int i = 0; i < 16; ++i) a[i] = load_16(in + 16 * i);
  transpose(a);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out[i], a[i]);
}

#else

inline float load(float value) { return value; }
inline float load(uint16_t value) { return from_bf16(value); }

template <class Source>
void transpose(const Source* in, float (&out)[16][16]) {
  for (int e = 0; e < 16; ++e) {
    for (int g = 0; g < 16; ++g) out[e][g] = load(in[16 * g + e]);
  }
}

#endif

// Elements [at, at + 256) of a row of k; those past its end are zero.
template <class Source>
void transpose_row(const Source* row, int64_t at, int64_t k, float (&out)[16][16]) {
  if (at + 256 <= k) return transpose(row + at, out);
  Source padded[256] = {};
  if (at < k) std::memcpy(padded, row + at, (k - at) * sizeof(Source));
  transpose(padded, out);
}

}  // namespace fp4
