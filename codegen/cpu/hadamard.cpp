// The random Hadamard transform with the additions of codegen/reference/hadamard.py in the same order.
#include "transpose.h"

namespace fp4 {
namespace {

constexpr uint32_t SIGN_MASK = 0xD7E8;  // bit i: element i mod 16 is negated

void store(const float* in, int64_t count, float* out) { std::memcpy(out, in, count * sizeof(float)); }
void store(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i]);
}

void butterfly(float* a, float* b) {
  for (int lane = 0; lane < 16; ++lane) {
    const float sum = a[lane] + b[lane], difference = a[lane] - b[lane];
    a[lane] = sum;
    b[lane] = difference;
  }
}

// Signs and the strides below 16, groups of 16 elements as lanes; turned back into row order.
void rotate_groups(float (&x)[16][16], float (&y)[16][16]) {
  for (int e = 0; e < 16; ++e) {
    const float sign = SIGN_MASK >> e & 1 ? -1.0f : 1.0f;
    for (int g = 0; g < 16; ++g) x[e][g] = x[e][g] * sign;
  }
  for (int stride = 1; stride < 16; stride *= 2) {
    for (int e = 0; e < 16; ++e) {
      if ((e & stride) == 0) butterfly(x[e], x[e + stride]);
    }
  }
  transpose(reinterpret_cast<const float*>(&x), y);
}

template <class Value>
void rotate(const Value* x, Value* out, int64_t rows, int64_t k, int64_t kp, int64_t size) {
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
  parallel(rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(kp, 1)), [=](int64_t begin, int64_t end) {
    float groups[16][16], y[16][16];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = 0; at < kp; at += 256) {
        transpose_row(x + row * k, at, k, groups);
        rotate_groups(groups, y);
        for (int stride = 1; stride < size / 16; stride *= 2) {
          for (int g = 0; g < 16; ++g) {
            if ((g & stride) == 0) butterfly(y[g], y[g + stride]);
          }
        }
        for (auto& group : y) {
          for (float& value : group) value = value * norm;
        }
        store(reinterpret_cast<const float*>(&y), std::min<int64_t>(256, kp - at), out + row * kp + at);
      }
    }
  });
}

}  // namespace
}  // namespace fp4

// Rows of k elements to rows of kp, k padded with zeros to a multiple of `size` (16 to 128); kind is FLOAT32 or BFLOAT16.
extern "C" void fp4_hadamard(const void* x, void* out, int64_t kind, int64_t rows, int64_t k, int64_t kp, int64_t size) {
  if (kind == fp4::FLOAT32) {
    fp4::rotate(static_cast<const float*>(x), static_cast<float*>(out), rows, k, kp, size);
  } else {
    fp4::rotate(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(out), rows, k, kp, size);
  }
}
