// Integer products of activations, over the vectors of one instruction set; product.h says what they
// are. Whoever includes this file has defined, beside what loops.h wants, DEPTH and TILE_COLUMNS (blocks
// of 16 columns in a tile).

using Number = std::conditional<DEPTH == 4, uint8_t, int16_t>::type;
constexpr float LOWEST_EXPONENT = -126.0f, INFINITE = std::numeric_limits<float>::infinity();

inline int64_t groups_of(int64_t depth) { return (depth + DEPTH - 1) / DEPTH; }

inline const uint8_t* place(const Operand& o, int64_t batch, int64_t head, int64_t row) {
  const int64_t at = batch * o.of_batch + head * o.of_head + row * o.of_row;
  return static_cast<const uint8_t*>(o.data) + at * (o.element == FLOAT32 ? 4 : 1);
}

// Floats as codes, halves to even.
inline void round_floats(const Operand& o, const float* x, int64_t count, uint8_t* codes) {
  const F32 inverse = all(static_cast<float>(o.inverse));
  const F32 low = all(static_cast<float>(o.low - o.zero)), high = all(static_cast<float>(o.high - o.zero));
  const I32 zero = integers(static_cast<int32_t>(o.zero));
  for (int64_t k = 0; k < count; k += LANES) {
    alignas(64) float some[LANES] = {};
    const bool whole = count - k >= LANES;
    if (!whole) memcpy(some, x + k, (count - k) * 4);
    const F32 real = product(load_f32(whole ? x + k : some), inverse);
    const I32 found = add(rounded(least(largest(real, low), high)), zero);
    if (whole) {
      narrow(codes + k, found);
    } else {
      uint8_t last[LANES];
      narrow(last, found);
      memcpy(codes + k, last, count - k);
    }
  }
}

// The bytes of a row; floats are rounded into `room`.
inline const uint8_t* row_of(const Operand& o, int64_t batch, int64_t head, int64_t row, int64_t count,
                             uint8_t* room) {
  const uint8_t* x = place(o, batch, head, row);
  if (o.element != FLOAT32) return x;
  round_floats(o, reinterpret_cast<const float*>(x), count, room);
  return room;
}

// What makes bytes unsigned (left) or signed (right) codes, and their zero point then.
inline int left_flip(const Operand& o) { return o.element == INT8 ? 128 : 0; }
inline int right_flip(const Operand& o) { return o.element == INT8 ? 0 : 128; }
inline int32_t left_zero(const Operand& o) { return static_cast<int32_t>(o.zero) + left_flip(o); }
inline int32_t right_zero(const Operand& o) { return static_cast<int32_t>(o.zero) - right_flip(o); }

// A row of a left matrix, zeros behind it; returns the sum.
inline int32_t take_left(const uint8_t* RESTRICT x, int flip, int64_t count, int64_t bytes,
                         uint8_t* RESTRICT out) {
  Number* numbers = reinterpret_cast<Number*>(out);
  int32_t sum = 0;
  for (int64_t k = 0; k < count; k++) {
    const uint8_t code = static_cast<uint8_t>(x[k] ^ flip);
    numbers[k] = code;
    sum += code;
  }
  memset(out + count * sizeof(Number), 0, bytes - count * sizeof(Number));
  return sum;
}

// DEPTH signed codes in 4 bytes.
inline uint32_t word(const uint8_t* x, int flip) {
  uint32_t w;
  if (DEPTH == 4) {
    memcpy(&w, x, 4);
    return w ^ (0x01010101u * static_cast<uint32_t>(flip));
  }
  const int16_t pair[2] = {static_cast<int8_t>(x[0] ^ flip), static_cast<int8_t>(x[1] ^ flip)};
  memcpy(&w, pair, 4);
  return w;
}

