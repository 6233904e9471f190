// AVX512 with VNNI: a vector is one register.
#include "gate.h"
#include "product.h"
#include "recurrent.h"
#include "rounding.h"
#include "rows.h"
#include "static.h"

#if TORCH_QUANT_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prefer-vector-width=512")
#endif

namespace torch_quant {
namespace {

constexpr int MR = 4, NR = 4;
using U8 = __m512i;
using I32 = __m512i;
using F32 = __m512;

inline U8 load(const void* p) { return _mm512_loadu_si512(p); }
inline U8 load_some(const void* p, int64_t count) {
  if (count <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ULL : (1ULL << count) - 1, p);
}
inline U8 bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
// Into the second level, of which a core waits for more lines at a time: 20 GB/s on Zen 4, against 10.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline I32 zero() { return _mm512_setzero_si512(); }
inline F32 zeros() { return _mm512_setzero_ps(); }
inline F32 all(float x) { return _mm512_set1_ps(x); }
inline I32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
inline F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, I32 x) { _mm512_storeu_si512(p, x); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline I32 add(I32 x, I32 y) { return _mm512_add_epi32(x, y); }
inline I32 times128(I32 x) { return _mm512_slli_epi32(x, 7); }
inline I32 times(I32 x, int y) { return _mm512_mullo_epi32(x, _mm512_set1_epi32(y)); }
inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
inline F32 product(F32 x, F32 y) { return _mm512_mul_ps(x, y); }
inline F32 plus_product(F32 sum, F32 x, F32 y) { return _mm512_fmadd_ps(x, y, sum); }
inline F32 minus_product(F32 sum, F32 x, F32 y) { return _mm512_fnmadd_ps(x, y, sum); }

template <bool SMALL>
inline I32 dot(I32 sum, U8 u, U8 s) {
#if defined(__GNUC__) && !defined(__clang__)
  // As gcc 12 writes it, sums are moved to other registers and back.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "vm"(s));
  return sum;
#else
  return _mm512_dpbusd_epi32(sum, u, s);
#endif
}

// Code number `p` of each byte.
template <int PLANES>
inline U8 plane(U8 raw, int p, U8 flip) {
  if (PLANES == 1) return _mm512_xor_si512(raw, flip);
  const U8 mask = _mm512_set1_epi8(PLANES == 2 ? 15 : 3);
  return _mm512_and_si512(p ? _mm512_srli_epi16(raw, p * 8 / PLANES) : raw, mask);
}

// Which number of several each lane takes, and how many there are.
struct Spread {
  __m512i index;
  __mmask16 known;
};
inline Spread spread_of(const int32_t* index, int64_t known) {
  return {_mm512_loadu_si512(index), static_cast<__mmask16>(known >= 16 ? -1 : (1 << known) - 1)};
}
inline F32 spread(const float* x, Spread by) {
  return _mm512_permutexvar_ps(by.index, _mm512_maskz_loadu_ps(by.known, x));
}
inline F32 spread(const uint8_t* x, Spread by) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(by.known, x));
  return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(by.index, wide));
}

