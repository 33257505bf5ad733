// Block quantization in the order of operations of codegen/reference/block.py, bit for bit.
//
// 16 neighbouring groups of 16 elements are transposed, so that a group is a lane: its maximum, its scale, the sum of its errors in
// the prescribed order and its packed codes are then plain loops over 16 lanes, which compilers turn into vectors. Magnitudes are
// compared as integers, which orders them like floats and puts Inf and NaN on top.
#include "transpose.h"

namespace fp4 {
namespace {

constexpr uint32_t INFINITE = 0x7F800000, MAGNITUDE = 0x7FFFFFFF;
constexpr float LARGEST = 3.4028234663852886e38f, ONE_SIXTH = 1.0f / 6;
// codegen/formats.py: 6 / EDEN_WIDEN * EDEN_E4M3_BOUND, and EDEN_WIDEN / 6.
constexpr float EDEN_BOUND = 6 / (17.0 / 16 * 0.93) * 255.99, EDEN_SIXTH = 17.0 / 16 * 0.93 / 6;

enum Rule : int64_t { AMAX = 0, SQUARED = 1, ABSOLUTE = 2, MAXIMUM = 3, AMAX_17_16 = 4, EDEN = 5 };

constexpr bool tries_two(Rule rule) { return rule == SQUARED || rule == ABSOLUTE || rule == MAXIMUM; }
enum Granularity : int64_t { TENSOR = 0, ROW = 1, STATIC = 2 };

// Field for field what launch.py packs.
struct Quantize {
  const void* x;  // (matrices, rows, k) contiguous
  uint8_t* codes;
  uint8_t* scales;
  float* decode;  // one a matrix, or one a row
  int64_t matrices, rows, k, kp;
  Kind x_kind, format;
  Rule rule;
  Granularity granularity;
  int64_t tile_rows;  // 1 or 16
  int64_t stochastic, seed;
  double static_amax;
};

// Largest finite magnitude. Bits: uint32_t of a float32, uint16_t of a bf16.
template <class Bits>
Bits finite_amax_bits(const Bits* x, int64_t count) {
  constexpr Bits magnitude_mask = static_cast<Bits>(~Bits{0}) >> 1, infinite = static_cast<Bits>(INFINITE >> (32 - 8 * sizeof(Bits)));
  Bits most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = x[i] & magnitude_mask;
    const Bits finite = magnitude & -static_cast<Bits>(magnitude < infinite);  // a mask: compilers turn a choice into a jump
    most = std::max(most, finite);
  }
  return most;
}

float finite_amax(const float* x, int64_t count) { return float_of(finite_amax_bits(reinterpret_cast<const uint32_t*>(x), count)); }
float finite_amax(const uint16_t* x, int64_t count) { return from_bf16(finite_amax_bits(x, count)); }

// A value and its code.
struct Rounded {
  float value;
  uint32_t code;
};

// 0 <= t <= 448 to e4m3, nearest even. Below 2^-6 the values are multiples of 2^-9, which is the last bit of 2^14.
Rounded round_e4m3(float t) {
  const uint32_t bits = bits_of(t);
  const float small = t + 0x1p14f, small_value = small - 0x1p14f;
  const uint32_t large = bits + 0x7FFFF + (bits >> 20 & 1);
  const bool is_small = t < 0x1p-6f;
  const uint32_t small_code = bits_of(small) - bits_of(0x1p14f), large_code = (large >> 20) - (120 << 3);
  return {is_small ? small_value : float_of(large & 0xFFF00000), is_small ? small_code : large_code};
}

uint32_t with_sign(uint32_t code, uint32_t bits) {
  const uint32_t sign = bits >> 28 & 8;
  return (bits & MAGNITUDE) > INFINITE ? 7 : code | sign;
}

// Magnitude and signed code of an element, nearest even. Below 2 the values are multiples of 1/2, the last bit of 2^22; above, e2m1
// keeps one bit of the mantissa.
Rounded round_e2m1(float y) {
  const uint32_t bits = bits_of(y), clipped = std::min(bits & MAGNITUDE, bits_of(6.0f));
  const float small = float_of(clipped) + 0x1p22f, small_value = small - 0x1p22f;
  const uint32_t large = clipped + 0x1FFFFF + (clipped >> 22 & 1);
  const bool is_small = clipped < bits_of(2.0f);
  const uint32_t small_code = bits_of(small) - bits_of(0x1p22f), large_code = (large >> 22) - 0xFC;
  return {is_small ? small_value : float_of(large & 0xFFC00000), with_sign(is_small ? small_code : large_code, bits)};
}

// The magnitude raised by random / 256 of its step, then the grid value below.
uint32_t stochastic_code(float y, uint32_t random) {
  const uint32_t bits = bits_of(y);
  const float magnitude = float_of(bits & MAGNITUDE);
  const float step = magnitude < 2 ? 0.5f : magnitude < 4 ? 1.0f : 2.0f;
  const uint32_t raised = std::min(bits_of(magnitude + static_cast<float>(static_cast<int32_t>(random)) / 256.0f * step), bits_of(6.0f));
  const uint32_t small = static_cast<uint32_t>(static_cast<int32_t>(float_of(raised) * 2));
  return with_sign(raised < bits_of(2.0f) ? small : (raised >> 22) - 0xFC, bits);
}

using Lanes = uint32_t[16];
using FloatLanes = float[16];

// 16 groups of a row: x[element][group]. Elements past the end of the row are zero.
struct Groups {
  alignas(64) float x[16][16];

