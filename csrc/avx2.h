// Vectors of two registers of 32 bytes; whoever includes this says how bytes are multiplied.

constexpr int MR = 4, NR = 1;
struct U8 {
  __m256i a, b;
};
using I32 = U8;
struct F32 {
  __m256 a, b;
};

inline U8 load(const void* p) {
  const auto* at = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline U8 load_some(const void* p, int64_t count) {
  alignas(64) uint8_t x[64] = {};
  if (count > 0) memcpy(x, p, count < 64 ? count : 64);
  return load(x);
}
inline U8 bytes(int value) {
  const __m256i x = _mm256_set1_epi8(static_cast<char>(value));
  return {x, x};
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline I32 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F32 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I32 load_i32(const void* p) { return load(p); }
inline F32 load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, x.b);
}
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32 times128(I32 x) { return {_mm256_slli_epi32(x.a, 7), _mm256_slli_epi32(x.b, 7)}; }
inline I32 times(I32 x, int y) {
  const __m256i by = _mm256_set1_epi32(y);
  return {_mm256_mullo_epi32(x.a, by), _mm256_mullo_epi32(x.b, by)};
}
inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F32 product(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 plus_product(F32 sum, F32 x, F32 y) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
inline F32 minus_product(F32 sum, F32 x, F32 y) {
  return {_mm256_fnmadd_ps(x.a, y.a, sum.a), _mm256_fnmadd_ps(x.b, y.b, sum.b)};
}

// Codes of up to 4 bits where SMALL, else of 8.
template <bool SMALL>
inline I32 dot(I32 sum, U8 u, U8 s) {
  return {dot_half<SMALL>(sum.a, u.a, s.a), dot_half<SMALL>(sum.b, u.b, s.b)};
}

inline __m256i plane_half(__m256i raw, int p, int planes) {
  const __m256i mask = _mm256_set1_epi8(planes == 2 ? 15 : 3);
  return _mm256_and_si256(p ? _mm256_srli_epi16(raw, p * 8 / planes) : raw, mask);
}
template <int PLANES>
inline U8 plane(U8 raw, int p, U8 flip) {
  if (PLANES == 1) return {_mm256_xor_si256(raw.a, flip.a), _mm256_xor_si256(raw.b, flip.b)};
  return {plane_half(raw.a, p, PLANES), plane_half(raw.b, p, PLANES)};
}

// Which number of several, 8 at most, each lane takes, and how many there are.
struct Spread {
  U8 index;
  __m256i known;
  int64_t count;
};
inline Spread spread_of(const int32_t* index, int64_t known) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int count = static_cast<int>(known < 8 ? known : 8);
  return {load(index), _mm256_cmpgt_epi32(_mm256_set1_epi32(count), places), count};
}
inline F32 spread(const float* x, Spread by) {
  const __m256 all = _mm256_maskload_ps(x, by.known);
  return {_mm256_permutevar8x32_ps(all, by.index.a), _mm256_permutevar8x32_ps(all, by.index.b)};
}
inline F32 spread(const uint8_t* x, Spread by) {
  uint8_t near[8] = {};
  for (int64_t i = 0; i < by.count; i++) near[i] = x[i];
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(near));
  const __m256 all = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
  return {_mm256_permutevar8x32_ps(all, by.index.a), _mm256_permutevar8x32_ps(all, by.index.b)};
}

