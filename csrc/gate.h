// Floats of two products that meet before a third: gate = f(gate) * up.
#pragma once

#include "static.h"

namespace torch_quant {

struct Gate {
  float* gate;      // [size], and the result
  const float* up;  // [size], or null for f(gate) alone
  int64_t size, function;  // of Between; CLAMP is from 0 on
};

constexpr int64_t FLOATS_OF_ITEM = 8192;  // a multiple of 16

}  // namespace torch_quant
