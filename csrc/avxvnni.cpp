// AVX2 with the VNNI of CPUs that have no AVX512.
#include "gate.h"
#include "product.h"
#include "recurrent.h"
#include "rounding.h"
#include "rows.h"
#include "static.h"

#if TORCH_QUANT_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#endif

namespace torch_quant {
namespace {

template <bool SMALL>
inline __m256i dot_half(__m256i sum, __m256i u, __m256i s) {
  return _mm256_dpbusd_avx_epi32(sum, u, s);
}

constexpr int DEPTH = 4;
inline __m256i dot_numbers_half(__m256i sum, __m256i u, __m256i s) {
  return _mm256_dpbusd_avx_epi32(sum, u, s);
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

const Kernels avxvnni_kernels = {"avxvnni", round, multiply, round_dynamic, multiply_dynamic,
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
