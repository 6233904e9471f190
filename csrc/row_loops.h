// Rows of floats between two products, over the vectors of one instruction set; rows.h says what they
// are. Whoever includes this file has included product_loops.h before.

inline F32 take(const float* p, int64_t count) {
  if (count >= LANES) return load_f32(p);
  alignas(64) float some[LANES] = {};
  memcpy(some, p, count * 4);
  return load_f32(some);
}

inline void put(float* p, F32 x, int64_t count) {
  if (count >= LANES) return store(p, x);
  alignas(64) float some[LANES];
  store(some, x);
  memcpy(p, some, count * 4);
}

// Of a tail: what it is multiplied by is then no denormal number, for which a CPU may take a hundred cycles.
constexpr float LOWEST_TAIL = -100.0f;

// x times the distribution function of the normal distribution, to 4e-7 and 4e-6 of it: Abramowitz and
// Stegun, Handbook of Mathematical Functions, 7.1.26.
inline F32 gelu(F32 x) {
  const F32 size = least(largest(x, minus(zeros(), x)), all(1e18f));  // infinity times 0 is none
  const F32 t = reciprocal(plus_product(all(1.0f), size, all(0.3275911f * 0.70710678f)));
  F32 y = plus_product(all(-1.453152027f), all(1.061405429f), t);
  y = plus_product(all(1.421413741f), y, t);
  y = plus_product(all(-0.284496736f), y, t);
  y = plus_product(all(0.254829592f), y, t);
  const F32 exponent = product(product(x, x), all(static_cast<float>(-0.5 * LOG2E)));
  const F32 tail = product(product(y, t), two_to(largest(exponent, all(LOWEST_TAIL))));
  return minus_product(largest(zeros(), x), product(size, all(0.5f)), tail);  // NaN stays
}

template <int FUNCTION>
inline void finish_row(const Rows& j, const float* from, int64_t row, float mean, float by) {
  const F32 inverse = all(static_cast<float>(j.inverse));
  const F32 low = all(static_cast<float>(j.low - j.zero)), high = all(static_cast<float>(j.high - j.zero));
  const I32 zero = integers(static_cast<int32_t>(j.zero));
  const F32 offset = all(static_cast<float>(j.offset));
  for (int64_t k = 0; k < j.size; k += LANES) {
    const int64_t left = j.size - k;
    F32 v = take(from + k, left);
    if (FUNCTION == LAYER_NORM) {
      v = product(minus(v, all(mean)), all(by));
      const F32 bias = j.bias ? take(j.bias + k, left) : zeros();
      v = plus_product(bias, v, j.weight ? take(j.weight + k, left) : all(1.0f));
    }
    if (FUNCTION == GELU) v = gelu(v);
    if (FUNCTION == RMS_NORM) {
      v = product(v, all(by));
      if (j.weight) v = product(v, plus(take(j.weight + k, left), offset));
    }
    if (j.y) put(j.y + row * j.size + k, v, left);
    if (!j.codes) continue;
    if (j.factors) v = product(v, take(j.factors + k, left));
    const I32 code = add(rounded(least(largest(product(v, inverse), low), high)), zero);
    uint8_t* at = j.codes + row * j.size + k;
    if (left >= LANES) {
      narrow(at, code);
    } else {
      uint8_t last[LANES];
      narrow(last, code);
      memcpy(at, last, left);
    }
  }
}

// Mean and 1 / deviation of a row in memory.
inline void moments(const float* x, int64_t size, double eps, float* mean, float* by) {
  F32 sums = zeros();
  const int64_t whole = size / LANES * LANES;
  for (int64_t k = 0; k < size; k += LANES) sums = plus(sums, take(x + k, size - k));
  *mean = total(sums) / static_cast<float>(size);
  F32 squares = zeros();
  for (int64_t k = 0; k < whole; k += LANES) {
    const F32 d = minus(load_f32(x + k), all(*mean));
    squares = plus_product(squares, d, d);
  }
  float rest = 0.0f;
  for (int64_t k = whole; k < size; k++) rest += (x[k] - *mean) * (x[k] - *mean);
  const double variance = (total(squares) + rest) / static_cast<double>(size);
  *by = static_cast<float>(1.0 / std::sqrt(variance + eps));
}

// 1 / root of the mean square of a row.
inline float of_squares(const float* x, int64_t size, double eps) {
  F32 squares = zeros();
  for (int64_t k = 0; k < size; k += LANES) {
    const F32 v = take(x + k, size - k);
    squares = plus_product(squares, v, v);
  }
  return static_cast<float>(1.0 / std::sqrt(total(squares) / static_cast<double>(size) + eps));
}

// Some rows, one after the other.
void finish_rows(const Rows& j, int64_t item, int64_t worker) {
  const int64_t begin = item * ROWS_OF_ITEM;
  const int64_t end = begin + ROWS_OF_ITEM < j.rows ? begin + ROWS_OF_ITEM : j.rows;
  for (int64_t row = begin; row < end; row++) {
    const float* x = j.x + row * j.size;
    if (j.more) {
      const float* more = j.more + row * j.size;
      float* sum = j.sum ? j.sum + row * j.size : j.scratch + worker * j.padded;
      for (int64_t k = 0; k < j.size; k += LANES)
        put(sum + k, plus(take(x + k, j.size - k), take(more + k, j.size - k)), j.size - k);
      x = sum;
    }
    float mean = 0.0f, by = 1.0f;
    if (j.function == LAYER_NORM) {
      moments(x, j.size, j.eps, &mean, &by);
      finish_row<LAYER_NORM>(j, x, row, mean, by);
    } else if (j.function == RMS_NORM) {
      finish_row<RMS_NORM>(j, x, row, mean, of_squares(x, j.size, j.eps));
    } else if (j.function == GELU) {
      finish_row<GELU>(j, x, row, mean, by);
    } else {
      finish_row<NONE>(j, x, row, mean, by);
    }
  }
}
