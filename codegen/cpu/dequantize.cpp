// Codes and block scales to values, rows in parallel.
#include <type_traits>

#include "common.h"

namespace fp4 {
namespace {

constexpr float INTEGERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, -0.0f, -1, -2, -3, -4, -5, -6, -7};
// IF4's global scale holds the 1/7 of its 6/7.
constexpr float SEVEN_E2M1[16] = {0, 3.5, 7, 10.5, 14, 21, 28, 42, -0.0f, -3.5, -7, -10.5, -14, -21, -28, -42};
constexpr float SIX_INTEGERS[16] = {0, 6, 12, 18, 24, 30, 36, 42, -0.0f, -6, -12, -18, -24, -30, -36, -42};

template <Kind kind>
const float* values_under(bool flag) {
  if (kind == IF4) return flag ? SIX_INTEGERS : SEVEN_E2M1;
  return kind == MIXFP4 && flag ? INTEGERS : E2M1;
}

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
Table table_of(const float* values) { return _mm512_loadu_ps(values); }

#else

using Table = const float*;
Table table_of(const float* values) { return values; }

void decode_16(const uint8_t* codes, float scale, float* out, Table table) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = table[codes[i] & 0xF] * scale;
    out[2 * i + 1] = table[codes[i] >> 4] * scale;
  }
}

void decode_16(const uint8_t* codes, float scale, uint16_t* out, Table table) {
  float values[16];
  decode_16(codes, scale, values, table);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint16_t>(bits_of(values[i]) >> 16);
}

#endif

template <Kind kind, class Out>
void decode_row(const uint8_t* codes, const uint8_t* scales, int64_t k, Out* out, const Table& table, const Table& flagged) {
  auto decode = [=](int64_t at, Out* to) {
    const uint8_t byte = scales[at / block_of(kind)];
    decode_16(codes + at / 2, scale_value<kind>(byte), to, is_flagged(kind) && byte >> 7 ? flagged : table);
  };
  int64_t at = 0;
  for (; at + 16 <= k; at += 16) decode(at, out + at);
  if (at == k) return;
  Out tail[16];  // the codes are padded to whole blocks, the output is not
  decode(at, tail);
  std::memcpy(out + at, tail, (k - at) * sizeof(Out));
}

template <Kind kind, class Out>
void decode_rows(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t kp, int64_t k, Out* out, int64_t out_stride) {
  parallel(rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1)), [=](int64_t begin, int64_t end) {
    const Table table = table_of(values_under<kind>(false)), flagged = table_of(values_under<kind>(true));
    for (int64_t r = begin; r < end; ++r) {
      decode_row<kind>(codes + r * (kp / 2), scales + r * (kp / block_of(kind)), k, out + r * out_stride, table, flagged);
    }
  });
}

}  // namespace

void dequantize_rows(const uint8_t* codes, const uint8_t* scales, Kind kind, int64_t rows, int64_t kp, int64_t k, void* out,
                     int64_t out_stride, Kind out_kind) {
  auto* floats = static_cast<float*>(out);
  auto* halves = static_cast<uint16_t*>(out);
  auto decode = [=](auto tag) {
    constexpr Kind known = decltype(tag)::value;
    if (out_kind == FLOAT32) decode_rows<known>(codes, scales, rows, kp, k, floats, out_stride);
    if constexpr (known != IF4) {  // its 9 bits do not fit
      if (out_kind == BFLOAT16) decode_rows<known>(codes, scales, rows, kp, k, halves, out_stride);
    }
  };
  if (kind == NVFP4) decode(std::integral_constant<Kind, NVFP4>{});
  if (kind == MXFP4) decode(std::integral_constant<Kind, MXFP4>{});
  if (kind == MIXFP4) decode(std::integral_constant<Kind, MIXFP4>{});
  if (kind == IF4) decode(std::integral_constant<Kind, IF4>{});
}

}  // namespace fp4
