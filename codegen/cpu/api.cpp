// The C entry points that launch.py calls, and the epilogue that every product shares.
#include "common.h"

namespace fp4 {

ParallelFor torch_parallel_for = nullptr;
const E4m3Table E4M3;

void store_row(const Product& p, const float* acc, int64_t row, int64_t first, int64_t count) {
  float value[64];
  const float left = p.a_global ? p.a_global[p.a_global_per_row ? row : 0] : 1.0f;
  if (p.b_global && p.b_global_per_row) {
    for (int64_t j = 0; j < count; ++j) value[j] = acc[j] * (left * p.b_global[first + j]);
  } else {
    const float alpha = left * (p.b_global ? *p.b_global : 1.0f);
    for (int64_t j = 0; j < count; ++j) value[j] = acc[j] * alpha;
  }
  if (p.bias && p.bias_kind == BFLOAT16) {
    const uint16_t* bias = static_cast<const uint16_t*>(p.bias) + first;
    for (int64_t j = 0; j < count; ++j) value[j] = value[j] + from_bf16(bias[j]);
  } else if (p.bias) {
    const float* bias = static_cast<const float*>(p.bias) + first;
    for (int64_t j = 0; j < count; ++j) value[j] = value[j] + bias[j];
  }
  const int64_t at = row * p.n + first;
  if (p.out_kind == BFLOAT16) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + at;
    for (int64_t j = 0; j < count; ++j) out[j] = to_bf16(value[j]);
  } else {
    std::memcpy(static_cast<float*>(p.out) + at, value, count * sizeof(float));
  }
}

}  // namespace fp4

using namespace fp4;

extern "C" {

void fp4_use_threads_of_torch(ParallelFor function) { torch_parallel_for = function; }

// 2: 512-bit vectors with bf16 dot products, 1: other vectors, 0: plain C++.
int fp4_vector_level() {
#if defined(FP4_AVX512_BF16)
  return 2;
#elif defined(FP4_AVX512) || defined(FP4_AVX2)
  return 1;
#else
  return 0;
#endif
}

// Returns 0 when done, 1 when this build has no kernel for so many rows.
int fp4_scaled_mm(const Product* product) {
  Product p = *product;
  const bool has_many = fp4_vector_level() == 2 && p.a_kind != FLOAT32;
  if (p.m > FEW_ROWS && !has_many) return 1;
  const bool coded = p.a_kind == NVFP4 || p.a_kind == MXFP4;
  Scratch<uint16_t, 0> decoded(coded ? p.m * p.k : 0);
  if (coded) {
    dequantize_rows(static_cast<const uint8_t*>(p.a), p.a_scales, p.a_kind, p.m, p.a_stride, p.k, decoded.data(), p.k, BFLOAT16);
    p.a = decoded.data();
    p.a_kind = BFLOAT16;
    p.a_stride = p.k;
  }
  has_many && p.m > FEW_ROWS_BESIDE_MANY ? product_of_many_rows(p) : product_of_few_rows(p);
  return 0;
}

void fp4_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t kind, int64_t rows, int64_t kp, int64_t k, float* out) {
  dequantize_rows(codes, scales, static_cast<Kind>(kind), rows, kp, k, out, k, FLOAT32);
}
}
