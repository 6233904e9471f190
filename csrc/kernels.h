// Linear layers with integer weights: what the kernels of every instruction set share.
//
// Weights lie as they are saved, row-major [out, bytes of a row], codes along the inputs from the low
// bits of a byte to the high ones. They are never rearranged. Activations are, while they are rounded:
// in the order in which shifts and masks take the codes out of 64 bytes.
//
// A 64-byte vector of codes is 16 lanes of 4 bytes, and a lane is the dot product of neighbouring
// inputs. A block of inputs that shares a scale is a number of whole lanes, so scales are vectors too:
//
//   y[m, n] = sum over chunks c and lanes l of
//             (sum of (u - z) * q in the lane) * weight_scale[n, c, l] * x_scale[m, c, l]
//
// with the weight's codes u >= 0, their zero points z and the activations' signed codes q.
#pragma once

// Before any line that asks for instructions of a newer CPU: nothing of these may use them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace torch_quant {

constexpr int LANES = 16;

// How 64 bytes of weights hold codes, and how activations are rounded for them.
enum Layout : int {
  BITS2 = 0,        // 4 codes a byte
  BITS4 = 1,        // 2 codes a byte
  BITS8 = 2,        // 1 code a byte, a scale for at least 128 inputs
  BITS8_FINE = 3,   // 1 code a byte, a scale for fewer
};

struct Linear {
  // Arguments, row-major and contiguous.
  const float* x;             // [rows, in]
  const uint8_t* weight;      // [out, row_bytes]
  const float* scale;         // [out, groups]
  const uint8_t* zero_points; // [out, groups], or null where all are `zero` or floats
  const float* zeros;         // [out, groups]: zero points that are floats, or null
  const float* bias;          // [out], or null
  float* y;                   // [rows, out]
  int64_t rows, in, out, row_bytes, groups, group;
  int layout;
  int flip;  // 128 where bytes are signed: u = byte ^ 128
  int zero;
  // Made once for each call.
  int64_t chunks, chunk, record;  // chunks of so many inputs, bytes of one chunk of activations
  int grouped;                    // whether a chunk may have several groups
  const int32_t* first;           // [chunks]: the group of a chunk's first input
  const int32_t* offset;          // [chunks, LANES]: how many groups later a lane's inputs are
  int even;                       // groups in a chunk, if chunks are made of whole ones, else 0:
                                  // then all rows of `offset` are the first, and only that is there
  uint8_t* activations;           // [slab, chunks, record]
};

// int8 activations with a scale for each row, int8 weights with one for each output.
struct Dynamic {
  const float* x;        // [rows, in]
  const int8_t* weight;  // [out, in]
  const float* scale;    // [out]
  const float* bias;     // [out], or null
  float* y;              // [rows, out]
  int64_t rows, in, out;
  int is_signed;         // activations are -128 to 127 and their zero point is 0
  int64_t function;      // behind the products: `Between` of static.h
  float low, high;       // its arguments, as there
  int64_t padded;        // `in`, up to a multiple of 64
  int64_t ahead;         // outputs between a block that is packed and the one that its worker takes next
  uint8_t* codes;        // [slab, padded]
  float* scales;         // [slab]
  int32_t* zeros;        // [slab]
};

// One of several layers that read one x, as the caller gives it: all members have 8 bytes.
struct DynamicLayer {
  const int8_t* weight;
  const float *scale, *bias;
  float* y;
  int64_t out, function;
  double low, high;
};

struct Product;   // of activations: product.h
struct Rounding;  // to a grid, in training: rounding.h
struct Rows;      // of floats: rows.h
struct Gate;      // floats of two products that meet: gate.h
struct Recurrent;  // layers: recurrent.h
struct Static;    // linear layers between known grids: static.h

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*round)(const Linear&, int64_t row, int64_t slot);
  void (*multiply)(const Linear&, int64_t row, int64_t rows, int64_t out, int64_t outs);
  void (*round_dynamic)(const Dynamic&, int64_t row, int64_t slot);
  void (*multiply_dynamic)(const Dynamic&, int64_t row, int64_t rows, int64_t out, int64_t outs);
  int depth;  // numbers of a product of activations that are multiplied together
  void (*pack_product)(const Product&, int64_t slot, int64_t worker);
  void (*compute_product)(const Product&, int64_t item, int64_t worker);
  void (*finish_rows)(const Rows&, int64_t item, int64_t worker);
  void (*round_to_grid)(const Rounding&, int64_t item, int64_t worker);
  void (*gradient_of_grid)(const Rounding&, int64_t item, int64_t worker);
  void (*run_steps)(const Recurrent&, int64_t item, int64_t worker);
  void (*pack_weight)(const int8_t* weight, int64_t out, int64_t in, int64_t zero, uint8_t* packed,
                      int32_t* first);
  void (*compute_static)(const Static&, int64_t item, int64_t worker);
  void (*multiply_packed)(const Dynamic&, int64_t row, int64_t rows, int64_t out, int64_t outs, uint8_t* room);
  void (*apply_function)(const Dynamic&, int64_t row, int64_t rows, int64_t out, int64_t outs);
  void (*gate)(const Gate&, int64_t item, int64_t worker);
};

extern const Kernels plain_kernels;
#if defined(__x86_64__) || defined(_M_X64)
#define TORCH_QUANT_X86 1
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512vnni_kernels;
#endif

struct Shape {
  int loads;   // 64-byte vectors of weights in a chunk
  int planes;  // codes in a byte
  int terms;   // int8 numbers that make up the code of an activation
  int block;   // inputs whose activations share a scale
  constexpr int vectors() const { return loads * planes; }
  constexpr int chunk() const { return vectors() * 64; }
  // Codes, the scale of each lane, and what each lane subtracts for the zero point.
  constexpr int record() const { return terms * vectors() * 64 + LANES * 8; }
};

constexpr Shape shape_of(int layout) {
  return layout == BITS2   ? Shape{1, 4, 1, 32}
         : layout == BITS4 ? Shape{1, 2, 1, 32}
         : layout == BITS8 ? Shape{2, 1, 2, 128}
                           : Shape{1, 1, 2, 32};
}

}  // namespace torch_quant