  template <class Source>
  Groups(const Source* row, int64_t at, int64_t k) {
    transpose_row(row, at, k, x);
  }

  void add_amax_bits(Lanes& most) const {
    for (const auto& element : x) {
      for (int g = 0; g < 16; ++g) most[g] = std::max(most[g], bits_of(element[g]) & MAGNITUDE);
    }
  }

  // Eight codes a word, the first in the lowest bits.
  void encode_nearest(const FloatLanes& multiplier, Lanes (&words)[2]) const {
    for (int half = 0; half < 2; ++half) {
      for (int g = 0; g < 16; ++g) {
        uint32_t word = 0;
#pragma GCC unroll 8
        for (int e = 0; e < 8; ++e) word |= round_e2m1(x[8 * half + e][g] * multiplier[g]).code << 4 * e;
        words[half][g] = word;
      }
    }
  }

  void encode_stochastic(const FloatLanes& multiplier, const Lanes (&random)[4], Lanes (&words)[2]) const {
    for (int half = 0; half < 2; ++half) {
      for (int g = 0; g < 16; ++g) {
        uint32_t word = 0;
#pragma GCC unroll 8
        for (int e = 0; e < 8; ++e) {
          const uint32_t byte = random[2 * half + e / 4][g] >> 8 * (e % 4) & 0xFF;
          word |= stochastic_code(x[8 * half + e][g] * multiplier[g], byte) << 4 * e;
        }
        words[half][g] = word;
      }
    }
  }

  // Error of each group under `scale` in units of the encoded tensor.
  template <Rule rule>
  void errors(const FloatLanes& multiplier, const FloatLanes& scale, float encode_scale, FloatLanes& out) const {
    float error[16][16];
    for (int e = 0; e < 16; ++e) {
      for (int g = 0; g < 16; ++g) {
        const float magnitude = std::fabs(x[e][g]);  // rounding is symmetric
        const float difference = std::fabs(magnitude * encode_scale - round_e2m1(magnitude * multiplier[g]).value * scale[g]);
        error[e][g] = rule == SQUARED ? difference * difference : difference;
      }
    }
    fold<rule>(error);
    std::memcpy(out, error[0], sizeof(out));
  }

  // Row 0 becomes the sum of all rows as a tree of neighbours, or their maximum.
  template <Rule rule>
  static void fold(float (&rows)[16][16]) {
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) {
        for (int g = 0; g < 16; ++g) {
          const float a = rows[2 * i][g], b = rows[2 * i + 1][g];
          rows[i][g] = rule == MAXIMUM ? float_of(std::max(bits_of(a), bits_of(b))) : a + b;
        }
      }
    }
  }
};

// Philox4x32-10 with counters (group, 0, 0, 0) for 16 groups from `first` on: word w of lane g.
void draw(uint64_t seed, uint32_t first, Lanes (&c)[4]) {
  for (int g = 0; g < 16; ++g) c[0][g] = first + g, c[1][g] = c[2][g] = c[3][g] = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    for (int g = 0; g < 16; ++g) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c[0][g], p1 = uint64_t{0xCD9E8D57} * c[2][g];
      c[0][g] = static_cast<uint32_t>(p1 >> 32) ^ c[1][g] ^ k0;
      c[2][g] = static_cast<uint32_t>(p0 >> 32) ^ c[3][g] ^ k1;
      c[1][g] = static_cast<uint32_t>(p1);
      c[3][g] = static_cast<uint32_t>(p0);
    }
  }
}

