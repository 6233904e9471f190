// The C interface of recurrent layers: how steps, directions and sequences are cut up.
#include "recurrent.h"

#include <cstring>

#include "work.h"

namespace torch_quant {
namespace {

constexpr int64_t GATE_BYTES = 1 << 20;      // of gates that are there at a time, for each direction
constexpr int64_t THREAD_STEPS = 4 << 20;    // multiplications for which a thread pays
constexpr int64_t SHARE_PRODUCTS = 1 << 18;  // multiplications of a step for which a thread pays
constexpr int64_t MOST_ROWS = 32;            // sequences of a block
constexpr int64_t PACKED_ROWS = 4;           // of a step, for which a packed matrix is the faster
constexpr int64_t PACKED_TIMES = 4;          // as often as packing pays, for what else it costs

int64_t gates_of(int64_t cell) { return cell == LSTM ? 4 : cell == GRU ? 3 : 1; }

// The next steps of a direction whose gates have room; false behind the last.
bool advance(Recurrent& j, int64_t d, int64_t rows) {
  if (!d) {
    j.begin[0] = j.end[0];
    while (j.end[0] < j.steps &&
           (j.end[0] == j.begin[0] || j.first[j.end[0] + 1] - j.first[j.begin[0]] <= rows))
      j.end[0]++;
  } else {
    j.end[1] = j.begin[1];
    while (j.begin[1] > 0 &&
           (j.begin[1] == j.end[1] || j.first[j.end[1]] - j.first[j.begin[1] - 1] <= rows))
      j.begin[1]--;
  }
  return j.end[d] > j.begin[d];
}

}  // namespace
}  // namespace torch_quant

using namespace torch_quant;

// One recurrent layer; 0, or 1 where memory is short. `call` points to a RecurrentCall, whose sizes are
// not 0.
EXPORT int torch_quant_recurrent(int threads, const void* call) {
  Recurrent j = {};
  memcpy(static_cast<RecurrentCall*>(&j), call, sizeof(RecurrentCall));
  j.wide = gates_of(j.cell) * j.size, j.padded = whole(j.size, 64);
  const int64_t all = j.first[j.steps];
  threads = static_cast<int>(most(1, least(threads, all * j.directions * j.wide * j.size / THREAD_STEPS)));
  const int64_t parts = (threads + j.directions - 1) / j.directions;
  j.block = least(least(whole((j.batch + parts - 1) / parts, 4), j.batch), MOST_ROWS);
  j.blocks = (j.batch + j.block - 1) / j.block;
  const int64_t items = j.directions * j.blocks;
  // Slices begin where vectors do, and have work for as long as some threads take to meet.
  const int64_t most_shares = least(MOST_SHARES, j.size % LANES ? 1 : j.block * j.wide * j.size / SHARE_PRODUCTS);
  j.units = whole(j.size / most(1, least(threads / items, most_shares)), LANES);
  j.shares = j.size % LANES ? 1 : (j.size + j.units - 1) / j.units;
  const int64_t rows = most(j.batch, least(all, GATE_BYTES / (j.wide * 4)));
  j.scratch_bytes = whole(j.block * (j.wide * 4 + j.padded + 8), 64) + STEP_OUTS * TILE_ROWS * 4;
  const int64_t gate_bytes = whole(rows * j.wide * 4, 64);
  const Memory gates(j.directions * gate_bytes), scratch(threads * j.scratch_bytes);
  const Memory sums(items * (j.wide * 4 + 8 * j.shares) + LANES * 4);
  const Memory states(j.shares > 1 ? items * 2 * j.block * j.size * 4 : 0);
  std::vector<Shared> shared(j.shares > 1 ? items : 0);
  const Kernels& use = kernels();
  const bool pack = use.depth == 4 && j.batch >= PACKED_ROWS && all >= PACKED_TIMES * (32 + j.size / 16);
  const int64_t packed_bytes = pack ? whole(j.wide, LANES) * (whole(j.size, 4) + 4) : 0;
  const Memory packed(j.directions * packed_bytes);
  if (!gates.start || !scratch.start || !sums.start || !packed.start || !states.start) return 1;
  for (int64_t d = 0; pack && d < j.directions; d++) {
    uint8_t* start = packed.get() + d * packed_bytes;
    auto* of_weights = reinterpret_cast<int32_t*>(start);
    start += whole(j.wide, LANES) * 4;
    use.pack_weight(j.of[d].w_hh, j.wide, j.size, -1, start, of_weights);
    j.packed[d] = start, j.of_weights[d] = of_weights;
  }
  j.scratch = scratch.get();
  j.known = reinterpret_cast<int64_t*>(sums.get());
  j.sums = reinterpret_cast<int32_t*>(j.known + items * j.shares);
  memset(j.known, 0, items * j.shares * 8);
  j.shared = shared.data(), j.states = reinterpret_cast<float*>(states.get());
  for (int64_t i = 0; j.shares > 1 && i < 2 * items; i++) {
    const int64_t d = i / 2 / j.blocks, from = i / 2 % j.blocks * j.block;
    const int64_t count = least(j.block, j.batch - from) * j.size;
    memcpy(j.states + i * j.block * j.size, j.of[d].h + from * j.size, count * 4);
  }
  j.begin[1] = j.end[1] = j.steps;
  while (true) {
    bool more = false;
    for (int64_t d = 0; d < j.directions; d++) {
      if (!advance(j, d, rows)) continue;
      more = true;
      const Direction& of = j.of[d];
      Dynamic x = {};
      const int64_t begin = j.first[j.begin[d]];
      x.x = j.x + begin * j.in, x.weight = of.w_ih, x.scale = of.s_ih, x.bias = of.b_ih;
      auto* y = reinterpret_cast<float*>(gates.get() + d * gate_bytes);
      x.y = y;
      x.rows = j.first[j.end[d]] - begin, x.in = j.in, x.out = j.wide;
      x.is_signed = static_cast<int>(j.is_signed);
      j.gates[d] = y;
      if (!multiply_rounded(&x, 1, threads)) return 1;
    }
    if (!more) return 0;
    for (Shared& each : shared) each.begin();
    for_each<Recurrent>(threads, j, items * j.shares, use.run_steps);
  }
}
