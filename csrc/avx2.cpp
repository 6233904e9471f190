// AVX2 without VNNI.
#include "gate.h"
#include "product.h"
#include "recurrent.h"
#include "rounding.h"
#include "rows.h"
#include "static.h"

#if TORCH_QUANT_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace torch_quant {
namespace {

// The sums of four neighbouring products. Pairs of them are added in 16 bits: codes of up to 4 bits
// times -127 to 127 fit (2 * 15 * 127), those of 8 bits do not and are widened first.
template <bool SMALL>
inline __m256i dot_half(__m256i sum, __m256i u, __m256i s) {
  if (SMALL) {
    const __m256i pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

// Products of activations multiply numbers of 16 bits, since those of 8 would overflow them.
constexpr int DEPTH = 2;
inline __m256i dot_numbers_half(__m256i sum, __m256i x, __m256i y) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
}

#include "avx2.h"
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

const Kernels avx2_kernels = {"avx2", round, multiply, round_dynamic, multiply_dynamic,
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