// Codes of groups [first, first + width) of one row.
void encode(const Quantize& q, int64_t row, int64_t first, int width, const Groups& groups, const FloatLanes& multiplier) {
  Lanes words[2];
  if (q.stochastic) {
    Lanes random[4];
    draw(static_cast<uint64_t>(q.seed), static_cast<uint32_t>(row * (q.kp / 16) + first), random);
    groups.encode_stochastic(multiplier, random, words);
  } else {
    groups.encode_nearest(multiplier, words);
  }
  uint32_t codes[32];
  for (int g = 0; g < 16; ++g) codes[2 * g] = words[0][g], codes[2 * g + 1] = words[1][g];
  std::memcpy(q.codes + row * (q.kp / 2) + 8 * first, codes, 8 * width);
}

struct TensorScale {
  float encode, decode;
};

TensorScale tensor_scale(float amax, const Quantize& q) {
  const float bound = q.rule == EDEN ? EDEN_BOUND : 6 * (tries_two(q.rule) ? 256.0f : 448.0f);
  const float encode = amax == 0 ? 1.0f : std::min(bound / amax, LARGEST);
  return {encode, 1.0f / encode};
}

// The block scales of 16 groups whose maxima are mapped to 6 / widen.
struct Choice {
  Lanes byte;
  FloatLanes scale, multiplier;

  Choice(const Lanes& amax, const TensorScale& tensor, float widen, float sixth = ONE_SIXTH) {
    const float to_target = tensor.encode * sixth;
    for (int g = 0; g < 16; ++g) {
      const float target = float_of(amax[g]) * to_target * widen;
      const Rounded stored = round_e4m3(target < 448.0f ? target : 448.0f);
      byte[g] = stored.code;
      scale[g] = stored.value;
      const float inverse = 1.0f / (scale[g] * tensor.decode);
      multiplier[g] = inverse < LARGEST ? inverse : LARGEST;
    }
  }
};

// Takes the wider scale for the groups that lose less with it; `count` rows decide together.
template <Rule rule, class Source>
void take_better(const Quantize& q, const Source* x, int64_t at, int64_t count, const TensorScale& tensor, const Choice& wider,
                 Choice& choice) {
  float errors[16][16] = {}, wider_errors[16][16] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Groups groups(x + r * q.k, at, q.k);
    groups.errors<rule>(choice.multiplier, choice.scale, tensor.encode, errors[r]);
    groups.errors<rule>(wider.multiplier, wider.scale, tensor.encode, wider_errors[r]);
  }
  if (count > 1) {
    Groups::fold<rule>(errors);
    Groups::fold<rule>(wider_errors);
  }
  for (int g = 0; g < 16; ++g) {
    const bool better = wider_errors[0][g] < errors[0][g];
    choice.byte[g] = better ? wider.byte[g] : choice.byte[g];
    choice.multiplier[g] = better ? wider.multiplier[g] : choice.multiplier[g];
  }
}

// 0 <= target <= 448, raised by `random` / 2^20 of a step, to the e4m3 code below.
uint32_t stochastic_e4m3(float target, uint32_t random) {
  const float step = std::max(float_of(bits_of(target) & INFINITE) * 0.125f, 0x1p-9f);
  const float raised = target + static_cast<float>(static_cast<int32_t>(random & 0xFFFFF)) * 0x1p-20f * step;
  return raised < 0x1p-6f ? static_cast<uint32_t>(static_cast<int32_t>(raised * 512)) : (bits_of(raised) >> 20) - (120 << 3);
}

