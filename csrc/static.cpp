// The C interface of linear layers between two known grids: how rows and outputs are cut up.
#include "static.h"

#include <cstring>

#include "work.h"

namespace torch_quant {
namespace {

constexpr int64_t WEIGHT_BYTES = 256 << 10;      // of packed weights that meet rows while they are cached
constexpr int64_t FETCHED_BYTES = 48 << 10;      // likewise, where the next ones are fetched meanwhile
constexpr int64_t THREAD_PRODUCTS = 1 << 20;     // multiplications for which a thread pays

}  // namespace
}  // namespace torch_quant

using namespace torch_quant;

// Numbers that the kernels in use multiply together: a weight is packed for it.
EXPORT int torch_quant_depth() { return kernels().depth; }

// Packs an int8 weight, [out, in], into `packed`, [out / 16, in / depth, 64], rounded up, and the sums of
// inputs that are all `zero` into `first`, [out], up to a multiple of 16.
EXPORT void torch_quant_pack(const int8_t* weight, int64_t out, int64_t in, int64_t zero, uint8_t* packed,
                             int32_t* first) {
  kernels().pack_weight(weight, out, in, zero, packed, first);
}

// y of `rows` rows x; 0, or 1 where memory is short. `call` points to a StaticCall, whose sizes are not 0.
EXPORT int torch_quant_static(int threads, const uint8_t* x, void* y, int64_t rows, const void* call) {
  if (!rows) return 0;
  Static j = {};
  memcpy(static_cast<StaticCall*>(&j), call, sizeof(StaticCall));
  j.x = x, j.y = y, j.rows = rows;
  const Kernels& use = kernels();
  threads = static_cast<int>(most(1, least(threads, rows * j.in * j.out / THREAD_PRODUCTS)));
  const int64_t groups = (j.in + use.depth - 1) / use.depth;
  j.left_bytes = use.depth == 4 && j.in % 4 == 0 ? 0 : groups * 4;
  j.row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t wide = whole(j.out, LANES), share = (threads + j.row_blocks - 1) / j.row_blocks;
  const bool fetches = j.row_blocks == 1 && use.depth == 4;  // else rows wait for weights once in many blocks
  const int64_t cached = most((fetches ? FETCHED_BYTES : WEIGHT_BYTES) / (groups * 64) / 2 * 2, 2) * LANES;
  j.block = most(least(cached, whole((wide + share - 1) / share, 2 * LANES)), 2 * LANES);
  j.blocks = (j.out + j.block - 1) / j.block;
  j.ahead = fetches ? threads * j.block / LANES * groups * 64 : 0;
  j.scratch_bytes = whole(TILE_ROWS * (j.left_bytes + j.block * 4), 64);
  const Memory scratch(threads * j.scratch_bytes);
  if (!scratch.start) return 1;
  j.scratch = scratch.get();
  for_each<Static>(threads, j, j.blocks * j.row_blocks, use.compute_static);
  return 0;
}