// 16 signed codes of each of DEPTH rows, one row's beside the next one's.
inline void interleave(const uint8_t* const (&rows)[DEPTH], int flip, uint8_t* out) {
#if TORCH_QUANT_X86
  const __m128i by = _mm_set1_epi8(static_cast<char>(flip));
  __m128i x[DEPTH], y[4];
  UNROLL
  for (int i = 0; i < DEPTH; i++)
    x[i] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i])), by);
  const __m128i first = _mm_unpacklo_epi8(x[0], x[1]), second = _mm_unpackhi_epi8(x[0], x[1]);
  if (DEPTH == 4) {
    const __m128i third = _mm_unpacklo_epi8(x[2 % DEPTH], x[3 % DEPTH]);
    const __m128i fourth = _mm_unpackhi_epi8(x[2 % DEPTH], x[3 % DEPTH]);
    y[0] = _mm_unpacklo_epi16(first, third), y[1] = _mm_unpackhi_epi16(first, third);
    y[2] = _mm_unpacklo_epi16(second, fourth), y[3] = _mm_unpackhi_epi16(second, fourth);
  } else {
    const __m128i none = _mm_setzero_si128();
    y[0] = _mm_srai_epi16(_mm_unpacklo_epi8(none, first), 8);
    y[1] = _mm_srai_epi16(_mm_unpackhi_epi8(none, first), 8);
    y[2] = _mm_srai_epi16(_mm_unpacklo_epi8(none, second), 8);
    y[3] = _mm_srai_epi16(_mm_unpackhi_epi8(none, second), 8);
  }
  UNROLL
  for (int i = 0; i < 4; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out) + i, y[i]);
#else
  using Signed = std::conditional<DEPTH == 4, int8_t, int16_t>::type;
  Signed* numbers = reinterpret_cast<Signed*>(out);
  for (int f = 0; f < LANES; f++)
    for (int i = 0; i < DEPTH; i++) numbers[f * DEPTH + i] = static_cast<int8_t>(rows[i][f] ^ flip);
#endif
}

// What a code of the left matrix's zero point adds up to in each column, to be taken out.
inline void column_sums(const uint8_t* packed, int64_t blocks, int64_t groups, int64_t depth,
                        int32_t zero, int32_t factor, int32_t* sums) {
  const U8 ones = spread_word(DEPTH == 4 ? 0x01010101u : 0x00010001u);
  for (int64_t n = 0; n < blocks; n++) {
    I32 sum = integers(static_cast<int32_t>(-depth * zero));
    if (factor)
      for (int64_t g = 0; g < groups; g++) sum = dot_numbers(sum, ones, load(packed + (n * groups + g) * 64));
    store(reinterpret_cast<float*>(sums + n * LANES), times(sum, factor));
  }
}

// Packs a matrix whose columns lie one after the other.
inline void pack_columns(const Operand& o, int64_t batch, int64_t head, int64_t columns, int64_t depth,
                         uint8_t* packed, uint8_t* room) {
  const int64_t groups = groups_of(depth), whole = depth / DEPTH;
  const int flip = right_flip(o);
  for (int64_t n = 0; n < columns; n += LANES, packed += groups * 64) {
    const int64_t count = columns - n < LANES ? columns - n : LANES;
    if (count < LANES) memset(packed, 0, groups * 64);
    int64_t turned = 0;
    if (DEPTH == 4 && count == LANES && o.element != FLOAT32) {
      const uint8_t* x = place(o, batch, head, n);
      for (; turned + 16 <= whole; turned += 16)
        turn_words(x + turned * 4, o.of_row, bytes(flip), packed + turned * 64);
    }
    for (int64_t l = 0; l < count; l++) {
      const uint8_t* x = row_of(o, batch, head, n + l, depth, room);
      uint8_t* out = packed + l * 4;
      for (int64_t g = turned; g < whole; g++) {
        const uint32_t w = word(x + g * DEPTH, flip);
        memcpy(out + g * 64, &w, 4);
      }
      if (whole < groups) {
        uint8_t last[4];
        memset(last, flip, 4);
        memcpy(last, x + whole * DEPTH, depth - whole * DEPTH);
        const uint32_t w = word(last, flip);
        memcpy(out + whole * 64, &w, 4);
      }
    }
  }
}

