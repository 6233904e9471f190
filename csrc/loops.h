// The loops of the kernels, over the vectors of one instruction set. Whoever includes this file has
// defined, in a namespace of its own: U8 (64 bytes), I32 and F32 (16 numbers) and what is done with
// them, and how many rows (MR) and outputs (NR) a tile has.

#if defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 8")
#define RESTRICT __restrict__
#else
#define UNROLL
#define RESTRICT __restrict
#endif

// Has the compiler read again what lies there, which takes no register.
template <typename T>
inline void in_memory(T*& place) {
#if defined(__GNUC__)
  __asm__ volatile("" : "+r"(place) : : "memory");
#endif
}

// The totals of N vectors.
template <int N, typename Vector, typename T>
inline void totals(const Vector (&x)[N], T* y) {
  if (N == 4) return four_totals(x[0], x[1 % N], x[2 % N], x[3 % N], y);
  UNROLL
  for (int n = 0; n < N; n++) y[n] = total(x[n]);
}

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// The nearest integer, halves to even, of |x| < 2^22: addition rounds to the last bit of 1.5 * 2^23.
inline int32_t nearest(float x) {
  const float moved = x + 12582912.0f;
  int32_t bits;
  memcpy(&bits, &moved, 4);
  return bits - 0x4B400000;
}

inline int32_t magnitude(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
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
    memcpy(&largest, &most, 4);
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
          out[i] = static_cast<int8_t>(in[i * S.planes] - h * 128);
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
  if (j.zero_points || j.zeros)
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

// What zero points are: one for all, bytes, or floats.
enum Zeros : int { SAME = 0, BYTES = 1, FLOATS = 2 };

// What a tile of rows m and outputs n reads.
struct Tile {
  const uint8_t* activations;
  const uint8_t* weight;
  const float* scale;
  const uint8_t* zero_points;
  const float* zeros;
  int64_t stride;               // bytes from one row of activations to the next
  int64_t distance, scales_on;  // how far ahead a later tile reads; 0 if that is in cache already
};

// Adds one chunk to the sums; TAIL if the weights end inside of it.
template <int LAYOUT, bool GROUPED, int ZEROS, bool TAIL, int M, int N>
inline void add_chunk(const Linear& j, const Tile& t, int64_t c, Spread lanes, F32 (&sums)[M][N]) {
  constexpr Shape S = shape_of(LAYOUT);
  constexpr int V = S.vectors();
  constexpr bool SMALL = S.planes > 1;
  const int64_t at = c * S.loads * 64, group = j.first[c];
  const U8 flip = bytes(j.flip);
  if (GROUPED && !j.even) lanes = spread_of(j.offset + c * LANES, j.groups - group);
  if (GROUPED && TAIL && j.even) lanes = spread_of(j.offset, j.groups - group);
  U8 u[N][V];
  F32 by[N], z[N];
  UNROLL
  for (int n = 0; n < N; n++) {
    const uint8_t* w = t.weight + n * j.row_bytes + at;
    UNROLL
    for (int i = 0; i < S.loads; i++) {
      const U8 raw = TAIL ? load_some(w + i * 64, j.row_bytes - at - i * 64) : load(w + i * 64);
      if (t.distance) prefetch(w + i * 64 + t.distance);
      UNROLL
      for (int p = 0; p < S.planes; p++) u[n][i * S.planes + p] = plane<S.planes>(raw, p, flip);
    }
    const float* scale = t.scale + n * j.groups + group;
    const int64_t place = n * j.groups + group;
    if (t.distance && (GROUPED || c % 8 == 0)) prefetch(scale + t.scales_on);
    by[n] = GROUPED ? spread(scale, lanes) : all(*scale);
    if (ZEROS == BYTES)
      z[n] = GROUPED ? spread(t.zero_points + place, lanes) : all(t.zero_points[place]);
    if (ZEROS == FLOATS) z[n] = GROUPED ? spread(t.zeros + place, lanes) : all(t.zeros[place]);
  }
  const F32* near = by;
  if (M > 1) in_memory(near);
  const uint8_t* a = t.activations + c * S.record();
  UNROLL
  for (int m = 0; m < M; m++) {
    const float* scales = reinterpret_cast<const float*>(a + S.terms * V * 64);
    UNROLL
    for (int n = 0; n < N; n++) {
      I32 sum = ZEROS == SAME ? load_i32(scales + LANES) : zero();
      UNROLL
      for (int v = 0; v < V; v++) sum = dot<SMALL>(sum, u[n][v], load(a + v * 64));
      if (S.terms == 2) {
        I32 high = zero();
        UNROLL
        for (int v = 0; v < V; v++) high = dot<SMALL>(high, u[n][v], load(a + (V + v) * 64));
        sum = add(sum, times128(high));
      }
      F32 real = to_float(sum);
      if (ZEROS != SAME) real = minus_product(real, z[n], load_f32(scales + LANES));
      sums[m][n] = plus_product(sums[m][n], real, product(load_f32(scales), near[n]));
    }
    a += t.stride;
    if (M > 1) in_memory(near);
  }
}

template <int LAYOUT, bool GROUPED, int ZEROS, int M, int N>
inline void tile(const Linear& j, const uint8_t* activations, int64_t n0, float* y, bool ahead) {
  F32 sums[M][N];
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int n = 0; n < N; n++) sums[m][n] = zeros();
  // At least 4 kB from here.
  const int64_t tile_bytes = N * j.row_bytes, later = 4096 / tile_bytes + 1;
  const Tile t = {activations,
                  j.weight + n0 * j.row_bytes,
                  j.scale + n0 * j.groups,
                  ZEROS == BYTES ? j.zero_points + n0 * j.groups : nullptr,
                  ZEROS == FLOATS ? j.zeros + n0 * j.groups : nullptr,
                  j.chunks * j.record,
                  ahead ? later * tile_bytes : 0,
                  later * N * j.groups};
  const int64_t whole = j.row_bytes / (shape_of(LAYOUT).loads * 64);
  const Spread lanes = spread_of(j.offset, j.even);
  for (int64_t c = 0; c < whole; c++)
    add_chunk<LAYOUT, GROUPED, ZEROS, false, M, N>(j, t, c, lanes, sums);
  if (whole < j.chunks) add_chunk<LAYOUT, GROUPED, ZEROS, true, M, N>(j, t, whole, lanes, sums);
  UNROLL
  for (int m = 0; m < M; m++) {
    totals<N>(sums[m], y + m * j.out);
    if (j.bias)
      for (int n = 0; n < N; n++) y[m * j.out + n] += j.bias[n0 + n];
  }
}

