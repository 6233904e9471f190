// Rows of floats between two products: added, normalized, put through a function and rounded in one pass.
//
//   s = x + more                        where something is added
//   v = (s - mean s) / sqrt(var s + eps) * weight + bias, or f(s), or s,
//       or s / sqrt(mean s^2 + eps) * (weight + offset)
//   code = v * factor / scale + zero    rounded, halves to even, where codes are asked for
#pragma once

#include "kernels.h"

namespace torch_quant {

enum Function : int64_t { NONE = 0, LAYER_NORM = 1, GELU = 2, RMS_NORM = 3 };

// As the caller gives it: all members have 8 bytes. Tensors are contiguous.
struct RowsCall {
  const float* x;                 // [rows, size]
  const float* more;              // [rows, size], or null
  const float *weight, *bias;     // [size], or null
  const float* factors;           // [size], or null
  float* sum;                     // [rows, size]: where s is written, or null
  float* y;                       // [rows, size]: where v is written, or null
  uint8_t* codes;                 // [rows, size], or null
  int64_t rows, size, function;
  double eps;
  double inverse;                 // of the scale
  int64_t zero, low, high;
};

struct Rows : RowsCall {
  float* scratch;                 // [threads, padded]
  int64_t padded;                 // `size`, up to a multiple of 16
  double offset;                  // of the weight of an RMS norm
};

constexpr int64_t ROWS_OF_ITEM = 8;

}  // namespace torch_quant
