// The loops of rounding.h, over the vectors of one instruction set. Whoever includes this file has
// defined what product_loops.h wants.

// Numbers up to 2^22 get rounded to integers, halves to even, when this is added and taken off again.
constexpr float HALF_EVEN = 12582912.0f;

template <bool MULTIPLIES>
inline void round_some(const float* RESTRICT x, float* RESTRICT y, int64_t count, float by, float scale,
                       float low, float high) {
  for (int64_t i = 0; i < count; i++) {
    float v = MULTIPLIES ? x[i] * by : x[i] / by;
    v = low > v ? low : v;  // NaN stays
    v = high < v ? high : v;
    y[i] = ((v + HALF_EVEN) - HALF_EVEN) * scale;
  }
}

template <typename Each>
inline void for_pieces(const Rounding& j, int64_t item, Each each) {
  const int64_t all = j.blocks * j.pieces, first = item * j.units;
  for (int64_t u = first; u < first + j.units && u < all; u++) {
    const int64_t b = u / j.pieces, start = u % j.pieces * j.piece, rest = j.block - start;
    each(u, b, b * j.block + start, rest < j.piece ? rest : j.piece);
  }
}

inline void round_to_grid(const Rounding& j, int64_t item, int64_t) {
  for_pieces(j, item, [&](int64_t, int64_t b, int64_t at, int64_t count) {
    const float scale = j.scale[b], zero = static_cast<float>(j.zero[b]);
    const float low = j.low - zero, high = j.high - zero;
    if (j.multiplies)
      round_some<true>(j.x + at, j.y + at, count, 1.0f / scale, scale, low, high);
    else
      round_some<false>(j.x + at, j.y + at, count, scale, scale, low, high);
  });
}

// The gradient inside of the range, and 0 outside; and sums over a piece:
//   inside   grad * (rounded - x),   outside   grad * rounded   and   grad.
inline void gradient_some(const float* RESTRICT grad, const float* RESTRICT x,
                          const float* RESTRICT rounded, float* RESTRICT grad_x, int64_t count, float low,
                          float high, float* sums) {
  F32 inner = zeros(), outer = zeros(), ends = zeros();
  const F32 from = all(low), to = all(high), none = zeros();
  for (int64_t i = 0; i < count; i += LANES) {
    alignas(64) float some[4][LANES] = {};
    const bool whole = count - i >= LANES;
    const size_t rest = whole ? 0 : static_cast<size_t>(count - i) * 4;
    if (!whole) memcpy(some[0], grad + i, rest), memcpy(some[1], x + i, rest), memcpy(some[2], rounded + i, rest);
    const F32 g = load_f32(whole ? grad + i : some[0]), v = load_f32(whole ? x + i : some[1]);
    const F32 r = load_f32(whole ? rounded + i : some[2]);
    const F32 inside = pick_between(v, from, to, g, none), outside = pick_between(v, from, to, none, g);
    inner = plus_product(inner, inside, pick_between(v, from, to, minus(r, v), none));
    outer = plus_product(outer, outside, r);
    ends = plus(ends, outside);
    store(whole ? grad_x + i : some[3], inside);
    if (!whole) memcpy(grad_x + i, some[3], rest);
  }
  sums[0] = total(inner), sums[1] = total(outer), sums[2] = total(ends);
}

inline void gradient_of_grid(const Rounding& j, int64_t item, int64_t) {
  for_pieces(j, item, [&](int64_t u, int64_t b, int64_t at, int64_t count) {
    const float zero = static_cast<float>(j.zero[b]);
    const float one = (j.low - zero) * j.scale[b], other = (j.high - zero) * j.scale[b];
    gradient_some(j.grad + at, j.x + at, j.rounded + at, j.grad_x + at, count, one < other ? one : other,
                  one < other ? other : one, j.sums + u * SUMS);
  });
}
