// Dynamic int8 products of many rows, over the vectors of one instruction set. A block of the weight is
// packed as the right matrix of a product is (product.h), which pays where some ten rows meet it; the
// numbers are those of `multiply_dynamic`. Whoever includes this file has included static_loops.h before.

// A tile whose sums stay in registers; `slot` and `n0` are its first rounded row and output, of `outs`.
template <int M, int N>
inline void dynamic_tile(const Dynamic& j, const uint8_t* right, int64_t groups, const int32_t* of_weights,
                         int64_t slot, int64_t row, int64_t n0, int64_t outs, Ahead& ahead) {
  I32 sums[M][N];
  UNROLL
  for (int n = 0; n < N; n++)
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = zero();
  add_and_fetch<M, N>(sums, j.codes + slot * j.padded, j.padded, right, groups * 64, groups, ahead);
  UNROLL
  for (int n = 0; n < N; n++) {
    const int64_t at = n0 + n * LANES, count = outs - n * LANES;
    const I32 ones = load_i32(of_weights + n * LANES);
    const F32 scale = take(j.scale + at, count), bias = j.bias ? take(j.bias + at, count) : zeros();
    UNROLL
    for (int m = 0; m < M; m++) {
      const F32 y = dynamic_value(j, sums[m][n], ones, slot + m, scale);
      put(j.y + (row + m) * j.out + at, j.bias ? plus(y, bias) : y, count);
    }
  }
}

// `rows` rounded rows, the first of which is `row`, times outputs from `n` on. The weights of the block that is
// next are fetched meanwhile, some bytes with each group of inputs.
void multiply_packed(const Dynamic& j, int64_t row, int64_t rows, int64_t n, int64_t outs, uint8_t* room) {
  const int64_t groups = groups_of(j.in), blocks = (outs + LANES - 1) / LANES;
  auto* of_weights = reinterpret_cast<int32_t*>(room + blocks * groups * 64);
  pack_weight(j.weight + n * j.in, outs, j.in, -1, room, of_weights);
  const int64_t left = j.out - n - j.ahead;
  Ahead ahead(j.weight + (n + (left > 0 ? j.ahead : 0)) * j.in, (left < outs ? left : outs) * j.in,
              rows / PRODUCT_ROWS * (blocks / TILE_COLUMNS) * groups);
  in_tiles(rows, [&](auto tile, int64_t m) {
    constexpr int64_t wide = TILE_COLUMNS * LANES;
    int64_t k = 0;
    for (; k + wide - LANES < outs; k += wide)
      dynamic_tile<tile(), TILE_COLUMNS>(j, room + k * groups * 4, groups, of_weights + k, m, row + m, n + k, outs - k,
                                         ahead);
    for (; k < outs; k += LANES)
      dynamic_tile<tile(), 1>(j, room + k * groups * 4, groups, of_weights + k, m, row + m, n + k, outs - k, ahead);
  });
}

template <int FUNCTION>
inline void pass_through(const Dynamic& j, int64_t row, int64_t rows, int64_t n, int64_t outs) {
  const F32 low = all(j.low), high = all(j.high);
  for (int64_t m = row; m < row + rows; m++)
    for (int64_t k = 0; k < outs; k += LANES) {
      float* at = j.y + m * j.out + n + k;
      put(at, function_of<FUNCTION>(take(at, outs - k), low, high), outs - k);
    }
}

// Puts what was multiplied through the function of the layer.
void apply_function(const Dynamic& j, int64_t row, int64_t rows, int64_t n, int64_t outs) {
  switch (j.function) {
    case CLAMP: return pass_through<CLAMP>(j, row, rows, n, outs);
    case LEAKY_RELU: return pass_through<LEAKY_RELU>(j, row, rows, n, outs);
    case ERF_GELU: return pass_through<ERF_GELU>(j, row, rows, n, outs);
    case TANH_GELU: return pass_through<TANH_GELU>(j, row, rows, n, outs);
    case SWISH: return pass_through<SWISH>(j, row, rows, n, outs);
    case TANH_FUNCTION: return pass_through<TANH_FUNCTION>(j, row, rows, n, outs);
    case HARD_SWISH: return pass_through<HARD_SWISH>(j, row, rows, n, outs);
    default: return;
  }
}
