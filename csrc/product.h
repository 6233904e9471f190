// Integer products of two activations: scaled dot-product attention, and matrices in a batch.
//
//   y = softmax(scale Q K' + mask) V
//
// with Q, K, V and the softmax as unsigned codes of 8 bits. Of each code its zero point is subtracted;
// of what a product adds up, parts that do not depend on the code are taken out of the sum:
//
//   sum (p - z)(r - w) = sum p r  -  w sum p  -  z sum (r - w)
//
// The left matrix (Q, the probabilities) is read row by row. The right one (K', V) is packed:
//
//   [16 columns each][depth / DEPTH][16][DEPTH]
//
// so that 64 bytes are DEPTH numbers for 16 columns, a lane each; DEPTH numbers of a row of the left
// matrix are 4 bytes, which meet all lanes. Kernels with VNNI take 4 numbers of 8 bits, others 2 of 16.
// Whatever a matrix has no whole lanes of is filled with zeros.
//
// Probabilities may have a scale for each row, from 0 to the largest. That of exponentials is 1, so
// their codes are those of the exponentials, and the row of the result is divided by their sum.
//
// All keys of a row are met before its softmax is rounded, since that wants the sum of all.
#pragma once

#include <type_traits>

#include "kernels.h"

#if TORCH_QUANT_X86
#include <emmintrin.h>
#endif

namespace torch_quant {

constexpr int TILE_ROWS = 8;       // rows of a tile, at most
constexpr int64_t BLOCK_ROWS = 64;  // rows that a thread takes at a time

enum Element : int64_t { UINT8 = 0, INT8 = 1, FLOAT32 = 2 };

// A matrix for each batch and head: element (b, h, row, column) is at data[b * of_batch + h * of_head +
// row * of_row + column]. Codes are x * inverse + zero, from `low` to `high`; floats that are read are
// rounded to such.
struct Operand {
  const void* data;
  int64_t element;
  int64_t of_batch, of_head, of_row;
  double inverse;  // of the scale
  int64_t zero, low, high;
};

// As the caller gives it: all members have 8 bytes.
struct ProductCall {
  Operand left, right, values, y;  // Q, K, V and the result; without a softmax there are no values
  const void* mask;                // of bool or float32 (`element`), broadcast by strides of 0
  int64_t mask_element, mask_of_batch, mask_of_head, mask_of_row;
  int64_t batch, heads, groups;    // heads / groups of them share a right matrix and values
  int64_t rows, columns, depth, features;  // queries, keys, sizes of a key and of a value
  int64_t by_column;               // the right matrix is given as columns (keys), else as rows
  int64_t causal;
  double scale;                    // of the integer sums of the first product
  double y_scale;                  // of the integer sums that are the result
  double p_inverse;                // of the scale of the probabilities; 0: each row has its own
  int64_t p_zero, p_high;
};

// What a kernel needs beside that.
struct Product : ProductCall {
  bool softmax;
  int64_t member;                 // heads of a group
  int64_t left_bytes;             // of a row of the left matrix, rounded
  int64_t wide, wide_features;    // columns and features, up to a multiple of 16
  int64_t p_bytes;                // of a row of probabilities, rounded
  int64_t packed_right, packed_values, packed_group;  // bytes of each, and of both with their sums
  int64_t row_blocks;             // of a group
  int64_t first_group;            // of this slab
  uint8_t* packed;                // [slab, packed_group]
  uint8_t* scratch;               // [threads, scratch_bytes]
  int64_t scratch_bytes;
};

}  // namespace torch_quant
