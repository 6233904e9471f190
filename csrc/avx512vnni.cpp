// AVX512 with VNNI: a vector is one register.
#include "kernels.h"

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
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
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
  return _mm512_dpbusd_epi32(sum, u, s);
}

// Code number `p` of each byte.
template <int PLANES>
inline U8 plane(U8 raw, int p, U8 flip) {
  if (PLANES == 1) return _mm512_xor_si512(raw, flip);
  const U8 mask = _mm512_set1_epi8(PLANES == 2 ? 15 : 3);
  return _mm512_and_si512(p ? _mm512_srli_epi16(raw, p * 8 / PLANES) : raw, mask);
}

// x[index] of each lane; there are `known` of x.
inline F32 spread(const float* x, int64_t known, const int32_t* index) {
  const __mmask16 there = known >= 16 ? 0xffff : (1u << known) - 1;
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_maskz_loadu_ps(there, x));
}
inline F32 spread_bytes(const uint8_t* x, int64_t known, const int32_t* index) {
  const __mmask16 there = known >= 16 ? 0xffff : (1u << known) - 1;
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, x));
  return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(_mm512_loadu_si512(index), wide));
}

inline float total(F32 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t total(I32 x) { return _mm512_reduce_add_epi32(x); }

#include "loops.h"

}  // namespace

const Kernels avx512vnni_kernels = {"avx512vnni", round, multiply, round_dynamic, multiply_dynamic};

}  // namespace torch_quant

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
