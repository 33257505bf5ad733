// Few activations against many coded weight rows: the codes are read once, decoded by table, and never written out.
//
// The activations are split into even and odd elements, which is how the nibbles of a vector of bytes come apart. The sum over one
// block is taken unscaled and multiplied by the block's scale in float32, so every product is exact.
#include "common.h"

namespace fp4 {
namespace {

// Several rows are read side by side, which hides from the hardware that the whole is one stream. Measured on Zen 5 with weights in no
// cache, M = 1, 576 x 576: 42 us without, 19 us with any distance from 2 to 8 KiB.
template <int bytes>
inline void prefetch(const uint8_t* codes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(codes + 4096 + line);
}

#if defined(FP4_AVX512)

// 16 block scales as float32; absent ones are zero.
template <Kind kind>
__m512 load_scales(const uint8_t* scales, int64_t count) {
  const __mmask16 present = count >= 16 ? 0xFFFF : (1u << count) - 1;
  return scale_values<kind>(_mm_maskz_loadu_epi8(present, scales));
}

// Lane l reads the scale of the block it lies in, where each scale serves `width` lanes.
__m512i scale_lanes(int width) {
  int32_t lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = i / width;
  return _mm512_loadu_si512(lane);
}

// Sums of four vectors.
__m128 sum_4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int ROWS, int COLS>
void write_sums(__m512 (&acc)[COLS][ROWS], float* out, int64_t out_stride) {
  for (int m = 0; m < ROWS; ++m) {
    int n = 0;
    for (; n + 4 <= COLS; n += 4) _mm_storeu_ps(out + m * out_stride + n, sum_4(acc[n][m], acc[n + 1][m], acc[n + 2][m], acc[n + 3][m]));
    for (; n < COLS; ++n) out[m * out_stride + n] = _mm512_reduce_add_ps(acc[n][m]);
  }
}

#endif

#if defined(FP4_AVX512_BF16)

// One step is 32 bytes = 64 elements; 32 even activations, then 32 odd ones. Words of the permute read 5 index bits: bit 4 is
// the lowest bit of the neighbour nibble, so the table holds the sixteen values twice.
struct Bf16Step {
  using Activation = uint16_t;
  static constexpr int BYTES = 32;

  template <Kind kind, int ROWS, int COLS>
  static void run(const uint8_t* codes, const uint8_t* scales, int64_t kp, const uint16_t* x, int64_t x_stride, float* out,
                  int64_t out_stride) {
    constexpr int per_step = 64 / block_of(kind), steps_a_chunk = 16 / per_step;
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = static_cast<uint16_t>(bits_of(E2M1[i % 16]) >> 16);
    const __m512i table = _mm512_load_si512(values), lanes = scale_lanes(16 / per_step);
    const int64_t row_bytes = kp / 2, row_scales = kp / block_of(kind);
    __m512 acc[COLS][ROWS];
    for (auto& column : acc)
      for (auto& sum : column) sum = _mm512_setzero_ps();

    for (int64_t at = 0, chunk = 0; at < row_bytes; chunk += 16) {
      __m512 scale[COLS];
      for (int n = 0; n < COLS; ++n) scale[n] = load_scales<kind>(scales + n * row_scales + chunk, row_scales - chunk);
      for (int step = 0; step < steps_a_chunk && at < row_bytes; ++step, at += BYTES) {
        const __m512i which = _mm512_add_epi32(lanes, _mm512_set1_epi32(step * per_step));
        prefetch<COLS * BYTES>(codes + COLS * at);
        const int64_t left = row_bytes - at;
        const __mmask32 present = left >= BYTES ? 0xFFFFFFFFu : (1u << left) - 1;
        for (int n = 0; n < COLS; ++n) {
          const __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(present, codes + n * row_bytes + at));
          const __m512bh even = (__m512bh)_mm512_permutexvar_epi16(words, table);
          const __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
          const __m512 s = _mm512_permutexvar_ps(which, scale[n]);
          for (int m = 0; m < ROWS; ++m) {
            const uint16_t* xm = x + m * x_stride + 2 * at;
            __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), even, (__m512bh)_mm512_loadu_si512(xm));
            sum = _mm512_dpbf16_ps(sum, odd, (__m512bh)_mm512_loadu_si512(xm + 32));
            acc[n][m] = _mm512_fmadd_ps(sum, s, acc[n][m]);
          }
        }
      }
    }
    write_sums<ROWS, COLS>(acc, out, out_stride);
  }
};

#endif

#if defined(FP4_AVX512)

// One step is 16 bytes = 32 elements; 16 even activations, then 16 odd ones.
struct Float32Step {
  using Activation = float;
  static constexpr int BYTES = 16;

