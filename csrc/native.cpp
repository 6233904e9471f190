// The C interface: which kernels run, and how their work is cut up for threads.
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "product.h"
#include "rounding.h"
#include "rows.h"
#include "work.h"

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace torch_quant {
namespace {

// What the CPU can, and the operating system saves.

#if TORCH_QUANT_X86
void cpuid(uint32_t leaf, uint32_t sub, uint32_t* r) {
#if defined(_MSC_VER)
  int found[4];
  __cpuidex(found, leaf, sub);
  for (int i = 0; i < 4; i++) r[i] = found[i];
#else
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
#endif
}

uint64_t saved_registers() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool bit(uint32_t word, int place) { return (word >> place) & 1; }

void find(std::vector<const Kernels*>& found) {
  uint32_t r[4], seven[4] = {}, one[4] = {};
  cpuid(0, 0, r);
  if (r[0] < 7) return;
  cpuid(1, 0, r);
  if (!bit(r[2], 27)) return;  // the system does not use xsave
  const uint64_t saved = saved_registers();
  const bool fma = bit(r[2], 12);
  cpuid(7, 0, seven);
  if (seven[0] >= 1) cpuid(7, 1, one);
  if ((saved & 6) != 6 || !fma || !bit(seven[1], 5)) return;
  found.push_back(&avx2_kernels);
  if (bit(one[0], 4)) found.push_back(&avxvnni_kernels);
  const bool avx512 = bit(seven[1], 16) && bit(seven[1], 17) && bit(seven[1], 30) && bit(seven[1], 31);
  if ((saved & 0xe6) == 0xe6 && avx512 && bit(seven[2], 11)) found.push_back(&avx512vnni_kernels);
}
#else
void find(std::vector<const Kernels*>&) {}
#endif

// Those that run here, the fastest last.
const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> all{&plain_kernels};
    find(all);
    return all;
  }();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *usable().back();
}

namespace {

constexpr int64_t PRODUCT_SLAB_BYTES = 512 << 10;  // of packed matrices, while they are read
constexpr int64_t THREAD_PRODUCTS = 1 << 20;       // multiplications for which a thread pays
constexpr int64_t THREAD_FLOATS = 32 << 10;        // that are rounded, for which a thread pays

// Memory of one thread: a tile's rows, probabilities, scores and sums, and rows that are packed.
void lay_out(Product& j, int64_t depth) {
  j.member = j.heads / j.groups;
  j.wide = whole(j.columns, LANES);
  j.wide_features = j.softmax ? whole(j.features, LANES) : 0;
  const int64_t number = 4 / depth, groups = (j.depth + depth - 1) / depth;
  j.left_bytes = groups * 4;
  j.p_bytes = j.softmax ? j.wide * number : 0;
  j.packed_right = groups * 64 * (j.wide / LANES);
  j.packed_values = j.wide_features / LANES * (j.wide / depth) * 64;
  j.packed_group = whole(j.packed_right + j.packed_values + (j.wide + j.wide_features) * 4, 64);
  j.row_blocks = (j.member * j.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t row = most(whole(j.depth, 64), most(j.wide, j.wide_features));
  const int64_t packing = depth * row;
  const int64_t tile = TILE_ROWS * (j.left_bytes + j.p_bytes + (j.wide + j.wide_features) * 4) + row;
  j.scratch_bytes = whole(most(packing, tile), 64);
}

constexpr int64_t PIECE = 16384;  // elements that are summed up in float

// Cuts blocks into pieces, and gives each thread some of them at a time; returns the threads.
int cut(Rounding& j, int threads) {
  j.piece = most(1, least(j.block, PIECE));
  j.pieces = most(1, (j.block + j.piece - 1) / j.piece);
  j.units = most(1, PIECE / j.piece);
  return static_cast<int>(most(1, least(threads, j.blocks * j.block / (2 * PIECE))));
}

// All rows; false where memory is short.
bool finish(Rows& j, int threads) {
  if (!j.rows || !j.size) return true;
  threads = static_cast<int>(most(1, least(threads, j.rows * j.size / THREAD_FLOATS)));
  j.padded = whole(j.size, LANES);
  const Memory scratch(j.more && !j.sum ? threads * j.padded * 4 : 0);
  if (!scratch.start) return false;
  j.scratch = reinterpret_cast<float*>(scratch.get());
  for_each<Rows>(threads, j, (j.rows + ROWS_OF_ITEM - 1) / ROWS_OF_ITEM, kernels().finish_rows);
  return true;
}

int64_t items(const Rounding& j) { return (j.blocks * j.pieces + j.units - 1) / j.units; }

}  // namespace
}  // namespace torch_quant

using namespace torch_quant;

// The version of this interface.
EXPORT int torch_quant_version() { return 11; }

