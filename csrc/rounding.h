// Rounding to a grid of integers while training, and what its gradients are made of.
//
// A tensor is a number of blocks that lie one behind the other, each with a scale and a zero point.
// Blocks are cut into pieces, so that sums do not depend on threads.
#pragma once

#include "kernels.h"

namespace torch_quant {

struct Rounding {
  const float* x;       // [blocks, block]
  const float* scale;   // [blocks]; may be negative
  const int32_t* zero;  // [blocks]: the code of 0
  float low, high;      // the ends of the codes
  int64_t blocks, block;
  int64_t pieces, piece;  // of a block, and elements of one
  int64_t units;          // pieces that one thread takes at a time
  // Forward.
  float* y;        // [blocks, block]
  int multiplies;  // x times 1 / scale, in the place of x / scale
  // Backward.
  const float* grad;     // of the loss, with respect to what was rounded
  const float* rounded;  // [blocks, block]
  float* grad_x;         // [blocks, block]
  float* sums;           // [blocks * pieces, SUMS]
};

constexpr int SUMS = 3;

}  // namespace torch_quant