// codegen/reference/eden.py for 16 groups of a row from block `first` of the tensor on: eight and eight are corrected together.
void correct_scales(const Quantize& q, const Groups& groups, uint32_t first, const TensorScale& tensor, Choice& choice) {
  float length[16][16], projection[16][16];
  for (int e = 0; e < 16; ++e) {
    for (int g = 0; g < 16; ++g) {
      const float magnitude = std::fabs(groups.x[e][g]), scaled = magnitude * tensor.encode;
      length[e][g] = scaled * scaled;
      projection[e][g] = scaled * (round_e2m1(magnitude * choice.multiplier[g]).value * choice.scale[g]);
    }
  }
  Groups::fold<SQUARED>(length);
  Groups::fold<SQUARED>(projection);
  Lanes random[4];
  draw(static_cast<uint64_t>(q.seed), first, random);
  for (int from = 0; from < 16; from += 8) {
    float *l = length[0] + from, *p = projection[0] + from;
    for (int width = 4; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) l[i] = l[2 * i] + l[2 * i + 1], p[i] = p[2 * i] + p[2 * i + 1];
    }
    const float ratio = p[0] > 0 ? l[0] / p[0] : 1.0f, correction = ratio < INFINITY ? ratio : 1.0f;
    for (int g = from; g < from + 8; ++g) {
      const float target = choice.scale[g] * correction;
      choice.byte[g] = stochastic_e4m3(target < 448.0f ? target : 448.0f, random[0][g]);
    }
  }
}

// What one thread does at a time: groups [begin, end) of 1 row, or of up to 16 rows that share their block scales.
struct Strip {
  int64_t matrix, row, rows, begin, end;
};

template <Rule rule, class Source>
void quantize_nvfp4_strip_by(const Quantize& q, const Strip& strip, const TensorScale& tensor) {
  const int64_t first = strip.row, count = strip.rows, blocks = q.kp / 16;
  const Source* x = static_cast<const Source*>(q.x) + first * q.k;
  for (int64_t at = strip.begin; at < strip.end; at += 16) {
    const int width = static_cast<int>(std::min<int64_t>(16, strip.end - at));
    Lanes amax = {};
    const Groups head(x, 16 * at, q.k);
    head.add_amax_bits(amax);
    for (int64_t r = 1; r < count; ++r) Groups(x + r * q.k, 16 * at, q.k).add_amax_bits(amax);
    Choice choice(amax, tensor, rule == AMAX_17_16 ? 1.0625f : 1.0f, rule == EDEN ? EDEN_SIXTH : ONE_SIXTH);
    if constexpr (rule == EDEN) correct_scales(q, head, static_cast<uint32_t>(first * blocks + at), tensor, choice);
    if constexpr (tries_two(rule)) take_better<rule>(q, x, 16 * at, count, tensor, Choice(amax, tensor, 1.5f), choice);
    uint8_t bytes[16];
    for (int g = 0; g < 16; ++g) {
      bytes[g] = static_cast<uint8_t>(amax[g] >= INFINITE ? 0x7F : choice.byte[g]);
      choice.multiplier[g] = amax[g] > INFINITE ? NAN : choice.multiplier[g];
    }
    encode(q, first, at, width, head, choice.multiplier);
    for (int64_t r = 1; r < count; ++r) encode(q, first + r, at, width, Groups(x + r * q.k, 16 * at, q.k), choice.multiplier);
    for (int64_t r = 0; r < count; ++r) std::memcpy(q.scales + (first + r) * blocks + at, bytes, width);
  }
}

template <class Source>
void quantize_nvfp4_strip(const Quantize& q, const Strip& strip, const TensorScale& tensor) {
  switch (q.rule) {
    case AMAX: return quantize_nvfp4_strip_by<AMAX, Source>(q, strip, tensor);
    case AMAX_17_16: return quantize_nvfp4_strip_by<AMAX_17_16, Source>(q, strip, tensor);
    case EDEN: return quantize_nvfp4_strip_by<EDEN, Source>(q, strip, tensor);
    case SQUARED: return quantize_nvfp4_strip_by<SQUARED, Source>(q, strip, tensor);
    case ABSOLUTE: return quantize_nvfp4_strip_by<ABSOLUTE, Source>(q, strip, tensor);
    case MAXIMUM: return quantize_nvfp4_strip_by<MAXIMUM, Source>(q, strip, tensor);
  }
}