// How many sets of kernels run here; the last is the fastest.
EXPORT int torch_quant_paths() { return static_cast<int>(usable().size()); }

EXPORT const char* torch_quant_path(int i) { return usable()[i]->name; }

EXPORT const char* torch_quant_used() { return kernels().name; }

// Use one of them from now on, a negative number for the fastest.
EXPORT void torch_quant_use(int i) { chosen.store(i < 0 ? nullptr : usable()[i]); }

EXPORT void torch_quant_parallel(void* function) {
  parallel.store(reinterpret_cast<Parallel>(function));
}

// y = f(x @ weight.T + bias) of several weights, x rounded to 8 bits for each row and the weights int8 for each
// output; `layers` points to so many of DynamicLayer. 0, or 1 where memory is short.
EXPORT int torch_quant_dynamic(int threads, const float* x, const void* layers, int64_t rows, int64_t in,
                               int64_t count, int is_signed) {
  if (!rows || !in) return 0;
  std::vector<Dynamic> jobs;
  for (int64_t i = 0; i < count; i++) {
    DynamicLayer of;
    memcpy(&of, static_cast<const DynamicLayer*>(layers) + i, sizeof of);
    if (!of.out) continue;
    Dynamic j = {};
    j.x = x, j.weight = of.weight, j.scale = of.scale, j.bias = of.bias, j.y = of.y;
    j.rows = rows, j.in = in, j.out = of.out, j.is_signed = is_signed;
    j.function = of.function, j.low = static_cast<float>(of.low), j.high = static_cast<float>(of.high);
    jobs.push_back(j);
  }
  return jobs.empty() || multiply_rounded(jobs.data(), jobs.size(), threads) ? 0 : 1;
}

// y = the rows of an int8 table that `indices` name, each times its scale. -1, or the place of an index that the
// table does not have, and nothing behind it was computed.
EXPORT int64_t torch_quant_embedding(const int8_t* weight, const float* scale, const int64_t* indices, float* y,
                                     int64_t count, int64_t rows, int64_t size) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = indices[i];
    if (row < 0 || row >= rows) return i;
    const int8_t* codes = weight + row * size;
    for (int64_t k = 0; k < size; k++) y[i * size + k] = static_cast<float>(codes[k]) * scale[row];
  }
  return -1;
}

// Products of two activations, with a softmax and a second product between if there are values; 0, or 1
// where memory is short. `call` points to a ProductCall.
EXPORT int torch_quant_product(int threads, const void* call) {
  Product j = {};
  memcpy(static_cast<ProductCall*>(&j), call, sizeof(ProductCall));
  j.softmax = j.values.data != nullptr;
  const Kernels& use = kernels();
  lay_out(j, use.depth);
  const int64_t all = j.batch * j.groups;
  if (!all || !j.rows || !j.member || !j.columns) return 0;
  const int64_t work = j.batch * j.heads * j.rows * j.columns * (j.depth + (j.softmax ? j.features : 0));
  threads = static_cast<int>(most(1, least(threads, work / THREAD_PRODUCTS)));
  const int64_t slab = least(all, most(threads, PRODUCT_SLAB_BYTES / j.packed_group));
  const Memory packed(slab * j.packed_group), scratch(threads * j.scratch_bytes);
  if (!packed.start || !scratch.start) return 1;
  j.packed = packed.get(), j.scratch = scratch.get();
  for (j.first_group = 0; j.first_group < all; j.first_group += slab) {
    const int64_t groups = least(slab, all - j.first_group);
    for_each<Product>(threads, j, groups, use.pack_product);
    for_each<Product>(threads, j, groups * j.row_blocks, use.compute_product);
  }
  return 0;
}

// Floats of rows that are added, normalized and rounded; 0, or 1 where memory is short. `call` points to a
// RowsCall.
EXPORT int torch_quant_rows(int threads, const void* call) {
  Rows j = {};
  memcpy(static_cast<RowsCall*>(&j), call, sizeof(RowsCall));
  return finish(j, threads) ? 0 : 1;
}

// y = s / sqrt(mean s^2 + eps) * (weight + offset) of each row, where s = x + more; `more` and `weight` may be
// null, and `sum`, which gets s, without `more`. 0, or 1 where memory is short.
EXPORT int torch_quant_rms_norm(int threads, const float* x, const float* more, const float* weight, float* sum,
                                float* y, int64_t rows, int64_t size, double eps, double offset) {
  Rows j = {};
  j.x = x, j.more = more, j.weight = weight, j.sum = sum, j.y = y;
  j.rows = rows, j.size = size, j.function = RMS_NORM, j.eps = eps, j.offset = offset, j.inverse = 1.0;
  return finish(j, threads) ? 0 : 1;
}

