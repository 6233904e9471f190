// Linear layers between two known grids, over the vectors of one instruction set; static.h says what they
// are. Whoever includes this file has included recurrent_loops.h before.

// Packs a weight, [out, in], and sums up what inputs of -zero give.
void pack_weight(const int8_t* weight, int64_t out, int64_t in, int64_t zero, uint8_t* packed, int32_t* first) {
  Operand o = {};
  o.data = weight, o.element = INT8, o.of_row = in;
  pack_columns(o, 0, 0, out, in, packed, nullptr);
  column_sums(packed, (out + LANES - 1) / LANES, groups_of(in), in, 0, static_cast<int32_t>(-zero), first);
}

template <int FUNCTION>
inline F32 function_of(F32 x, F32 low, F32 high) {
  switch (FUNCTION) {
    case CLAMP: return least(high, largest(low, x));  // NaN stays
    case LEAKY_RELU: return plus_product(largest(zeros(), x), least(zeros(), x), low);  // NaN stays
    case ERF_GELU: return gelu(x);
    case TANH_GELU: {  // x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
      const F32 inner = plus_product(all(1.0f), product(x, x), all(0.044715f));
      return product(x, sigmoid(product(product(x, inner), all(1.5957691216f))));
    }
    case SWISH: return product(x, sigmoid(x));
    case TANH_FUNCTION: return tanh_of(x);
    case HARD_SWISH: {
      const F32 gate = least(largest(plus(x, all(3.0f)), zeros()), all(6.0f));
      return product(product(x, gate), all(1.0f / 6.0f));
    }
    default: return x;
  }
}

// What 16 sums become. Without a function or factors between, that is one product and a sum: the grid of y
// is part of the scale, of the bias and of the ends between which it lies.
template <bool REAL>
struct Ending {
  F32 low, high;
  I32 zero;
  float by;

  Ending(const Static& j, bool clamps) {
    by = static_cast<float>(REAL ? 1.0 : j.inverse);
    double least_value = clamps ? j.low * by : -INFINITY, most_value = clamps ? j.high * by : INFINITY;
    if (!REAL) {
      least_value = least_value > -j.zero ? least_value : -j.zero;
      most_value = most_value < 255 - j.zero ? most_value : 255 - j.zero;
    }
    low = all(static_cast<float>(least_value)), high = all(static_cast<float>(most_value));
    zero = integers(static_cast<int32_t>(j.zero));
  }

  void put_values(const Static& j, int64_t at, F32 v, int64_t count) const {
    v = REAL ? least(high, largest(low, v)) : least(largest(v, low), high);  // NaN stays, or is `low`
    if (REAL)
      put(static_cast<float*>(j.y) + at, v, count);
    else if (count >= LANES)
      narrow(static_cast<uint8_t*>(j.y) + at, add(rounded(v), zero));
    else
      narrow_some(static_cast<uint8_t*>(j.y) + at, add(rounded(v), zero), count);
  }
};

// A tile whose sums stay in registers; `row` and `n` are its first row and output, of `outs`.
template <bool REAL, int M, int N>
inline void ended_tile(const Static& j, const Ending<REAL>& ending, const uint8_t* left, int64_t left_bytes,
                       const uint8_t* right, int64_t groups, int64_t row, int64_t n0, int64_t outs, Ahead& ahead) {
  I32 sums[M][N];
  UNROLL
  for (int n = 0; n < N; n++)
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = load_i32(j.first + n0 + n * LANES);
  add_and_fetch<M, N>(sums, left, left_bytes, right, groups * 64, groups, ahead);
  UNROLL
  for (int n = 0; n < N; n++) {
    const int64_t at = n0 + n * LANES, count = outs - n * LANES;
    const F32 scale = product(take(j.scale + at, count), all(static_cast<float>(j.x_scale) * ending.by));
    const F32 bias = j.bias ? product(take(j.bias + at, count), all(ending.by)) : zeros();
    UNROLL
    for (int m = 0; m < M; m++)
      ending.put_values(j, (row + m) * j.out + at, plus_product(bias, to_float(sums[m][n]), scale), count);
  }
}

template <bool REAL, int M>
inline void ended_rows(const Static& j, const Ending<REAL>& ending, const uint8_t* left, int64_t left_bytes,
                       const uint8_t* right, int64_t groups, int64_t row, int64_t n, int64_t outs, Ahead& ahead) {
  int64_t k = 0;
  for (; k + (TILE_COLUMNS - 1) * LANES < outs; k += TILE_COLUMNS * LANES)
    ended_tile<REAL, M, TILE_COLUMNS>(j, ending, left, left_bytes, right + k / LANES * groups * 64, groups, row,
                                      n + k, outs - k, ahead);
  for (; k < outs; k += LANES)
    ended_tile<REAL, M, 1>(j, ending, left, left_bytes, right + k / LANES * groups * 64, groups, row, n + k,
                           outs - k, ahead);
}