template <class Source>
void quantize_mxfp4_strip(const Quantize& q, const Strip& strip) {
  const int64_t row = strip.row, blocks = q.kp / 16;  // groups of 16; pairs share a scale
  const Source* x = static_cast<const Source*>(q.x) + row * q.k;
  for (int64_t at = strip.begin; at < strip.end; at += 16) {
    const int width = static_cast<int>(std::min<int64_t>(16, strip.end - at));
    const Groups groups(x, 16 * at, q.k);
    Lanes amax = {};
    groups.add_amax_bits(amax);
    uint8_t bytes[8];
    FloatLanes multiplier;
    for (int g = 0; g < 8; ++g) {
      const uint32_t exponent = std::max(amax[2 * g], amax[2 * g + 1]) >> 23, byte = exponent < 2 ? 0 : exponent - 2;
      bytes[g] = static_cast<uint8_t>(exponent == 0xFF ? 0xFF : byte);
      multiplier[2 * g] = multiplier[2 * g + 1] = float_of((254 - byte) << 23);
    }
    std::memcpy(q.scales + row * (blocks / 2) + at / 2, bytes, width / 2);
    encode(q, row, at, width, groups, multiplier);
  }
}

// Rows of whole blocks lie end to end in all arrays, so that a matrix of them may be taken as one row: no lane stays empty at its ends.
Quantize as_one_row(Quantize q) {
  if (q.k == q.kp && q.tile_rows == 1 && q.granularity != ROW) {
    q.k *= q.rows;
    q.kp *= q.rows;
    q.rows = std::min<int64_t>(q.rows, 1);
  }
  return q;
}

template <class Body>
void for_each_strip(const Quantize& q, const Body& body) {
  constexpr int64_t span = 512;
  const int64_t blocks = q.kp / 16, spans = std::max<int64_t>(1, (blocks + span - 1) / span);
  const int64_t groups = (q.rows + q.tile_rows - 1) / q.tile_rows;
  const int64_t elements = std::max<int64_t>(16 * std::min(blocks, span) * q.tile_rows, 1);
  parallel(q.matrices * groups * spans, std::max<int64_t>(1, 8192 / elements), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t matrix = item / (groups * spans), first = item / spans % groups * q.tile_rows, from = item % spans * span;
      body(Strip{matrix, matrix * q.rows + first, std::min(q.tile_rows, q.rows - first), from, std::min(blocks, from + span)});
    }
  });
}

// The scale of each matrix, its maximum taken in parts.
template <class Source>
void matrix_scales(const Quantize& q, TensorScale* out) {
  constexpr int64_t part = 16384;
  const int64_t count = q.rows * q.k, parts = q.granularity == TENSOR ? (count + part - 1) / part : 0;
  Scratch<float, 0> amax(q.matrices * parts);
  parallel(q.matrices * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t from = item % parts * part;
      const Source* x = static_cast<const Source*>(q.x) + item / parts * count + from;
      amax.data()[item] = finite_amax(x, std::min(part, count - from));
    }
  });
  for (int64_t i = 0; i < q.matrices; ++i) {
    float most = q.granularity == TENSOR ? 0.0f : static_cast<float>(q.static_amax);
    for (int64_t j = 0; j < parts; ++j) most = std::max(most, amax.data()[i * parts + j]);
    out[i] = tensor_scale(most, q);
  }
}

template <class Source>
void quantize(const Quantize& given) {
  const Quantize q = as_one_row(given);
  if (q.format == MXFP4) {
    std::fill(q.decode, q.decode + q.matrices, 1.0f);
    for_each_strip(q, [&](const Strip& strip) { quantize_mxfp4_strip<Source>(q, strip); });
  } else if (q.granularity == ROW) {
    parallel(q.matrices * q.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(q.k, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const TensorScale scale = tensor_scale(finite_amax(static_cast<const Source*>(q.x) + row * q.k, q.k), q);
        q.decode[row] = scale.decode;
        quantize_nvfp4_strip<Source>(q, Strip{0, row, 1, 0, q.kp / 16}, scale);
      }
    });
  } else {
    Scratch<TensorScale, 1> scales(q.matrices);
    matrix_scales<Source>(q, scales.data());
    for (int64_t i = 0; i < q.matrices; ++i) q.decode[i] = scales.data()[i].decode;
    for_each_strip(q, [&](const Strip& strip) { quantize_nvfp4_strip<Source>(q, strip, scales.data()[strip.matrix]); });
  }
}

}  // namespace
}  // namespace fp4

extern "C" void fp4_quantize(const fp4::Quantize* q) {
  q->x_kind == fp4::FLOAT32 ? fp4::quantize<float>(*q) : fp4::quantize<uint16_t>(*q);
}