// The sum of all lanes is that of both halves, and so on: the same floats in every kernel.
inline __m128 quarter(F32 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline float total(F32 x) {
  const __m128 four = quarter(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void four_totals(F32 a, F32 b, F32 c, F32 d, float* y) {
  const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const __m128 first = _mm_add_ps(_mm_movelh_ps(p, q), _mm_movehl_ps(q, p));
  const __m128 last = _mm_add_ps(_mm_movelh_ps(r, s), _mm_movehl_ps(s, r));
  _mm_storeu_ps(y, _mm_add_ps(_mm_shuffle_ps(first, last, 0x88), _mm_shuffle_ps(first, last, 0xdd)));
}

inline __m128i quarter(I32 x) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
inline int32_t total(I32 x) { return _mm512_reduce_add_epi32(x); }
inline void four_totals(I32 a, I32 b, I32 c, I32 d, int32_t* y) {
  const __m128i first = _mm_hadd_epi32(quarter(a), quarter(b));
  const __m128i last = _mm_hadd_epi32(quarter(c), quarter(d));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_hadd_epi32(first, last));
}

// For products of activations.
constexpr int DEPTH = 4, PRODUCT_ROWS = 8, TILE_COLUMNS = 2;
using Lanes = __mmask16;

inline I32 integers(int32_t x) { return _mm512_set1_epi32(x); }
inline U8 spread_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
inline I32 dot_numbers(I32 sum, U8 u, U8 s) { return dot<false>(sum, u, s); }
// 16 rows of 16 words, each `row` bytes behind the last one, as 16 columns one after the other.
inline void turn_words(const uint8_t* x, int64_t row, U8 flip, uint8_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_xor_si512(_mm512_loadu_si512(x + i * row), flip);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + 2 + k]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + 2 + k]);
    }
  // a[4 q + c] has, in its quarter p, rows 4 q to 4 q + 3 of column 4 p + c.
  for (int c = 0; c < 4; c++) {
    const __m512i first = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), second = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i third = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i fourth = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(out + c * 64, _mm512_shuffle_i32x4(first, third, 0x88));
    _mm512_storeu_si512(out + (4 + c) * 64, _mm512_shuffle_i32x4(first, third, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * 64, _mm512_shuffle_i32x4(second, fourth, 0x88));
    _mm512_storeu_si512(out + (12 + c) * 64, _mm512_shuffle_i32x4(second, fourth, 0xdd));
  }
}
inline F32 plus(F32 x, F32 y) { return _mm512_add_ps(x, y); }
inline F32 minus(F32 x, F32 y) { return _mm512_sub_ps(x, y); }
// To the last bit but one: an estimate of 14 bits and a step of Newton's.
inline F32 reciprocal(F32 x) {
  const F32 y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}
inline I32 largest(I32 x, I32 y) { return _mm512_max_epi32(x, y); }
inline F32 largest(F32 x, F32 y) { return _mm512_max_ps(x, y); }
inline F32 least(F32 x, F32 y) { return _mm512_min_ps(x, y); }
inline I32 rounded(F32 x) { return _mm512_cvtps_epi32(x); }
inline I32 as_bits(F32 x) { return _mm512_castps_si512(x); }
inline F32 from_bits(I32 x) { return _mm512_castsi512_ps(x); }
inline I32 shifted23(I32 x) { return _mm512_slli_epi32(x, 23); }
// `yes` where low <= x <= high, else `no`; NaN is not between.
inline F32 pick_between(F32 x, F32 low, F32 high, F32 yes, F32 no) {
  const __mmask16 above = _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ);
  return _mm512_mask_mov_ps(no, _mm512_mask_cmp_ps_mask(above, x, high, _CMP_LE_OQ), yes);
}
inline float highest(F32 x) { return _mm512_reduce_max_ps(x); }
inline int32_t highest(I32 x) { return _mm512_reduce_max_epi32(x); }
inline Lanes first_lanes(int64_t n) { return static_cast<Lanes>((1u << n) - 1); }
inline I32 pick(Lanes lanes, I32 yes, I32 no) { return _mm512_mask_mov_epi32(no, lanes, yes); }
inline F32 pick(Lanes lanes, F32 yes, F32 no) { return _mm512_mask_mov_ps(no, lanes, yes); }
inline F32 where_set(const uint8_t* p, F32 yes, F32 no) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return pick(_mm_test_epi8_mask(x, x), yes, no);
}
inline void narrow(uint8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline void narrow_some(uint8_t* p, I32 x, int64_t count) {
  _mm_mask_storeu_epi8(p, first_lanes(count), _mm512_cvtepi32_epi8(x));
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

const Kernels avx512vnni_kernels = {"avx512vnni", round, multiply, round_dynamic, multiply_dynamic,
                                    DEPTH, pack_product, compute_product, finish_rows,
                                    round_to_grid, gradient_of_grid, run_steps, pack_weight,
                                    compute_static, multiply_packed, apply_function, gate};

}  // namespace torch_quant

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