inline float total(F32 x) {
  const __m256 half = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
template <typename Vector, typename T>
inline void four_totals(Vector a, Vector b, Vector c, Vector d, T* y) {
  y[0] = total(a), y[1] = total(b), y[2] = total(c), y[3] = total(d);
}
inline int32_t total(I32 x) {
  const __m256i half = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// For products of activations; whoever includes this has said how numbers are multiplied.
constexpr int PRODUCT_ROWS = 4, TILE_COLUMNS = 1;
struct Lanes {
  __m256i a, b;
};

inline I32 integers(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline U8 spread_word(uint32_t x) { return integers(static_cast<int32_t>(x)); }
inline I32 dot_numbers(I32 sum, U8 x, U8 y) {
  return {dot_numbers_half(sum.a, x.a, y.a), dot_numbers_half(sum.b, x.b, y.b)};
}
// 8 rows of 8 words, each `row` bytes behind the last one, as 8 columns, 64 bytes each behind the last one.
inline void turn_eighth(const uint8_t* x, int64_t row, __m256i flip, uint8_t* out) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i++)
    a[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * row)), flip);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = _mm256_unpacklo_epi64(b[i + k], b[i + 2 + k]);
      a[i + 2 * k + 1] = _mm256_unpackhi_epi64(b[i + k], b[i + 2 + k]);
    }
  for (int c = 0; c < 4; c++) {
    auto* first = reinterpret_cast<__m256i*>(out + c * 64);
    auto* second = reinterpret_cast<__m256i*>(out + (4 + c) * 64);
    _mm256_storeu_si256(first, _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
    _mm256_storeu_si256(second, _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
  }
}
// 16 rows of 16 words, each `row` bytes behind the last one, as 16 columns one after the other.
inline void turn_words(const uint8_t* x, int64_t row, U8 flip, uint8_t* out) {
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 2; k++)
      turn_eighth(x + i * 8 * row + k * 32, row, flip.a, out + k * 512 + i * 32);
}
inline F32 plus(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 minus(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
// To the last bit but one: an estimate of 12 bits and a step of Newton's.
inline __m256 reciprocal_half(__m256 x) {
  const __m256 y = _mm256_rcp_ps(x);
  return _mm256_mul_ps(y, _mm256_fnmadd_ps(x, y, _mm256_set1_ps(2.0f)));
}
inline F32 reciprocal(F32 x) { return {reciprocal_half(x.a), reciprocal_half(x.b)}; }
inline I32 largest(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline F32 largest(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 least(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline I32 rounded(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I32 as_bits(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I32 shifted23(I32 x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
// `yes` where low <= x <= high, else `no`; NaN is not between.
inline __m256 pick_between_half(__m256 x, __m256 low, __m256 high, __m256 yes, __m256 no) {
  const __m256 above = _mm256_cmp_ps(x, low, _CMP_GE_OQ), below = _mm256_cmp_ps(x, high, _CMP_LE_OQ);
  return _mm256_blendv_ps(no, yes, _mm256_and_ps(above, below));
}
inline F32 pick_between(F32 x, F32 low, F32 high, F32 yes, F32 no) {
  return {pick_between_half(x.a, low.a, high.a, yes.a, no.a),
          pick_between_half(x.b, low.b, high.b, yes.b, no.b)};
}
inline float highest(F32 x) {
  const __m256 half = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t highest(I32 x) {
  const __m256i half = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Lanes first_lanes(int64_t n) {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
  return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline F32 pick(Lanes lanes, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(lanes.a)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(lanes.b))};
}
inline I32 pick(Lanes lanes, I32 yes, I32 no) { return as_bits(pick(lanes, from_bits(yes), from_bits(no))); }
inline F32 where_set(const uint8_t* p, F32 yes, F32 no) {
  const __m256i none = _mm256_setzero_si256();
  const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8));
  const Lanes unset = {_mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(a), none),
                       _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(b), none)};
  return pick(unset, no, yes);
}
// The last 16 bits of each number, which has no more.
inline __m256i sixteen(I32 x) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
}
inline void narrow(int16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sixteen(x));
}
inline void narrow(uint8_t* p, I32 x) {
  const __m256i low = _mm256_and_si256(sixteen(x), _mm256_set1_epi16(255));
  const __m128i a = _mm256_castsi256_si128(low), b = _mm256_extracti128_si256(low, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(a, b));
}
inline void narrow_some(uint8_t* p, I32 x, int64_t count) {
  uint8_t some[LANES];
  narrow(some, x);
  memcpy(p, some, count);
}