// Packs a matrix whose rows lie one after the other; `room` holds DEPTH + 1 of them.
inline void pack_rows(const Operand& o, int64_t batch, int64_t head, int64_t depth, int64_t columns,
                      int64_t groups, uint8_t* packed, uint8_t* room) {
  const int64_t wide = (columns + LANES - 1) / LANES * LANES;
  const int flip = right_flip(o);
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* rows[DEPTH];
    for (int i = 0; i < DEPTH; i++) {
      const int64_t k = g * DEPTH + i;
      uint8_t* mine = room + i * wide;
      if (k >= depth) {
        memset(mine, flip, wide);
        rows[i] = mine;
        continue;
      }
      rows[i] = row_of(o, batch, head, k, columns, mine);
      if (columns < wide) {
        if (rows[i] != mine) memcpy(mine, rows[i], columns);
        memset(mine + columns, flip, wide - columns);
        rows[i] = mine;
      }
    }
    for (int64_t n = 0; n < wide; n += LANES) {
      interleave(rows, flip, packed + (n / LANES * groups + g) * 64);
      UNROLL
      for (int i = 0; i < DEPTH; i++) rows[i] += LANES;
    }
  }
}

// Packs what the heads of one group share.
void pack_product(const Product& j, int64_t slot, int64_t worker) {
  const int64_t group = j.first_group + slot, batch = group / j.groups, head = group % j.groups;
  uint8_t* room = j.scratch + worker * j.scratch_bytes;
  uint8_t* packed = j.packed + slot * j.packed_group;
  uint8_t* values = packed + j.packed_right;
  auto* sums = reinterpret_cast<int32_t*>(values + j.packed_values);
  const int64_t groups = groups_of(j.depth);
  if (j.by_column)
    pack_columns(j.right, batch, head, j.columns, j.depth, packed, room);
  else
    pack_rows(j.right, batch, head, j.depth, j.columns, groups, packed, room);
  column_sums(packed, j.wide / LANES, groups, j.depth, right_zero(j.right), -left_zero(j.left), sums);
  if (!j.softmax) return;
  const int64_t keys = j.wide / DEPTH;
  pack_rows(j.values, batch, head, j.columns, j.features, keys, values, room);
  column_sums(values, j.wide_features / LANES, keys, j.columns, right_zero(j.values),
              static_cast<int32_t>(-j.p_zero), sums + j.wide);
}

// Adds M rows times N blocks of columns; `step` bytes AHEAD are fetched with each group.
template <int M, int N, bool AHEAD = false>
inline void add_products(I32 (&sums)[M][N], const uint8_t* left, int64_t left_bytes, const uint8_t* right,
                         int64_t block, int64_t groups, const uint8_t* ahead = nullptr, int64_t step = 0) {
  for (int64_t g = 0; g < groups; g++) {
    if (AHEAD) prefetch(ahead + g * step);
    U8 r[N];
    UNROLL
    for (int n = 0; n < N; n++) r[n] = load(right + n * block + g * 64);
    UNROLL
    for (int m = 0; m < M; m++) {
      uint32_t w;
      memcpy(&w, left + m * left_bytes + g * 4, 4);
      const U8 l = spread_word(w);
      UNROLL
      for (int n = 0; n < N; n++) sums[m][n] = dot_numbers(sums[m][n], l, r[n]);
    }
  }
}

// What a product fetches for the one behind it: `step` bytes with each group of a whole tile.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t step = 0;

  Ahead() = default;
  // `groups` of whole tiles fetch so many bytes, if a line for each is enough.
  Ahead(const void* start, int64_t size, int64_t groups) : at(static_cast<const uint8_t*>(start)) {
    step = size > 0 && groups * 64 >= size ? size / groups + 1 : 0;
  }
};