// y = x rounded to a grid of integers, a scale and a zero point for each block of x. Scales are used as
// they are deployed: no smaller than `smallest`, with their sign where they may be negative. `used` gets
// them.
EXPORT void torch_quant_round(int threads, const float* x, const float* scale, const int32_t* zero,
                              float* y, float* used, int64_t blocks, int64_t block, int low, int high,
                              float smallest, int may_be_negative, int multiplies) {
  for (int64_t b = 0; b < blocks; b++) {
    const float size = may_be_negative ? std::fabs(scale[b]) : scale[b];
    const float large = size < smallest ? smallest : size;  // NaN stays
    used[b] = may_be_negative ? std::copysign(large, scale[b]) : large;
  }
  Rounding j = {};
  j.x = x, j.scale = used, j.zero = zero, j.y = y, j.blocks = blocks, j.block = block;
  j.low = static_cast<float>(low), j.high = static_cast<float>(high), j.multiplies = multiplies;
  threads = cut(j, threads);
  for_each<Rounding>(threads, j, items(j), kernels().round_to_grid);
}

// The gradient of what was rounded so; where they are not null, the sums that rounding_loops.h names, `sums` of
// [3, blocks], and the gradient of the scales, `grad_scale` of [blocks]: (inside + outside) / scale * factor.
// 0, or 1 where memory is short.
EXPORT int torch_quant_round_gradient(int threads, const float* grad, const float* x, const float* rounded,
                                      const float* scale, const int32_t* zero, float* grad_x, float* sums,
                                      float* grad_scale, int64_t blocks, int64_t block, int low, int high,
                                      float factor) {
  Rounding j = {};
  j.grad = grad, j.x = x, j.rounded = rounded, j.scale = scale, j.zero = zero, j.grad_x = grad_x;
  j.blocks = blocks, j.block = block;
  j.low = static_cast<float>(low), j.high = static_cast<float>(high);
  threads = cut(j, threads);
  const Memory parts(blocks * j.pieces * SUMS * 4);
  if (!parts.start) return 1;
  j.sums = reinterpret_cast<float*>(parts.get());
  for_each<Rounding>(threads, j, items(j), kernels().gradient_of_grid);
  for (int64_t b = 0; b < blocks; b++) {
    float found[SUMS];
    for (int s = 0; s < SUMS; s++) {
      double sum = 0.0;
      for (int64_t p = 0; p < j.pieces; p++) sum += j.sums[(b * j.pieces + p) * SUMS + s];
      found[s] = static_cast<float>(sum);
      if (sums) sums[s * blocks + b] = found[s];
    }
    if (grad_scale) grad_scale[b] = (found[0] + found[1]) / scale[b] * factor;
  }
  return 0;
}

// A weight that is folded with a norm, rounded, and unfolded again: y = round(w f) / f, where f = gain / sqrt(var + eps)
// is that of a channel; `gain` may be null. `folded`, `rounded`, `used` and `factor` are for the gradient. 0, or 1
// where a factor is below `tiny`, and nothing was computed.
EXPORT int torch_quant_refold(int threads, const float* weight, const float* gain, const float* var, const float* scale,
                              const int32_t* zero, float* factor, float* folded, float* rounded, float* used, float* y,
                              int64_t channels, int64_t blocks, int64_t count, int low, int high, float eps, float tiny,
                              float smallest) {
  for (int64_t c = 0; c < channels; c++) {
    const float slope = 1.0f / std::sqrt(var[c] + eps);
    factor[c] = gain ? gain[c] * slope : slope;
    if (std::fabs(factor[c]) < tiny) return 1;
  }
  const int64_t each = count / channels;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = c * each; i < (c + 1) * each; i++) folded[i] = weight[i] * factor[c];
  torch_quant_round(threads, folded, scale, zero, rounded, used, blocks, count / blocks, low, high, smallest, 1, 0);
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = c * each; i < (c + 1) * each; i++) y[i] = rounded[i] / factor[c];
  return 0;
}

// The gradient of what was rounded so; `grad_scale` may be null, and is multiplied by `share`. 0, or 1 where memory
// is short.
EXPORT int torch_quant_refold_gradient(int threads, const float* grad, const float* factor, const float* folded,
                                       const float* rounded, const float* used, const int32_t* zero, float* grad_weight,
                                       float* grad_scale, int64_t channels, int64_t blocks, int64_t count, int low,
                                       int high, float share) {
  const Memory inner(count * 4);
  if (!inner.start) return 1;
  float* grad_rounded = reinterpret_cast<float*>(inner.get());
  const int64_t each = count / channels;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = c * each; i < (c + 1) * each; i++) grad_rounded[i] = grad[i] / factor[c];
  if (torch_quant_round_gradient(threads, grad_rounded, folded, rounded, used, zero, grad_weight, nullptr, grad_scale,
                                 blocks, count / blocks, low, high, share))
    return 1;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = c * each; i < (c + 1) * each; i++) grad_weight[i] *= factor[c];
  return 0;
}
