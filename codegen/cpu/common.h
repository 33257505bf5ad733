// What the CPU kernels share: element and scale decoding, rounding to bf16, torch's own thread pool, the arguments of a product.
//
// Compiled with -ffp-contract=off and without -ffast-math: each float operation below is one IEEE rounding, as in the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FP4_AVX512 1
#endif
#if defined(FP4_AVX512) && defined(__AVX512BF16__)
#define FP4_AVX512_BF16 1
#endif
#if !defined(FP4_AVX512) && defined(__AVX2__) && defined(__FMA__)
#define FP4_AVX2 1
#endif
#if defined(FP4_AVX512) || defined(FP4_AVX2)
#include <immintrin.h>
#endif

namespace fp4 {

// How an operand, a bias or a result is stored. Python passes these numbers. Blocks of MIXFP4 and IF4 read one of two tables, as the sign bit
// of their scale says; only `dequantize_rows` knows them.
enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, NVFP4 = 2, MXFP4 = 3, MIXFP4 = 4, IF4 = 5 };

constexpr int block_of(Kind kind) { return kind == MXFP4 ? 32 : 16; }
constexpr bool is_flagged(Kind kind) { return kind == MIXFP4 || kind == IF4; }

// torch's pool (`torch_parallel_for` of its stable C ABI), so that two pools never share the cores; null: run on the calling thread.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
extern ParallelFor torch_parallel_for;

template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain || torch_parallel_for == nullptr) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  torch_parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(uint16_t x) { return float_of(uint32_t{x} << 16); }

inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

constexpr float E2M1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};

// All 256 e4m3 values.
struct E4m3Table {
  float value[256];

  E4m3Table() {
    for (int byte = 0; byte < 256; ++byte) {
      const int exponent = byte >> 3 & 15, mantissa = byte & 7;
      const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
      value[byte] = (byte & 0x7F) == 0x7F ? NAN : byte & 0x80 ? -magnitude : magnitude;
    }
  }
};
extern const E4m3Table E4M3;

inline float e8m0_value(uint8_t byte) {
  if (byte == 0xFF) return float_of(0x7FC00000);
  return float_of(byte == 0 ? 0x00400000 : uint32_t{byte} << 23);
}

template <Kind kind>
float scale_value(uint8_t byte) {
  return kind == MXFP4 ? e8m0_value(byte) : E4M3.value[is_flagged(kind) ? byte & 0x7F : byte];
}

#if defined(FP4_AVX512)
template <Kind kind>
inline __m512 scale_values(__m128i bytes) {
  if constexpr (kind == MXFP4) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    __m512i bits = _mm512_slli_epi32(wide, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(wide, wide), _mm512_set1_epi32(0x00400000));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(0xFF)), _mm512_set1_epi32(0x7FC00000));
    return _mm512_castsi512_ps(bits);
  } else {
    // As a float16 pattern the bits read 2^-8 too small, subnormals included.
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign)), _mm512_set1_ps(256));
    return _mm512_mask_mov_ps(value, _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F << 7)), _mm512_set1_ps(NAN));
  }
}
#endif

// out (M, N) = A (M, K) times B (N, K) transposed. Field for field what launch.py packs: 64 bits each.
struct Product {
  const void* a;            // FLOAT32 or BFLOAT16 (M, K) with rows `a_stride` apart, or codes (M, a_stride / 2)
  const uint8_t* a_scales;  // (M, a_stride / block)
  const float* a_global;    // null: 1
  const uint8_t* b;         // codes (N, kp / 2)
  const uint8_t* b_scales;  // (N, kp / block)
  const float* b_global;
  const void* bias;  // (N), or null
  void* out;         // (M, N)
  Kind a_kind, b_kind, bias_kind, out_kind;
  int64_t m, n, k, kp, a_stride;
  int64_t a_global_per_row, b_global_per_row;
  int64_t threads;
};

// Memory for one call, at most one of each tag alive per thread; small ones are kept, so that a call in a loop allocates nothing.
template <class T, int tag>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    static thread_local std::vector<T> kept;
    if (count * static_cast<int64_t>(sizeof(T)) > (4 << 20)) {
      own_.reset(new T[count]);
      data_ = own_.get();
      return;
    }
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    data_ = kept.data();
  }
  T* data() const { return data_; }

 private:
  std::unique_ptr<T[]> own_;
  T* data_;
};

// fl(fl(acc * fl(a_global * b_global)) + bias), one rounding to the output type, for out[row][first .. first + count), count <= 64.
void store_row(const Product& p, const float* acc, int64_t row, int64_t first, int64_t count);

constexpr int64_t FEW_ROWS = 8;
constexpr int64_t FEW_ROWS_BESIDE_MANY = 5;  // where both kernels exist; measured on Zen 5: at 6 rows decoding into a panel has paid off
void product_of_few_rows(const Product& p);   // gemv.cpp: M <= FEW_ROWS, float32 or bf16 activations
void product_of_many_rows(const Product& p);  // gemm.cpp: any M, bf16 activations, vector level 2 only

// dequantize.cpp: rows of codes (rows, kp / 2) to their first k values. bf16 holds them exactly.
void dequantize_rows(const uint8_t* codes, const uint8_t* scales, Kind kind, int64_t rows, int64_t kp, int64_t k, void* out,
                     int64_t out_stride, Kind out_kind);

}  // namespace fp4
