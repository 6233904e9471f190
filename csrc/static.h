// Linear layers between two grids that are known: unsigned codes of 8 bits in, int8 weights with a scale for
// each output, codes or floats out, with a function between.
//
//   sums[m, n] = sum over k of (x[m, k] - zero) * w[n, k]
//   v          = f(sums * x_scale * scale[n] + bias[n])
//   y          = v, or v * factors[n] / y_scale + y_zero, rounded, halves to even
//
// Weights are packed as the right matrix of a product is (product.h), once for each layer. What the zero
// point adds up to is a constant of each output, and is where its sum begins.
#pragma once

#include "product.h"

namespace torch_quant {

enum Between : int64_t {
  NO_FUNCTION = 0, CLAMP = 1, LEAKY_RELU = 2, ERF_GELU = 3, TANH_GELU = 4, SWISH = 5, TANH_FUNCTION = 6,
  HARD_SWISH = 7,
};

// As the caller gives it: all members have 8 bytes. Tensors are contiguous.
struct StaticCall {
  const uint8_t* packed;          // by `pack_weight`
  const int32_t* first;           // [wide]: the sums of inputs that are all the code of 0
  const float* scale;             // [out]
  const float* bias;              // [out], or null
  const float* factors;           // likewise, for codes
  int64_t in, out, function, is_float;
  double x_scale, inverse;        // `inverse` of the scale of y
  double low, high;               // of CLAMP; the slope of LEAKY_RELU is `low`
  int64_t zero;                   // of y, whose codes are 0 to 255
};

struct Static : StaticCall {
  const uint8_t* x;               // [rows, in]
  void* y;                        // [rows, out], of uint8 or float32
  int64_t rows;
  int64_t block, blocks;          // outputs of an item, a multiple of 16; and how many there are
  int64_t row_blocks;
  int64_t ahead;                  // bytes of packed weights to those that a worker takes next; 0: they are not fetched
  int64_t left_bytes;             // of a row whose numbers are copied, 0 where they are read in place
  uint8_t* scratch;               // [threads, scratch_bytes]
  int64_t scratch_bytes;          // the rows and the sums of a tile
};

}  // namespace torch_quant
