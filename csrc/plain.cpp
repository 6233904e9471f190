// No instructions but those of any CPU: a vector is an array.
#include "gate.h"
#include "product.h"
#include "recurrent.h"
#include "rounding.h"
#include "rows.h"
#include "static.h"

namespace torch_quant {
namespace {

constexpr int MR = 1, NR = 1;
struct U8 {
  uint8_t at[64];
};
struct I32 {
  int32_t at[LANES];
};
struct F32 {
  float at[LANES];
};

inline U8 load(const void* p) {
  U8 x;
  memcpy(&x, p, 64);
  return x;
}
inline U8 load_some(const void* p, int64_t count) {
  U8 x = {};
  if (count > 0) memcpy(&x, p, count < 64 ? count : 64);
  return x;
}
inline U8 bytes(int value) {
  U8 x;
  for (int i = 0; i < 64; i++) x.at[i] = static_cast<uint8_t>(value);
  return x;
}
inline void prefetch(const void*) {}
inline I32 zero() { return {}; }
inline F32 zeros() { return {}; }
inline F32 all(float value) {
  F32 x;
  for (int l = 0; l < LANES; l++) x.at[l] = value;
  return x;
}
inline I32 load_i32(const void* p) {
  I32 x;
  memcpy(&x, p, 64);
  return x;
}
inline F32 load_f32(const float* p) {
  F32 x;
  memcpy(&x, p, 64);
  return x;
}
inline void store(float* p, I32 x) { memcpy(p, &x, 64); }
inline void store(float* p, F32 x) { memcpy(p, &x, 64); }
// Sums and products of integers wrap around, as those of vector instructions do.
inline I32 add(I32 x, I32 y) {
  for (int l = 0; l < LANES; l++)
    x.at[l] = static_cast<int32_t>(static_cast<uint32_t>(x.at[l]) + static_cast<uint32_t>(y.at[l]));
  return x;
}
inline I32 times(I32 x, int y) {
  for (int l = 0; l < LANES; l++)
    x.at[l] = static_cast<int32_t>(static_cast<uint32_t>(x.at[l]) * static_cast<uint32_t>(y));
  return x;
}
inline I32 times128(I32 x) { return times(x, 128); }
inline F32 to_float(I32 x) {
  F32 y;
  for (int l = 0; l < LANES; l++) y.at[l] = static_cast<float>(x.at[l]);
  return y;
}
inline F32 product(F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] *= y.at[l];
  return x;
}
inline F32 plus_product(F32 sum, F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) sum.at[l] += x.at[l] * y.at[l];
  return sum;
}
inline F32 minus_product(F32 sum, F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) sum.at[l] -= x.at[l] * y.at[l];
  return sum;
}

template <bool SMALL>
inline I32 dot(I32 sum, const U8& u, const U8& s) {
  for (int l = 0; l < LANES; l++)
    for (int i = 4 * l; i < 4 * l + 4; i++)
      sum.at[l] += static_cast<int32_t>(u.at[i]) * static_cast<int8_t>(s.at[i]);
  return sum;
}

template <int PLANES>
inline U8 plane(U8 raw, int p, const U8& flip) {
  for (int i = 0; i < 64; i++)
    raw.at[i] = PLANES == 1 ? raw.at[i] ^ flip.at[i]
                            : (raw.at[i] >> (p * 8 / PLANES)) & (PLANES == 2 ? 15 : 3);
  return raw;
}

struct Spread {
  const int32_t* index;
  int64_t known;
};
inline Spread spread_of(const int32_t* index, int64_t known) { return {index, known}; }
template <typename T>
inline F32 spread(const T* x, Spread by) {
  F32 y;
  for (int l = 0; l < LANES; l++) y.at[l] = by.index[l] < by.known ? x[by.index[l]] : 0;
  return y;
}

inline float total(F32 x) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) x.at[l] += x.at[l + half];
  return x.at[0];
}
template <typename Vector, typename T>
inline void four_totals(Vector a, Vector b, Vector c, Vector d, T* y) {
  y[0] = total(a), y[1] = total(b), y[2] = total(c), y[3] = total(d);
}
inline int32_t total(I32 x) {
  int32_t sum = 0;
  for (int l = 0; l < LANES; l++) sum += x.at[l];
  return sum;
}

// For products of activations.
constexpr int DEPTH = 2, PRODUCT_ROWS = 4, TILE_COLUMNS = 1;
using Lanes = int64_t;

