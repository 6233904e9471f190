// Dynamic int8 products of a few rows, over the vectors of one instruction set: the weight is read as it is saved.
// Whoever includes this file has included row_loops.h before.

// The integers of `choose_qparams` and `quantize` in torch_quant/ops/qdq.py.
void round_dynamic(const Dynamic& j, int64_t row, int64_t slot) {
  const float* RESTRICT x = j.x + row * j.in;
  uint8_t* RESTRICT codes = j.codes + slot * j.padded;
  const int64_t in = j.in, padded = j.padded;
  // The order of floats is that of their bits, negative ones turned around.
  int32_t low = 0, high = 0, most = 0;
  for (int64_t k = 0; k < in; k++) {
    int32_t bits;
    memcpy(&bits, x + k, 4);
    const int32_t size = bits & 0x7fffffff;
    const int32_t negative = bits < 0 ? size : 0, positive = bits < 0 ? 0 : size;
    low = negative > low ? negative : low;
    high = positive > high ? positive : high;
    most = size > most ? size : most;
  }
  float lowest, highest, largest;
  memcpy(&lowest, &low, 4);
  memcpy(&highest, &high, 4);
  memcpy(&largest, &most, 4);
  float scale = j.is_signed ? largest / 127.0f : highest / 255.0f + lowest / 255.0f;
  if (largest == 0.0f || scale == 0.0f)
    scale = 1.0f;
  else if (scale < 0x1p-48f)
    scale = 0x1p-48f;
  int32_t zero_point = 128;
  if (!j.is_signed && most < 0x7f800000) {
    const float place = lowest / scale;
    zero_point = place >= 255.0f ? 255 : nearest(place);
  }
  j.zeros[slot] = zero_point;
  j.scales[slot] = most < 0x7f800000 ? scale : NOT_A_NUMBER;
  if (most >= 0x7f800000) {
    memset(codes, 0, padded);
    return;
  }
  for (int64_t k = 0; k < in; k++) {
    const int32_t q = nearest(x[k] / scale) + zero_point;
    codes[k] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
  }
  memset(codes + in, 0, padded - in);
}

constexpr int64_t DYNAMIC_OUTS = 128;  // outputs whose sums are kept

// 16 sums of a row as floats, without the bias.
inline F32 dynamic_value(const Dynamic& j, I32 sum, I32 of_weights, int64_t slot, F32 scale) {
  return product(to_float(add(sum, times(of_weights, -j.zeros[slot]))), product(all(j.scales[slot]), scale));
}

// A row of sums, from output `n` on, as floats.
inline void finish_dynamic(const Dynamic& j, const int32_t* sums, const int32_t* of_weights, int64_t slot,
                           int64_t row, int64_t n, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t left = count - k;
    F32 y = dynamic_value(j, load_i32(sums + k), load_i32(of_weights + k), slot, take(j.scale + n + k, left));
    if (j.bias) y = plus(y, take(j.bias + n + k, left));
    put(j.y + row * j.out + n + k, y, left);
  }
}

// Adds 64 inputs to the sums; those of the weights themselves are made with the FIRST rows.
template <bool FIRST, bool TAIL, int M, int N>
inline void add_inputs(const Dynamic& j, const uint8_t* codes, const int8_t* weight, int64_t k,
                       int64_t distance, I32 (&sums)[M][N], I32 (&ones)[N]) {
  U8 rows[M];
  UNROLL
  for (int m = 0; m < M; m++) rows[m] = load(codes + m * j.padded + k);
  UNROLL
  for (int n = 0; n < N; n++) {
    const int8_t* at = weight + n * j.in + k;
    const U8 w = TAIL ? load_some(at, j.in - k) : load(at);
    if (FIRST) {
      prefetch(at + distance);
      ones[n] = dot<false>(ones[n], bytes(1), w);
    }
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = dot<false>(sums[m][n], rows[m], w);
  }
}

template <bool FIRST, int M, int N>
inline void dynamic_tile(const Dynamic& j, int64_t slot, int64_t n0, int32_t* of_weights, int32_t* found) {
  I32 sums[M][N], ones[N];
  UNROLL
  for (int n = 0; n < N; n++) {
    ones[n] = zero();
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = zero();
  }
  const uint8_t* codes = j.codes + slot * j.padded;
  const int8_t* weight = j.weight + n0 * j.in;
  const int64_t tile_bytes = N * j.in, distance = (4096 / tile_bytes + 1) * tile_bytes;
  int64_t k = 0;
  for (; k + 64 <= j.in; k += 64)
    add_inputs<FIRST, false, M, N>(j, codes, weight, k, distance, sums, ones);
  if (k < j.in) add_inputs<FIRST, true, M, N>(j, codes, weight, k, distance, sums, ones);
  if (FIRST) totals<N>(ones, of_weights);
  UNROLL
  for (int m = 0; m < M; m++) totals<N>(sums[m], found + m * DYNAMIC_OUTS);
}

// Some rows times outputs from `n` to `end`, DYNAMIC_OUTS at most. A vector is read of what `of_weights` has last.
template <bool FIRST, int M>
inline void dynamic_tiles(const Dynamic& j, int64_t slot, int64_t row, int64_t n, int64_t end,
                          int32_t* of_weights) {
  alignas(64) int32_t found[M * DYNAMIC_OUTS];
  int64_t k = n;
  for (; k + NR <= end; k += NR) dynamic_tile<FIRST, M, NR>(j, slot, k, of_weights + (k - n), found + (k - n));
  for (; k < end; k++) dynamic_tile<FIRST, M, 1>(j, slot, k, of_weights + (k - n), found + (k - n));
  for (int m = 0; m < M; m++)
    finish_dynamic(j, found + m * DYNAMIC_OUTS, of_weights, slot + m, row + m, n, end - n);
}

template <int M>
inline int64_t dynamic_rows(const Dynamic& j, int64_t m, int64_t row, int64_t rows, int64_t n,
                            int64_t end, int32_t* of_weights) {
  if (!m && M <= rows) {
    dynamic_tiles<true, M>(j, m, row, n, end, of_weights);
    m = M;
  }
  for (; m + M <= rows; m += M) dynamic_tiles<false, M>(j, m, row + m, n, end, of_weights);
  return m;
}

void multiply_dynamic(const Dynamic& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  alignas(64) int32_t of_weights[DYNAMIC_OUTS];
  for (int64_t n = out; n < out + outs; n += DYNAMIC_OUTS) {
    const int64_t end = n + DYNAMIC_OUTS < out + outs ? n + DYNAMIC_OUTS : out + outs;
    int64_t m = dynamic_rows<MR>(j, 0, row, rows, n, end, of_weights);
    if (MR > 2) m = dynamic_rows<2>(j, m, row, rows, n, end, of_weights);
    dynamic_rows<1>(j, m, row, rows, n, end, of_weights);
  }
}