  template <Kind kind, int ROWS, int COLS>
  static void run(const uint8_t* codes, const uint8_t* scales, int64_t kp, const float* x, int64_t x_stride, float* out,
                  int64_t out_stride) {
    constexpr int per_step = 32 / block_of(kind), steps_a_chunk = 16 / per_step;
    const __m512 table = _mm512_loadu_ps(E2M1);
    const __m512i lanes = scale_lanes(16 / per_step);
    const int64_t row_bytes = kp / 2, row_scales = kp / block_of(kind);
    __m512 acc[COLS][ROWS];
    for (auto& column : acc)
      for (auto& sum : column) sum = _mm512_setzero_ps();

    for (int64_t at = 0, chunk = 0; at < row_bytes; chunk += 16) {
      __m512 scale[COLS];
      for (int n = 0; n < COLS; ++n) scale[n] = load_scales<kind>(scales + n * row_scales + chunk, row_scales - chunk);
      for (int step = 0; step < steps_a_chunk && at < row_bytes; ++step, at += BYTES) {
        const __m512i which = _mm512_add_epi32(lanes, _mm512_set1_epi32(step * per_step));
        prefetch<COLS * BYTES>(codes + COLS * at);
        const int64_t left = row_bytes - at;
        const __mmask16 present = left >= BYTES ? 0xFFFFu : (1u << left) - 1;
        for (int n = 0; n < COLS; ++n) {
          const __m512i nibbles = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, codes + n * row_bytes + at));
          const __m512 even = _mm512_permutexvar_ps(nibbles, table);
          const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), table);
          const __m512 s = _mm512_permutexvar_ps(which, scale[n]);
          for (int m = 0; m < ROWS; ++m) {
            const float* xm = x + m * x_stride + 2 * at;
            __m512 sum = _mm512_mul_ps(even, _mm512_loadu_ps(xm));
            sum = _mm512_fmadd_ps(odd, _mm512_loadu_ps(xm + 16), sum);
            acc[n][m] = _mm512_fmadd_ps(sum, s, acc[n][m]);
          }
        }
      }
    }
    write_sums<ROWS, COLS>(acc, out, out_stride);
  }
};

#elif defined(FP4_AVX2)

// One step is 8 bytes = 16 elements = at most one block; 8 even activations, then 8 odd ones.
struct Float32Step {
  using Activation = float;
  static constexpr int BYTES = 8;

  static __m256 decode(__m256i nibbles, __m256 magnitudes) {
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(nibbles, _mm256_set1_epi32(8)), 28);
    return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, nibbles), _mm256_castsi256_ps(sign));
  }

  template <Kind kind, int ROWS, int COLS>
  static void run(const uint8_t* codes, const uint8_t* scales, int64_t kp, const float* x, int64_t x_stride, float* out,
                  int64_t out_stride) {
    const __m256 magnitudes = _mm256_loadu_ps(E2M1);
    const int64_t row_bytes = kp / 2, row_scales = kp / block_of(kind);
    __m256 acc[COLS][ROWS];
    for (auto& column : acc)
      for (auto& sum : column) sum = _mm256_setzero_ps();
    for (int64_t at = 0; at < row_bytes; at += BYTES) {
      for (int n = 0; n < COLS; ++n) {
        const __m256i nibbles = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + n * row_bytes + at)));
        const __m256 even = decode(nibbles, magnitudes), odd = decode(_mm256_srli_epi32(nibbles, 4), magnitudes);
        const __m256 s = _mm256_set1_ps(scale_value<kind>(scales[n * row_scales + 2 * at / block_of(kind)]));
        for (int m = 0; m < ROWS; ++m) {
          const float* xm = x + m * x_stride + 2 * at;
          const __m256 sum = _mm256_fmadd_ps(odd, _mm256_loadu_ps(xm + 8), _mm256_mul_ps(even, _mm256_loadu_ps(xm)));
          acc[n][m] = _mm256_fmadd_ps(sum, s, acc[n][m]);
        }
      }
    }
    for (int n = 0; n < COLS; ++n)
      for (int m = 0; m < ROWS; ++m) {
        const __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc[n][m]), _mm256_extractf128_ps(acc[n][m], 1));
        const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        out[m * out_stride + n] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
      }
  }
};

#else

struct Float32Step {
  using Activation = float;
  static constexpr int BYTES = 8;

  template <Kind kind, int ROWS, int COLS>
  static void run(const uint8_t* codes, const uint8_t* scales, int64_t kp, const float* x, int64_t x_stride, float* out,
                  int64_t out_stride) {
    const int64_t row_bytes = kp / 2, row_scales = kp / block_of(kind);
    for (int n = 0; n < COLS; ++n) {
      float acc[ROWS] = {};
      for (int64_t at = 0; at < row_bytes; at += BYTES) {
        float even[BYTES], odd[BYTES];
        for (int i = 0; i < BYTES; ++i) {
          even[i] = E2M1[codes[n * row_bytes + at + i] & 0xF];
          odd[i] = E2M1[codes[n * row_bytes + at + i] >> 4];
        }
        const float s = scale_value<kind>(scales[n * row_scales + 2 * at / block_of(kind)]);
        for (int m = 0; m < ROWS; ++m) {
          const float* xm = x + m * x_stride + 2 * at;
          float product[BYTES];
          for (int i = 0; i < BYTES; ++i) product[i] = even[i] * xm[i] + odd[i] * xm[i + BYTES];
          for (int width = BYTES / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) product[i] += product[i + width];
          acc[m] += product[0] * s;
        }
      }
      for (int m = 0; m < ROWS; ++m) out[m * out_stride + n] = acc[m];
    }
  }
};