template <bool REAL>
inline void ended_product(const Static& j, int64_t rows, const uint8_t* left, int64_t left_bytes,
                          const uint8_t* right, int64_t groups, int64_t row, int64_t n, int64_t outs, Ahead& ahead) {
  const Ending<REAL> ending(j, j.function == CLAMP);
  in_tiles(rows, [&](auto tile, int64_t m) {
    ended_rows<REAL, tile()>(j, ending, left + m * left_bytes, left_bytes, right, groups, row + m, n, outs, ahead);
  });
}

// A row of sums that go through a function, from output `n` on.
template <bool REAL, int FUNCTION>
inline void finish_outputs(const Static& j, const int32_t* sums, int64_t row, int64_t n, int64_t count) {
  const Ending<REAL> ending(j, false);
  const F32 x_scale = all(static_cast<float>(j.x_scale)), by = all(ending.by);
  const F32 low = all(static_cast<float>(j.low)), high = all(static_cast<float>(j.high));
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t left = count - k;
    const F32 scale = product(take(j.scale + n + k, left), x_scale);
    const F32 bias = j.bias ? take(j.bias + n + k, left) : zeros();
    F32 v = function_of<FUNCTION>(plus_product(bias, to_float(load_i32(sums + k)), scale), low, high);
    if (!REAL) v = product(v, j.factors ? product(take(j.factors + n + k, left), by) : by);
    ending.put_values(j, row * j.out + n + k, v, left);
  }
}

template <bool REAL>
inline void finish_outputs(const Static& j, const int32_t* sums, int64_t row, int64_t n, int64_t count) {
  switch (j.function) {
    case NO_FUNCTION: return finish_outputs<REAL, NO_FUNCTION>(j, sums, row, n, count);
    case CLAMP: return finish_outputs<REAL, CLAMP>(j, sums, row, n, count);
    case LEAKY_RELU: return finish_outputs<REAL, LEAKY_RELU>(j, sums, row, n, count);
    case ERF_GELU: return finish_outputs<REAL, ERF_GELU>(j, sums, row, n, count);
    case TANH_GELU: return finish_outputs<REAL, TANH_GELU>(j, sums, row, n, count);
    case SWISH: return finish_outputs<REAL, SWISH>(j, sums, row, n, count);
    case TANH_FUNCTION: return finish_outputs<REAL, TANH_FUNCTION>(j, sums, row, n, count);
    default: return finish_outputs<REAL, HARD_SWISH>(j, sums, row, n, count);
  }
}

// Some rows of a tile times a block of outputs.
template <bool REAL>
inline void static_rows(const Static& j, int64_t rows, const uint8_t* left, int64_t bytes, int64_t row, int64_t n,
                        int64_t outs, int32_t* sums, Ahead& ahead) {
  const int64_t groups = groups_of(j.in), blocks = (outs + LANES - 1) / LANES;
  const uint8_t* packed = j.packed + n / LANES * groups * 64;
  if ((j.function == NO_FUNCTION || j.function == CLAMP) && !j.factors)
    return ended_product<REAL>(j, rows, left, bytes, packed, groups, row, n, outs, ahead);
  product_of(rows, left, bytes, packed, groups * 64, groups, blocks, j.first + n, sums, blocks * LANES, &ahead);
  for (int64_t r = 0; r < rows; r++) finish_outputs<REAL>(j, sums + r * blocks * LANES, row + r, n, outs);
}

// A block of outputs of a block of rows, a tile of rows after the other. Blocks of rows of the same outputs
// follow one another, so that their weights stay in a core's cache.
void compute_static(const Static& j, int64_t item, int64_t worker) {
  const int64_t n = item / j.row_blocks * j.block, begin = item % j.row_blocks * BLOCK_ROWS;
  const int64_t end = begin + BLOCK_ROWS < j.rows ? begin + BLOCK_ROWS : j.rows;
  const int64_t outs = n + j.block < j.out ? j.block : j.out - n;
  const int64_t bytes = j.left_bytes ? j.left_bytes : j.in;
  uint8_t* copy = j.scratch + worker * j.scratch_bytes;
  auto* sums = reinterpret_cast<int32_t*>(copy + TILE_ROWS * j.left_bytes);
  const int64_t groups = groups_of(j.in), blocks = (outs + LANES - 1) / LANES;
  const int64_t next = n + j.ahead / (groups * 64) * LANES;  // the first of the outputs that come next
  const int64_t following = j.ahead && next < j.out ? (j.out - next < outs ? j.out - next : outs) : 0;
  Ahead ahead(j.packed + n / LANES * groups * 64 + j.ahead, (following + LANES - 1) / LANES * groups * 64,
              (end - begin) / PRODUCT_ROWS * (blocks / TILE_COLUMNS) * groups);
  for (int64_t m = begin; m < end; m += TILE_ROWS) {
    const int64_t rows = end - m < TILE_ROWS ? end - m : TILE_ROWS;
    const uint8_t* left = j.x + m * j.in;
    if (j.left_bytes) {
      for (int64_t r = 0; r < rows; r++) take_left(left + r * j.in, 0, j.in, bytes, copy + r * bytes);
      left = copy;
    }
    if (j.is_float)
      static_rows<true>(j, rows, left, bytes, m, n, outs, sums, ahead);
    else
      static_rows<false>(j, rows, left, bytes, m, n, outs, sums, ahead);
  }
}