template <int LAYOUT, bool GROUPED, int ZEROS, int M>
inline void tiles(const Linear& j, const uint8_t* a, int64_t row, int64_t n, int64_t end, bool first) {
  float* y = j.y + row * j.out;
  for (; n + NR <= end; n += NR) tile<LAYOUT, GROUPED, ZEROS, M, NR>(j, a, n, y + n, first);
  for (; n < end; n++) tile<LAYOUT, GROUPED, ZEROS, M, 1>(j, a, n, y + n, first);
}

template <int LAYOUT, bool GROUPED, int ZEROS>
void multiply_as(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  const int64_t stride = j.chunks * j.record;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    tiles<LAYOUT, GROUPED, ZEROS, MR>(j, j.activations + m * stride, row + m, out, out + outs, !m);
  if (MR > 2)
    for (; m + 2 <= rows; m += 2)
      tiles<LAYOUT, GROUPED, ZEROS, 2>(j, j.activations + m * stride, row + m, out, out + outs, !m);
  for (; m < rows; m++)
    tiles<LAYOUT, GROUPED, ZEROS, 1>(j, j.activations + m * stride, row + m, out, out + outs, !m);
}

template <int LAYOUT, bool GROUPED>
void multiply_in(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  if (j.zeros) return multiply_as<LAYOUT, GROUPED, FLOATS>(j, row, rows, out, outs);
  if (j.zero_points) return multiply_as<LAYOUT, GROUPED, BYTES>(j, row, rows, out, outs);
  return multiply_as<LAYOUT, GROUPED, SAME>(j, row, rows, out, outs);
}

// Rows from `row` on, whose activations begin at slot 0, times outputs from `out` on.
void multiply(const Linear& j, int64_t row, int64_t rows, int64_t out, int64_t outs) {
  if (j.layout == BITS2) {
    if (j.grouped) return multiply_in<BITS2, true>(j, row, rows, out, outs);
    return multiply_in<BITS2, false>(j, row, rows, out, outs);
  }
  if (j.layout == BITS4) {
    if (j.grouped) return multiply_in<BITS4, true>(j, row, rows, out, outs);
    return multiply_in<BITS4, false>(j, row, rows, out, outs);
  }
  if (j.layout == BITS8) return multiply_in<BITS8, false>(j, row, rows, out, outs);
  return multiply_in<BITS8_FINE, true>(j, row, rows, out, outs);
}