template <int M, int N>
inline void add_and_fetch(I32 (&sums)[M][N], const uint8_t* left, int64_t left_bytes, const uint8_t* right,
                          int64_t block, int64_t groups, Ahead& ahead) {
  if (M < PRODUCT_ROWS || N < TILE_COLUMNS || !ahead.step)
    return add_products<M, N>(sums, left, left_bytes, right, block, groups);
  add_products<M, N, true>(sums, left, left_bytes, right, block, groups, ahead.at, ahead.step);
  ahead.at += ahead.step * groups;
}

// M rows times N blocks of columns; sums begin with those of `first`, if there are such.
template <int M, int N>
inline void product_tile(const uint8_t* left, int64_t left_bytes, const uint8_t* right, int64_t block,
                         int64_t groups, const int32_t* first, int32_t* y, int64_t y_row, Ahead& ahead) {
  I32 sums[M][N];
  UNROLL
  for (int n = 0; n < N; n++)
    UNROLL
    for (int m = 0; m < M; m++) sums[m][n] = first ? load_i32(first + n * LANES) : zero();
  add_and_fetch<M, N>(sums, left, left_bytes, right, block, groups, ahead);
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int n = 0; n < N; n++) store(reinterpret_cast<float*>(y + m * y_row + n * LANES), sums[m][n]);
}

template <int M>
inline void product_rows(const uint8_t* left, int64_t left_bytes, const uint8_t* right, int64_t block,
                         int64_t groups, int64_t blocks, const int32_t* first, int32_t* y, int64_t y_row,
                         Ahead& ahead) {
  int64_t n = 0;
  for (; n + TILE_COLUMNS <= blocks; n += TILE_COLUMNS)
    product_tile<M, TILE_COLUMNS>(left, left_bytes, right + n * block, block, groups,
                                  first ? first + n * LANES : nullptr, y + n * LANES, y_row, ahead);
  for (; n < blocks; n++)
    product_tile<M, 1>(left, left_bytes, right + n * block, block, groups,
                       first ? first + n * LANES : nullptr, y + n * LANES, y_row, ahead);
}

// Calls `each` for some rows at a time: their number, a constant, and the first.
template <typename Each>
inline void in_tiles(int64_t rows, const Each& each) {
  int64_t m = 0;
#define TAKE(M) \
  for (; m + M <= rows; m += M) each(std::integral_constant<int, M>{}, m);
  if (PRODUCT_ROWS > 4) {
    TAKE(PRODUCT_ROWS)
  }
  TAKE(4)
  TAKE(2)
  TAKE(1)
#undef TAKE
}

// Rows of a tile times `blocks` of 16 columns, over the first `groups` of a packed block.
inline void product_of(int64_t rows, const uint8_t* left, int64_t left_bytes, const uint8_t* right,
                       int64_t block, int64_t groups, int64_t blocks, const int32_t* first, int32_t* y,
                       int64_t y_row, Ahead* ahead = nullptr) {
  Ahead nothing;
  in_tiles(rows, [&](auto tile, int64_t m) {
    product_rows<tile()>(left + m * left_bytes, left_bytes, right, block, groups, blocks, first, y + m * y_row,
                         y_row, ahead ? *ahead : nothing);
  });
}

// 2^x for -126 <= x <= 0, to 3e-6: 2^n times a polynomial of what is left, -0.5 to 0.5.
inline F32 two_to(F32 x) {
  const F32 moved = plus(x, all(12582912.0f));  // the last bits are those of n
  const F32 f = minus(x, minus(moved, all(12582912.0f)));
  F32 y = plus_product(all(0.05591786f), all(0.0095701f), f);
  y = plus_product(all(0.24024745f), y, f);
  y = plus_product(all(0.69312181f), y, f);
  y = plus_product(all(0.99999926f), y, f);
  return from_bits(add(as_bits(y), shifted23(as_bits(moved))));
}

// One row of scores, as integers, and what becomes of it.
struct ScoreRow {
  int32_t* scores;   // [end]; floats take their place
  int64_t limit;     // columns that it sees
  int64_t end;       // up to which probabilities are written
  float constant;    // what all scores have in common
  const uint8_t* mask;
  Number* p;
  float shift, sum;  // of exponents, and of exponentials
};

