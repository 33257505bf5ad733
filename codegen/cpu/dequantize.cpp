// Codes and block scales to values, rows in parallel.
#include "common.h"

namespace fp4 {
namespace {

#if defined(FP4_AVX512)

__m512 values_of_16(const uint8_t* codes, __m512 table) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  // Each 64-bit lane holds one byte; its high nibble goes to the low end of the upper half. The permute reads 4 bits of a lane.
  return _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), table);
}

void decode_16(const uint8_t* codes, float scale, float* out, __m512 table) {
  _mm512_storeu_ps(out, _mm512_mul_ps(values_of_16(codes, table), _mm512_set1_ps(scale)));
}

void decode_16(const uint8_t* codes, float scale, uint16_t* out, __m512 table) {
  const __m512 values = _mm512_mul_ps(values_of_16(codes, table), _mm512_set1_ps(scale));
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(values), 16);  // exact: the low half is zero, or NaN's payload
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(high));
}

using Table = __m512;
Table table_of_values() { return _mm512_loadu_ps(E2M1); }

#else

struct Table {};
Table table_of_values() { return {}; }

void decode_16(const uint8_t* codes, float scale, float* out, Table) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = E2M1[codes[i] & 0xF] * scale;
    out[2 * i + 1] = E2M1[codes[i] >> 4] * scale;
  }
}

void decode_16(const uint8_t* codes, float scale, uint16_t* out, Table table) {
  float values[16];
  decode_16(codes, scale, values, table);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint16_t>(bits_of(values[i]) >> 16);
}

#endif

template <Kind kind, class Out>
void decode_row(const uint8_t* codes, const uint8_t* scales, int64_t k, Out* out, const Table& table) {
  int64_t at = 0;
  for (; at + 16 <= k; at += 16) decode_16(codes + at / 2, scale_value<kind>(scales[at / block_of(kind)]), out + at, table);
  if (at == k) return;
  Out tail[16];  // the codes are padded to whole blocks, the output is not
  decode_16(codes + at / 2, scale_value<kind>(scales[at / block_of(kind)]), tail, table);
  std::memcpy(out + at, tail, (k - at) * sizeof(Out));
}

template <Kind kind, class Out>
void decode_rows(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t kp, int64_t k, Out* out, int64_t out_stride) {
  parallel(rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1)), [=](int64_t begin, int64_t end) {
    const Table table = table_of_values();
    for (int64_t r = begin; r < end; ++r) {
      decode_row<kind>(codes + r * (kp / 2), scales + r * (kp / block_of(kind)), k, out + r * out_stride, table);
    }
  });
}

}  // namespace

void dequantize_rows(const uint8_t* codes, const uint8_t* scales, Kind kind, int64_t rows, int64_t kp, int64_t k, void* out,
                     int64_t out_stride, Kind out_kind) {
  auto* floats = static_cast<float*>(out);
  auto* halves = static_cast<uint16_t*>(out);
  if (kind == NVFP4 && out_kind == FLOAT32) decode_rows<NVFP4>(codes, scales, rows, kp, k, floats, out_stride);
  if (kind == NVFP4 && out_kind == BFLOAT16) decode_rows<NVFP4>(codes, scales, rows, kp, k, halves, out_stride);
  if (kind == MXFP4 && out_kind == FLOAT32) decode_rows<MXFP4>(codes, scales, rows, kp, k, floats, out_stride);
  if (kind == MXFP4 && out_kind == BFLOAT16) decode_rows<MXFP4>(codes, scales, rows, kp, k, halves, out_stride);
}

}  // namespace fp4
