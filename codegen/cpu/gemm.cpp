// Many activations: each panel of 32 weight rows is decoded once into bf16 pairs, then multiplied by tiles of 14 activation rows.
//
// Code times block scale is exact in bf16, `vdpbf16ps` accumulates in float32, and nothing is rounded before the epilogue. The
// instruction takes denormal bf16 numbers as zero, as every bf16 matmul on such machines does.
#include "transpose.h"

namespace fp4 {

#if defined(FP4_AVX512_BF16)

namespace {

constexpr int64_t PANEL = 32;   // weight rows: two vectors of float32 sums
constexpr int64_t TILE = 14;    // activation rows: 28 sums, 2 weights and 1 activation fill the 32 registers
constexpr int64_t DEPTH = 1024;  // elements of K decoded at a time: the panel then takes 64 KiB

// Block scales of 16 rows for 128 elements: out[block], one lane a row.
template <Kind kind>
void load_scale_lanes(const uint8_t* scales, int64_t row_scales, int64_t last_row, int64_t count, __m512 (&out)[8]) {
  constexpr int blocks = 128 / block_of(kind);
  const __mmask16 present = static_cast<__mmask16>((1u << std::min<int64_t>(count, blocks)) - 1);
  alignas(64) uint64_t words[16];
  for (int64_t r = 0; r < 16; ++r) {
    const __m128i bytes = _mm_maskz_loadu_epi8(present, scales + std::min(r, last_row) * row_scales);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(words + r), bytes);
  }
  const __m512i low = _mm512_load_si512(words), high = _mm512_load_si512(words + 8);
  for (int block = 0; block < blocks; ++block) {
    const __m128i shift = _mm_cvtsi32_si128(8 * block);
    const __m128i first = _mm512_cvtepi64_epi8(_mm512_srl_epi64(low, shift)), second = _mm512_cvtepi64_epi8(_mm512_srl_epi64(high, shift));
    out[block] = scale_values<kind>(_mm_unpacklo_epi64(first, second));
  }
}

// Elements [first, first + depth) of weight rows [row, row + 16) as depth / 2 vectors of (even, odd) pairs, one lane a row. Rows past
// the last repeat it; nobody reads their sums.
template <Kind kind>
void decode_16_rows(const Product& p, int64_t row, int64_t first, int64_t depth, uint32_t* out) {
  const __m512 table = _mm512_loadu_ps(E2M1);
  const int64_t row_bytes = p.kp / 2, row_scales = p.kp / block_of(kind), last_row = p.n - 1 - row;
  if (last_row < 0) return;
  for (int64_t at = first; at < first + depth; at += 128) {
    const uint8_t* codes = p.b + row * row_bytes + at / 2;
    const int64_t left = row_bytes - at / 2, block = at / block_of(kind);
    const __mmask64 present = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    __m512 columns[16], scales[8];
    for (int64_t r = 0; r < 16; ++r) {
      const uint8_t* line = codes + std::min(r, last_row) * row_bytes;
      __builtin_prefetch(line + 128);  // 16 strided streams are too many for the hardware: 25 to 45 % of the time at K = 4096, M = 9
      columns[r] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(present, line));
    }
    transpose(columns);  // eight codes of each row
    load_scale_lanes<kind>(p.b_scales + row * row_scales + block, row_scales, last_row, row_scales - block, scales);
    const int count = static_cast<int>(std::min<int64_t>(16, (first + depth - at + 7) / 8));
    for (int c = 0; c < count; ++c) {
      const __m512 scale = scales[8 * c / block_of(kind)];
      for (int byte = 0; byte < 4; ++byte, out += PANEL) {
        const __m512i nibbles = _mm512_srli_epi32(_mm512_castps_si512(columns[c]), 8 * byte);
        const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(nibbles, table), scale);
        const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), table), scale);
        // The upper halves of both: exact, as the lower ones are zero.
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
        _mm512_store_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd)));
      }
    }
  }
}

void decode_panel(const Product& p, int64_t row, int64_t first, int64_t depth, uint32_t* out) {
  for (int64_t half = 0; half < PANEL; half += 16) {
    if (p.b_kind == NVFP4) {
      decode_16_rows<NVFP4>(p, row + half, first, depth, out + half);
    } else {
      decode_16_rows<MXFP4>(p, row + half, first, depth, out + half);
    }
  }
}