template <bool TAIL>
inline I32 top_of(const ScoreRow& r, int64_t k, I32 top) {
  const I32 x = load_i32(r.scores + k);
  return largest(top, TAIL ? pick(first_lanes(r.limit - k), x, top) : x);
}

// Scales and masks 16 scores.
template <bool TAIL>
inline F32 masked(const Product& j, const ScoreRow& r, int64_t k, F32 top) {
  F32 t = plus_product(all(r.constant), to_float(load_i32(r.scores + k)), all(static_cast<float>(j.scale)));
  const int64_t size = j.mask_element == FLOAT32 ? 4 : 1;
  if (r.mask) {
    alignas(64) uint8_t some[64] = {};
    const uint8_t* mask = r.mask + k * size;
    if (TAIL) {
      memcpy(some, mask, (r.limit - k) * size);
      mask = some;
    }
    if (size == 4)
      t = plus(t, load_f32(reinterpret_cast<const float*>(mask)));
    else
      t = where_set(mask, t, all(-INFINITE));
  }
  if (TAIL) t = pick(first_lanes(r.limit - k), t, all(-INFINITE));
  store(reinterpret_cast<float*>(r.scores + k), t);
  return largest(t, top);
}

// Exponentials of 16 scores; returns the sum so far.
template <bool MASKED, bool TAIL>
inline F32 exponentials(const ScoreRow& r, int64_t k, F32 scale, F32 shift, F32 sum) {
  float* at = reinterpret_cast<float*>(r.scores + k);
  F32 x = MASKED ? product(minus(load_f32(at), shift), scale)
                 : plus_product(shift, to_float(load_i32(r.scores + k)), scale);
  x = two_to(largest(x, all(LOWEST_EXPONENT)));
  if (TAIL) x = pick(first_lanes(r.limit - k), x, zeros());
  store(at, x);
  return plus(sum, x);
}

template <bool TAIL>
inline I32 codes(const Product& j, const ScoreRow& r, int64_t k, F32 factor, F32 most, I32 middle, I32 sum) {
  const F32 x = least(product(load_f32(reinterpret_cast<float*>(r.scores + k)), factor), most);
  I32 q = add(rounded(x), middle);
  if (TAIL) q = pick(first_lanes(r.limit - k), q, zero());
  narrow(r.p + k, q);
  return add(sum, q);
}

// Probabilities that are the code of 0, behind those that a row sees.
inline int32_t fill(const Product& j, const ScoreRow& r, int64_t from) {
  const int64_t seen = j.p_zero && from < j.columns ? j.columns : from;
  for (int64_t k = from; k < seen; k++) r.p[k] = static_cast<Number>(j.p_zero);
  if (seen < r.end) memset(r.p + seen, 0, (r.end - seen) * sizeof(Number));
  return static_cast<int32_t>((seen - from) * j.p_zero);
}

// The softmax of a row in three steps. Each is taken for all rows of a tile before the next one, so that
// rows need not wait for what a step makes of all columns of one.

constexpr double LOG2E = 1.4426950408889634;

// The largest score; exponentials are of distances from it.
template <bool MASKED>
inline void find_top(const Product& j, ScoreRow& r) {
  const int64_t whole = r.limit / LANES * LANES;
  if (MASKED) {
    F32 tops = all(-INFINITE);
    for (int64_t k = 0; k < whole; k += LANES) tops = masked<false>(j, r, k, tops);
    if (whole < r.limit) tops = masked<true>(j, r, whole, tops);
    r.shift = highest(tops);
    if (r.shift == -INFINITE) r.limit = 0;  // it sees nothing
  } else {
    I32 tops = integers(std::numeric_limits<int32_t>::min());
    for (int64_t k = 0; k < whole; k += LANES) tops = top_of<false>(r, k, tops);
    if (whole < r.limit) tops = top_of<true>(r, whole, tops);
    r.shift = -static_cast<float>(j.scale * LOG2E) * static_cast<float>(highest(tops));
  }
}

