// The loops of the kernels, over the vectors of one instruction set. Whoever includes this file has
// defined, in a namespace of its own: U8 (64 bytes), I32 and F32 (16 numbers) and what is done with
// them, and how many rows (MR) and outputs (NR) a tile has.

#if defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL
#endif

constexpr float NOT_A_NUMBER = __builtin_nanf("");

// The nearest integer, halves to even, of |x| < 2^22: addition rounds to the last bit of 1.5 * 2^23.
inline int32_t nearest(float x) {
  const float moved = x + 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &moved, 4);
  return bits - 0x4B400000;
}

inline int32_t magnitude(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

// One chunk of one row of activations: `given` numbers and zeros up to the whole chunk.
template <int LAYOUT>
inline void round_chunk(const float* x, int64_t given, uint8_t* record, const Linear& j) {
  constexpr Shape S = shape_of(LAYOUT);
  constexpr int CHUNK = S.chunk(), BLOCK = S.block, PER_LANE = CHUNK / LANES;
  constexpr float LIMIT = S.terms == 1 ? 127.0f : 16256.0f;
  alignas(64) float padded[CHUNK];
  if (given < CHUNK) {
    for (int64_t k = 0; k < CHUNK; k++) padded[k] = k < given ? x[k] : 0.0f;
    x = padded;
  }
  alignas(64) int32_t q[CHUNK];
  float* scales = reinterpret_cast<float*>(record + S.terms * S.vectors() * 64);
  for (int b = 0; b < CHUNK / BLOCK; b++) {
    int32_t most = 0;
    for (int k = 0; k < BLOCK; k++) {
      const int32_t size = magnitude(x[b * BLOCK + k]);
      most = size > most ? size : most;
    }
    float largest, scale = 0.0f, inverse = 0.0f;
    __builtin_memcpy(&largest, &most, 4);
    if (most >= 0x7f800000) {
      scale = NOT_A_NUMBER;  // the whole row becomes that
    } else if (largest > 0x1p-100f) {
      scale = largest / LIMIT;
      inverse = LIMIT / largest;
    }
    if (inverse != 0.0f) {
      for (int k = 0; k < BLOCK; k++) q[b * BLOCK + k] = nearest(x[b * BLOCK + k] * inverse);
    } else {
      for (int k = 0; k < BLOCK; k++) q[b * BLOCK + k] = 0;
    }
    for (int l = b * BLOCK / PER_LANE; l < (b + 1) * BLOCK / PER_LANE; l++) scales[l] = scale;
  }
  int8_t* codes = reinterpret_cast<int8_t*>(record);
  for (int load = 0; load < S.loads; load++)
    for (int p = 0; p < S.planes; p++) {
      int8_t* out = codes + (load * S.planes + p) * 64;
      const int32_t* in = q + load * 64 * S.planes + p;
      if (S.terms == 1) {
        for (int i = 0; i < 64; i++) out[i] = static_cast<int8_t>(in[i * S.planes]);
      } else {
        int8_t* high = out + S.vectors() * 64;
        for (int i = 0; i < 64; i++) {
          const int32_t h = (in[i * S.planes] + 64) >> 7;
          high[i] = static_cast<int8_t>(h);
          out[i] = static_cast<int8_t>(in[i * S.planes] - (h << 7));
        }
      }
    }
  I32 sums = zero();
  UNROLL
  for (int v = 0; v < S.vectors(); v++) sums = dot<true>(sums, bytes(1), load(codes + v * 64));
  if (S.terms == 2) {
    I32 high = zero();
    UNROLL
    for (int v = 0; v < S.vectors(); v++)
      high = dot<true>(high, bytes(1), load(codes + (S.vectors() + v) * 64));
    sums = add(sums, times128(high));
  }
  if (j.zero_points)
    store(scales + LANES, to_float(sums));
  else
    store(scales + LANES, times(sums, -j.zero));
}

template <int LAYOUT>
inline void round_row(const Linear& j, int64_t row, int64_t slot) {
  const float* x = j.x + row * j.in;
  uint8_t* record = j.activations + slot * j.chunks * j.record;
  for (int64_t c = 0; c < j.chunks; c++) {
    const int64_t left = j.in - c * j.chunk;
    round_chunk<LAYOUT>(x + c * j.chunk, left < j.chunk ? left : j.chunk, record, j);
    record += j.record;
  }
}

void round(const Linear& j, int64_t row, int64_t slot) {
  switch (j.layout) {
    case BITS2: return round_row<BITS2>(j, row, slot);
    case BITS4: return round_row<BITS4>(j, row, slot);
    case BITS8: return round_row<BITS8>(j, row, slot);
    default: return round_row<BITS8_FINE>(j, row, slot);
  }
}

// A tile of rows m and outputs n: chunks `c` to `end`, the last of which may be cut off.
template <int LAYOUT, bool GROUPED, bool AFFINE, int M, int N>
inline void tile(const Linear& j, const uint8_t* activations, int64_t n0, float* y, bool ahead) {
  constexpr Shape S = shape_of(LAYOUT);
  constexpr int V = S.vectors();
  constexpr bool SMALL = S.planes > 1;
  F32 sums[M][N];
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int n = 0; n < N; n++) sums[m][n] = zeros();
  const uint8_t* weight = j.weight + n0 * j.row_bytes;
  const float* scale = j.scale + n0 * j.groups;
  const int64_t stride = j.chunks * j.record;
  const U8 flip = bytes(j.flip);
  // The lines that later tiles read: at least 4 kB from here.
  const int64_t tile_bytes = N * j.row_bytes;
  const int64_t distance = ahead ? (4096 / tile_bytes + 1) * tile_bytes : 0;
  for (int64_t c = 0; c < j.chunks; c++) {
    const uint8_t* record = activations + c * j.record;
    const int64_t at = c * S.loads * 64, left = j.row_bytes - at, group = j.first[c];
    UNROLL
    for (int n = 0; n < N; n++) {
      const uint8_t* w = weight + n * j.row_bytes + at;
      U8 u[V];
      UNROLL
      for (int i = 0; i < S.loads; i++) {
        const U8 raw = left >= 64 * (i + 1) ? load(w + i * 64) : load_some(w + i * 64, left - i * 64);
        if (distance) prefetch(w + i * 64 + distance);
        UNROLL
        for (int p = 0; p < S.planes; p++) u[i * S.planes + p] = plane<S.planes>(raw, p, flip);
      }
      F32 by, z;
      if (GROUPED) {
        const int64_t known = j.groups - group;
        by = spread(scale + n * j.groups + group, known, j.offset + c * LANES);
        if (AFFINE)
          z = spread_bytes(j.zero_points + (n0 + n) * j.groups + group, known, j.offset + c * LANES);
      } else {
        by = all(scale[n * j.groups + group]);
        if (AFFINE) z = all(static_cast<float>(j.zero_points[(n0 + n) * j.groups + group]));
      }
      UNROLL
      for (int m = 0; m < M; m++) {
        const uint8_t* a = record + m * stride;
        const float* scales = reinterpret_cast<const float*>(a + S.terms * V * 64);
        I32 sum = AFFINE ? zero() : load_i32(scales + LANES);
        UNROLL
        for (int v = 0; v < V; v++) sum = dot<SMALL>(sum, u[v], load(a + v * 64));
        if (S.terms == 2) {
          I32 high = zero();
          UNROLL
          for (int v = 0; v < V; v++) high = dot<SMALL>(high, u[v], load(a + (V + v) * 64));
          sum = add(sum, times128(high));
        }
        F32 real = to_float(sum);
        if (AFFINE) real = minus_product(real, z, load_f32(scales + LANES));
        sums[m][n] = plus_product(sums[m][n], real, product(load_f32(scales), by));
      }
    }
  }
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int n = 0; n < N; n++)
      y[m * j.out + n] = total(sums[m][n]) + (j.bias ? j.bias[n0 + n] : 0.0f);
}