inline I32 integers(int32_t value) {
  I32 x;
  for (int l = 0; l < LANES; l++) x.at[l] = value;
  return x;
}
inline U8 spread_word(uint32_t value) {
  U8 x;
  for (int l = 0; l < LANES; l++) memcpy(x.at + 4 * l, &value, 4);
  return x;
}
inline I32 dot_numbers(I32 sum, const U8& x, const U8& y) {
  int16_t p[2 * LANES], q[2 * LANES];
  memcpy(p, &x, 64), memcpy(q, &y, 64);
  for (int l = 0; l < LANES; l++)
    sum.at[l] += static_cast<int32_t>(p[2 * l]) * q[2 * l] + static_cast<int32_t>(p[2 * l + 1]) * q[2 * l + 1];
  return sum;
}
inline F32 plus(F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] += y.at[l];
  return x;
}
inline F32 minus(F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] -= y.at[l];
  return x;
}
inline F32 reciprocal(F32 x) {
  for (int l = 0; l < LANES; l++) x.at[l] = 1.0f / x.at[l];
  return x;
}
// Of something that is no number, the second is taken, as by vector instructions.
inline I32 largest(I32 x, I32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] = x.at[l] > y.at[l] ? x.at[l] : y.at[l];
  return x;
}
inline F32 largest(F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] = x.at[l] > y.at[l] ? x.at[l] : y.at[l];
  return x;
}
inline F32 least(F32 x, F32 y) {
  for (int l = 0; l < LANES; l++) x.at[l] = x.at[l] < y.at[l] ? x.at[l] : y.at[l];
  return x;
}
inline I32 as_bits(F32 x) {
  I32 y;
  memcpy(&y, &x, 64);
  return y;
}
inline F32 from_bits(I32 x) {
  F32 y;
  memcpy(&y, &x, 64);
  return y;
}
// The nearest integers, halves to even, of |x| < 2^22.
inline I32 rounded(F32 x) {
  I32 y = as_bits(plus(x, all(12582912.0f)));
  for (int l = 0; l < LANES; l++) y.at[l] -= 0x4B400000;
  return y;
}
inline I32 shifted23(I32 x) {
  for (int l = 0; l < LANES; l++) x.at[l] = static_cast<int32_t>(static_cast<uint32_t>(x.at[l]) << 23);
  return x;
}
template <typename Vector>
inline auto highest(const Vector& x) -> decltype(x.at[0] + 0) {
  auto most = x.at[0];
  for (int l = 1; l < LANES; l++) most = x.at[l] > most ? x.at[l] : most;
  return most;
}
// 16 rows of 16 words, each `row` bytes behind the last one, as 16 columns one after the other.
inline void turn_words(const uint8_t* x, int64_t row, const U8& flip, uint8_t* out) {
  for (int64_t i = 0; i < 16; i++)
    for (int64_t k = 0; k < 64; k++)
      out[k / 4 * 64 + i * 4 + k % 4] = static_cast<uint8_t>(x[i * row + k] ^ flip.at[k]);
}
inline Lanes first_lanes(int64_t n) { return n; }
template <typename Vector>
inline Vector pick(Lanes lanes, Vector yes, const Vector& no) {
  for (int l = 0; l < LANES; l++)
    if (l >= lanes) yes.at[l] = no.at[l];
  return yes;
}
// `yes` where low <= x <= high, else `no`; NaN is not between.
inline F32 pick_between(const F32& x, const F32& low, const F32& high, F32 yes, const F32& no) {
  for (int l = 0; l < LANES; l++)
    yes.at[l] = (x.at[l] >= low.at[l]) & (x.at[l] <= high.at[l]) ? yes.at[l] : no.at[l];
  return yes;
}
inline F32 where_set(const uint8_t* p, F32 yes, F32 no) {
  for (int l = 0; l < LANES; l++)
    if (!p[l]) yes.at[l] = no.at[l];
  return yes;
}
template <typename T>
inline void narrow(T* p, const I32& x) {
  for (int l = 0; l < LANES; l++) p[l] = static_cast<T>(x.at[l]);
}
inline void narrow_some(uint8_t* p, const I32& x, int64_t count) {
  for (int64_t l = 0; l < count; l++) p[l] = static_cast<uint8_t>(x.at[l]);
}

#include "loops.h"
#include "product_loops.h"
#include "rounding_loops.h"
#include "row_loops.h"
#include "dynamic_tiles.h"
#include "recurrent_loops.h"
#include "static_loops.h"
#include "dynamic_loops.h"
#include "gate_loops.h"

}  // namespace

const Kernels plain_kernels = {"plain", round, multiply, round_dynamic, multiply_dynamic,
                               DEPTH, pack_product, compute_product, finish_rows,
                               round_to_grid, gradient_of_grid, run_steps, pack_weight,
                               compute_static, multiply_packed, apply_function, gate};

}  // namespace torch_quant