template <bool MASKED>
inline void sum_exponentials(const Product& j, ScoreRow& r) {
  const int64_t whole = r.limit / LANES * LANES;
  const F32 scale = all(static_cast<float>(MASKED ? LOG2E : j.scale * LOG2E)), shift = all(r.shift);
  F32 sums = zeros();
  for (int64_t k = 0; k < whole; k += LANES) sums = exponentials<MASKED, false>(r, k, scale, shift, sums);
  if (whole < r.limit) sums = exponentials<MASKED, true>(r, whole, scale, shift, sums);
  r.sum = total(sums);
}

// Writes the codes of the probabilities and returns their sum.
inline int32_t round_row(const Product& j, const ScoreRow& r) {
  const int64_t whole = r.limit / LANES * LANES;
  const double factor_of_row = j.p_inverse ? j.p_inverse / r.sum : static_cast<double>(j.p_high);
  const F32 factor = all(static_cast<float>(factor_of_row));
  const F32 most = all(static_cast<float>(j.p_high - j.p_zero));
  const I32 middle = integers(static_cast<int32_t>(j.p_zero));
  I32 found = zero();
  for (int64_t k = 0; k < whole; k += LANES) found = codes<false>(j, r, k, factor, most, middle, found);
  if (whole < r.limit) found = codes<true>(j, r, whole, factor, most, middle, found);
  return total(found) + fill(j, r, r.limit);
}

// Sums of the codes of each row's probabilities, times `by`.
template <bool MASKED>
inline void softmax(const Product& j, ScoreRow* rows, int64_t count, int32_t by, int32_t* sums) {
  for (int64_t m = 0; m < count; m++) find_top<MASKED>(j, rows[m]);
  for (int64_t m = 0; m < count; m++) sum_exponentials<MASKED>(j, rows[m]);
  for (int64_t m = 0; m < count; m++) sums[m] = by * round_row(j, rows[m]);
}

// What a code of the probabilities of a row stands for, where each has a scale of its own; else 1.
inline double share_of(const Product& j, const ScoreRow& r) {
  if (j.p_inverse) return 1.0;
  return r.sum == 0 ? 0.0 : 1.0 / (static_cast<double>(j.p_high) * r.sum);  // 0: it sees nothing
}

// Writes a row of the result: (sums + constant) * y_scale * share, as floats or as codes.
inline void put_row(const Product& j, int64_t batch, int64_t head, int64_t row, const int32_t* sums,
                    const int32_t* columns, int32_t constant, int64_t count, double share) {
  const Operand& o = j.y;
  uint8_t* y = const_cast<uint8_t*>(place(o, batch, head, row));
  const bool real = o.element == FLOAT32;
  const double scale = j.y_scale * share;
  const F32 by = all(static_cast<float>(real ? scale : scale * o.inverse));
  const F32 low = all(static_cast<float>(o.low - o.zero)), high = all(static_cast<float>(o.high - o.zero));
  const I32 zero = integers(static_cast<int32_t>(o.zero)), more = integers(constant);
  for (int64_t f = 0; f < count; f += LANES) {
    I32 sum = add(load_i32(sums + f), more);
    if (columns) sum = add(sum, load_i32(columns + f));
    const F32 x = product(to_float(sum), by);
    const int64_t left = count - f;
    alignas(64) uint8_t some[64];
    if (real) {
      float* at = reinterpret_cast<float*>(y) + f;
      store(left < LANES ? reinterpret_cast<float*>(some) : at, x);
      if (left < LANES) memcpy(at, some, left * 4);
    } else {
      const I32 code = add(rounded(least(largest(x, low), high)), zero);
      narrow(left < LANES ? some : y + f, code);
      if (left < LANES) memcpy(y + f, some, left);
    }
  }
}