template <int LAYOUT, bool GROUPED, bool AFFINE, int M>
inline void tiles(const Linear& j, const uint8_t* a, int64_t row, int64_t n, int64_t end, bool first) {
  float* y = j.y + row * j.out;
  for (; n + NR <= end; n += NR) tile<LAYOUT, GROUPED, AFFINE, M, NR>(j, a, n, y + n, first);
  for (; n < end; n++) tile<LAYOUT, GROUPED, AFFINE, M, 1>(j, a, n, y + n, first);
}

template <int LAYOUT, bool GROUPED, bool AFFINE>
void multiply_as(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  const int64_t stride = j.chunks * j.record;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    tiles<LAYOUT, GROUPED, AFFINE, MR>(j, j.activations + m * stride, row + m, out, out + outs, !m);
  if (MR > 2)
    for (; m + 2 <= rows; m += 2)
      tiles<LAYOUT, GROUPED, AFFINE, 2>(j, j.activations + m * stride, row + m, out, out + outs, !m);
  for (; m < rows; m++)
    tiles<LAYOUT, GROUPED, AFFINE, 1>(j, j.activations + m * stride, row + m, out, out + outs, !m);
}

template <int LAYOUT, bool GROUPED>
void multiply_in(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  if (j.zero_points) return multiply_as<LAYOUT, GROUPED, true>(j, row, rows, out, outs);
  return multiply_as<LAYOUT, GROUPED, false>(j, row, rows, out, outs);
}