// sums[ROWS][32] (+)= activations (ROWS, 2 * pairs) times a decoded panel.
template <int ROWS>
void multiply_tile(const uint16_t* a, int64_t a_stride, const uint32_t* panel, int64_t pairs, float* sums, bool first) {
  __m512 acc[ROWS][2];
  for (int m = 0; m < ROWS; ++m) {
    for (int h = 0; h < 2; ++h) acc[m][h] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * PANEL + 16 * h);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const __m512bh w0 = (__m512bh)_mm512_load_si512(panel + i * PANEL), w1 = (__m512bh)_mm512_load_si512(panel + i * PANEL + 16);
    for (int m = 0; m < ROWS; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * a_stride + 2 * i, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, x);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, x);
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(sums + m * PANEL + 16 * h, acc[m][h]);
  }
}

using MultiplyTile = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, bool);
constexpr MultiplyTile MULTIPLY[TILE + 1] = {
    nullptr,          multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>,
    multiply_tile<5>, multiply_tile<6>,  multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,
    multiply_tile<10>, multiply_tile<11>, multiply_tile<12>, multiply_tile<13>, multiply_tile<14>,
};

// Output rows [begin, end) of one panel.
void multiply_panel(const Product& p, int64_t panel_row, int64_t begin, int64_t end, uint32_t* panel, float* sums) {
  const uint16_t* a = static_cast<const uint16_t*>(p.a);
  for (int64_t depth_at = 0; depth_at < p.k || depth_at == 0; depth_at += DEPTH) {
    const int64_t depth = std::min(DEPTH, p.k - depth_at);
    decode_panel(p, panel_row, depth_at, depth, panel);
    for (int64_t m = begin; m < end; m += TILE) {
      const int64_t rows = std::min(TILE, end - m);
      MULTIPLY[rows](a + m * p.a_stride + depth_at, p.a_stride, panel, (depth + 1) / 2, sums + (m - begin) * PANEL, depth_at == 0);
    }
  }
  const int64_t count = std::min(PANEL, p.n - panel_row);
  for (int64_t m = begin; m < end; ++m) store_row(p, sums + (m - begin) * PANEL, m, panel_row, count);
}

// The kernel reads pairs of activations, so odd K needs a zero behind each row; and rows a multiple of 4 KiB apart fall into one set of
// the cache, which does not hold 14 of them.
bool needs_copy(const Product& p) { return p.k % 2 || (p.a_stride > 0 && p.a_stride % 2048 == 0); }

int64_t copy_stride(const Product& p) { return (p.k + 1) / 2 * 2 + 32; }

void copy_rows(Product& p, uint16_t* out) {
  const int64_t stride = copy_stride(p);
  parallel(p.m, std::max<int64_t>(1, 65536 / std::max<int64_t>(p.k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      std::memcpy(out + m * stride, static_cast<const uint16_t*>(p.a) + m * p.a_stride, p.k * sizeof(uint16_t));
      out[m * stride + p.k] = 0;
    }
  });
  p.a = out;
  p.a_stride = stride;
}

}  // namespace

void product_of_many_rows(const Product& product) {
  Product p = product;
  Scratch<uint16_t, 2> copy(needs_copy(p) ? p.m * copy_stride(p) : 0);
  if (needs_copy(p)) copy_rows(p, copy.data());
  const int64_t panels = (p.n + PANEL - 1) / PANEL;
  // Rows are split too where there are fewer panels than threads; each part decodes the panel again, so parts stay above 8 tiles.
  const int64_t wanted = (2 * p.threads + panels - 1) / std::max<int64_t>(panels, 1);
  const int64_t parts = std::max<int64_t>(1, std::min(p.threads <= 1 ? 1 : wanted, p.m / (8 * TILE)));
  const int64_t rows = ((p.m + parts - 1) / parts + TILE - 1) / TILE * TILE;
  parallel(panels * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<uint32_t, 3> storage((std::min(DEPTH, p.k) + 7) / 8 * 4 * PANEL + 16);
    uint32_t* panel = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) & ~uintptr_t{63});
    Scratch<float, 4> sums(rows * PANEL);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts * rows;
      if (first < p.m) multiply_panel(p, item / parts * PANEL, first, std::min(first + rows, p.m), panel, sums.data());
    }
  });
}

#else

void product_of_many_rows(const Product&) {}  // api.cpp asks the vector level first

#endif

}  // namespace fp4