// A block of rows of a group of heads, a tile after the other. Item `i` of a slab.
void compute_product(const Product& j, int64_t i, int64_t worker) {
  const int64_t slot = i / j.row_blocks, group = j.first_group + slot;
  const int64_t batch = group / j.groups, first_head = group % j.groups * j.member;
  const uint8_t* packed = j.packed + slot * j.packed_group;
  const uint8_t* values = packed + j.packed_right;
  const auto* sums = reinterpret_cast<const int32_t*>(values + j.packed_values);
  uint8_t* left = j.scratch + worker * j.scratch_bytes;
  uint8_t* p = left + TILE_ROWS * j.left_bytes;
  auto* scores = reinterpret_cast<int32_t*>(p + TILE_ROWS * j.p_bytes);
  int32_t* found = scores + TILE_ROWS * j.wide;
  uint8_t* room = reinterpret_cast<uint8_t*>(found + TILE_ROWS * j.wide_features);
  const int64_t groups = groups_of(j.depth), keys = j.wide / DEPTH;
  const int32_t right_middle = right_zero(j.right), value_middle = right_zero(j.values);
  const bool masks = j.mask || j.scale < 0;
  const int64_t all_rows = j.member * j.rows, begin = i % j.row_blocks * BLOCK_ROWS;
  const int64_t end = begin + BLOCK_ROWS < all_rows ? begin + BLOCK_ROWS : all_rows;
  for (int64_t r0 = begin; r0 < end; r0 += TILE_ROWS) {
    const int64_t rows = end - r0 < TILE_ROWS ? end - r0 : TILE_ROWS;
    int64_t heads[TILE_ROWS], row[TILE_ROWS], limits[TILE_ROWS], widest = 0;
    int32_t constants[TILE_ROWS];
    for (int64_t m = 0; m < rows; m++) {
      heads[m] = first_head + (r0 + m) / j.rows, row[m] = (r0 + m) % j.rows;
      limits[m] = j.causal && row[m] + 1 < j.columns ? row[m] + 1 : j.columns;
      widest = limits[m] > widest ? limits[m] : widest;
      const uint8_t* x = row_of(j.left, batch, heads[m], row[m], j.depth, room);
      constants[m] = -right_middle *
                     take_left(x, left_flip(j.left), j.depth, j.left_bytes, left + m * j.left_bytes);
    }
    const int64_t blocks = (widest + LANES - 1) / LANES;
    product_of(rows, left, j.left_bytes, packed, groups * 64, groups, blocks, sums, scores, j.wide);
    if (!j.softmax) {
      for (int64_t m = 0; m < rows; m++)
        put_row(j, batch, heads[m], row[m], scores + m * j.wide, nullptr, constants[m], j.columns, 1.0);
      continue;
    }
    const int64_t seen = j.p_zero ? j.wide : blocks * LANES;
    ScoreRow score_rows[TILE_ROWS];
    for (int64_t m = 0; m < rows; m++) {
      const int64_t at = batch * j.mask_of_batch + heads[m] * j.mask_of_head + row[m] * j.mask_of_row;
      const int64_t size = j.mask_element == FLOAT32 ? 4 : 1;
      score_rows[m] = {scores + m * j.wide,
                       limits[m],
                       seen,
                       static_cast<float>(constants[m] * j.scale),
                       j.mask ? static_cast<const uint8_t*>(j.mask) + at * size : nullptr,
                       reinterpret_cast<Number*>(p + m * j.p_bytes)};
    }
    if (masks)
      softmax<true>(j, score_rows, rows, -value_middle, constants);
    else
      softmax<false>(j, score_rows, rows, -value_middle, constants);
    product_of(rows, p, j.p_bytes, values, keys * 64, seen / DEPTH, j.wide_features / LANES, nullptr, found,
               j.wide_features);
    for (int64_t m = 0; m < rows; m++)
      put_row(j, batch, heads[m], row[m], found + m * j.wide_features,
              j.p_zero ? sums + j.wide : nullptr, constants[m], j.features, share_of(j, score_rows[m]));
  }
}