// Rows from `row` on, whose activations begin at slot 0, times outputs from `out` on.
void multiply(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  const bool grouped = j.groups > 1 && j.group % j.chunk;
  if (j.layout == BITS2) {
    if (grouped) return multiply_in<BITS2, true>(j, row, rows, out, outs);
    return multiply_in<BITS2, false>(j, row, rows, out, outs);
  }
  if (j.layout == BITS4) {
    if (grouped) return multiply_in<BITS4, true>(j, row, rows, out, outs);
    return multiply_in<BITS4, false>(j, row, rows, out, outs);
  }
  if (j.layout == BITS8) return multiply_in<BITS8, false>(j, row, rows, out, outs);
  return multiply_in<BITS8_FINE, true>(j, row, rows, out, outs);
}

// Dynamic int8: the integers of `choose_qparams` and `quantize` in torch_quant/ops/qdq.py.

void round_dynamic(const Dynamic& j, int64_t row, int64_t slot) {
  const float* x = j.x + row * j.in;
  uint8_t* codes = j.codes + slot * j.padded;
  // The order of floats is that of their bits, negative ones turned around.
  int32_t low = 0, high = 0, most = 0;
  for (int64_t k = 0; k < j.in; k++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + k, 4);
    const int32_t size = bits & 0x7fffffff;
    const int32_t negative = bits < 0 ? size : 0, positive = bits < 0 ? 0 : size;
    low = negative > low ? negative : low;
    high = positive > high ? positive : high;
    most = size > most ? size : most;
  }
  float lowest, highest, largest;
  __builtin_memcpy(&lowest, &low, 4);
  __builtin_memcpy(&highest, &high, 4);
  __builtin_memcpy(&largest, &most, 4);
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
    __builtin_memset(codes, 0, j.padded);
    return;
  }
  for (int64_t k = 0; k < j.in; k++) {
    const int32_t q = nearest(x[k] / scale) + zero_point;
    codes[k] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
  }
  __builtin_memset(codes + j.in, 0, j.padded - j.in);
}

template <int M, int N>
inline void dynamic_tile(const Dynamic& j, int64_t slot, int64_t n0, int32_t* totals, bool first,
                         float* y) {
  I32 sums[M][N], ones[N];
  UNROLL
  for (int n = 0; n < N; n++) {
    ones[n] = zero();
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = zero();
  }
  const uint8_t* codes = j.codes + slot * j.padded;
  const int8_t* weight = j.weight + n0 * j.in;
  const int64_t tile_bytes = N * j.in;
  const int64_t distance = first ? (4096 / tile_bytes + 1) * tile_bytes : 0;
  for (int64_t k = 0; k < j.padded; k += 64) {
    UNROLL
    for (int n = 0; n < N; n++) {
      const int8_t* at = weight + n * j.in + k;
      const U8 w = k + 64 <= j.in ? load(at) : load_some(at, j.in - k);
      if (distance) {
        prefetch(at + distance);
        ones[n] = dot<false>(ones[n], bytes(1), w);
      }
      UNROLL
      for (int m = 0; m < M; m++)
        sums[m][n] = dot<false>(sums[m][n], load(codes + m * j.padded + k), w);
    }
  }
  UNROLL
  for (int n = 0; n < N; n++) {
    if (first) totals[n] = total(ones[n]);
    UNROLL
    for (int m = 0; m < M; m++) {
      const int32_t sum = total(sums[m][n]) - j.zeros[slot + m] * totals[n];
      const float scale = j.scales[slot + m] * j.scale[n0 + n];
      y[m * j.out + n] = static_cast<float>(sum) * scale + (j.bias ? j.bias[n0 + n] : 0.0f);
    }
  }
}

template <int M>
inline void dynamic_tiles(const Dynamic& j, int64_t slot, int64_t row, int64_t n, int64_t end,
                          int32_t* totals) {
  float* y = j.y + row * j.out;
  const int64_t begin = n;
  for (; n + NR <= end; n += NR)
    dynamic_tile<M, NR>(j, slot, n, totals + (n - begin), !slot, y + n);
  for (; n < end; n++) dynamic_tile<M, 1>(j, slot, n, totals + (n - begin), !slot, y + n);
}

void multiply_dynamic(const Dynamic& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  constexpr int MOST = 128;  // outputs at a time
  int32_t totals[MOST];
  for (int64_t n = out; n < out + outs; n += MOST) {
    const int64_t end = n + MOST < out + outs ? n + MOST : out + outs;
    int64_t m = 0;
    for (; m + MR <= rows; m += MR) dynamic_tiles<MR>(j, m, row + m, n, end, totals);
    if (MR > 2)
      for (; m + 2 <= rows; m += 2) dynamic_tiles<2>(j, m, row + m, n, end, totals);
    for (; m < rows; m++) dynamic_tiles<1>(j, m, row + m, n, end, totals);
  }
}