#endif

// Activation e of a step lies at e / 2, the odd ones behind the even ones; zeros fill the last step.
template <class Step, class Source, class Convert>
void split(const Source* x, int64_t k, typename Step::Activation* out, const Convert& convert) {
  constexpr int64_t width = 2 * Step::BYTES;
  int64_t at = 0;
  for (; at + width <= k; at += width)
    for (int64_t i = 0; i < Step::BYTES; ++i) {
      out[at + i] = convert(x[at + 2 * i]);
      out[at + Step::BYTES + i] = convert(x[at + 2 * i + 1]);
    }
  for (int64_t e = 0; e < width && at < k; ++e) {
    out[at + e % 2 * Step::BYTES + e / 2] = at + e < k ? convert(x[at + e]) : typename Step::Activation{0};
  }
}

// Weight rows read side by side, as many as have registers for their sums; measured for 512-bit vectors.
constexpr int columns_at_once(int rows) {
#if defined(FP4_AVX512)
  return rows == 1 ? 8 : rows <= 6 ? 4 : 2;
#else
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
#endif
}

template <class Step, Kind kind, int ROWS>
void rows_of_weights(const Product& p, const typename Step::Activation* x, int64_t x_stride) {
  constexpr int COLS = columns_at_once(ROWS);
  const int64_t row_bytes = p.kp / 2, row_scales = p.kp / block_of(kind);
  const int64_t grain = std::max<int64_t>(64, (int64_t{1} << 18) / std::max<int64_t>(p.kp * ROWS, 1) / 4 * 4);
  parallel(p.n, grain, [&](int64_t begin, int64_t end) {
    float sums[ROWS][64];
    for (int64_t first = begin; first < end; first += 64) {
      const int64_t count = std::min<int64_t>(64, end - first);
      int64_t n = 0;
      for (; n + COLS <= count; n += COLS) {
        const int64_t row = first + n;
        Step::template run<kind, ROWS, COLS>(p.b + row * row_bytes, p.b_scales + row * row_scales, p.kp, x, x_stride, &sums[0][n], 64);
      }
      for (; n < count; ++n) {
        const int64_t row = first + n;
        Step::template run<kind, ROWS, 1>(p.b + row * row_bytes, p.b_scales + row * row_scales, p.kp, x, x_stride, &sums[0][n], 64);
      }
      for (int m = 0; m < ROWS; ++m) store_row(p, sums[m], m, first, count);
    }
  });
}

template <class Step, Kind kind>
void for_row_count(const Product& p, const typename Step::Activation* x, int64_t x_stride) {
  switch (p.m) {
    case 1: return rows_of_weights<Step, kind, 1>(p, x, x_stride);
    case 2: return rows_of_weights<Step, kind, 2>(p, x, x_stride);
    case 3: return rows_of_weights<Step, kind, 3>(p, x, x_stride);
    case 4: return rows_of_weights<Step, kind, 4>(p, x, x_stride);
    case 5: return rows_of_weights<Step, kind, 5>(p, x, x_stride);
    case 6: return rows_of_weights<Step, kind, 6>(p, x, x_stride);
    case 7: return rows_of_weights<Step, kind, 7>(p, x, x_stride);
    case 8: return rows_of_weights<Step, kind, 8>(p, x, x_stride);
  }
}

template <class Step, class Source, class Convert>
void with_split_activations(const Product& p, const Convert& convert) {
  constexpr int64_t width = 2 * Step::BYTES;
  const int64_t x_stride = (p.kp + width - 1) / width * width;
  Scratch<typename Step::Activation, 1> x(p.m * x_stride);
  for (int64_t m = 0; m < p.m; ++m) {
    typename Step::Activation* row = x.data() + m * x_stride;
    split<Step>(static_cast<const Source*>(p.a) + m * p.a_stride, p.k, row, convert);
    const int64_t written = (p.k + width - 1) / width * width;
    std::fill(row + std::min(written, x_stride), row + x_stride, typename Step::Activation{0});
  }
  p.b_kind == NVFP4 ? for_row_count<Step, NVFP4>(p, x.data(), x_stride) : for_row_count<Step, MXFP4>(p, x.data(), x_stride);
}

}  // namespace

void product_of_few_rows(const Product& p) {
  if (p.a_kind == FLOAT32) return with_split_activations<Float32Step, float>(p, [](float x) { return x; });
#if defined(FP4_AVX512_BF16)
  with_split_activations<Bf16Step, uint16_t>(p, [](uint16_t x) { return x; });
#else
  with_split_activations<Float32Step, uint16_t>(p, [](uint16_t x) { return from_bf16(x); });
#endif
}

}  // namespace fp4
