// How work is cut up for threads, and where it finds memory.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "product.h"

#if defined(_MSC_VER)
#include <malloc.h>
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace torch_quant {

// Those that are used now.
const Kernels& kernels();

// Threads: those of the OpenMP library that PyTorch has loaded, so that there are no others.

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline std::atomic<Parallel> parallel{nullptr};

inline void in_parallel(int threads, void (*work)(void*), void* data) {
  if (threads <= 1) return work(data);
  if (Parallel run = parallel.load(std::memory_order_relaxed))
    return run(work, data, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (auto& each : others) each.join();
}

// Runs `each(job, i, worker)` for i below `count`; whoever is free takes the next. Workers count from 0.
template <typename Job>
struct Loop {
  const Job* job;
  int64_t count;
  void (*each)(const Job&, int64_t, int64_t);
  std::atomic<int64_t> next{0}, workers{0};

  static void work(void* data) {
    auto* loop = static_cast<Loop*>(data);
    const int64_t worker = loop->workers.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = loop->next.fetch_add(1, std::memory_order_relaxed)) < loop->count;)
      loop->each(*loop->job, i, worker);
  }
};

template <typename Job>
void for_each(int threads, const Job& job, int64_t count, void (*each)(const Job&, int64_t, int64_t)) {
  Loop<Job> loop{&job, count, each};
  in_parallel(threads < count ? threads : static_cast<int>(count), Loop<Job>::work, &loop);
}

// Of rounded activations, and of weights that meet all of these while they are in a core's cache.
constexpr int64_t SLAB_BYTES = 512 << 10, BLOCK_BYTES = 256 << 10;
constexpr int64_t DYNAMIC_SLAB_BYTES = 1 << 20, DYNAMIC_BLOCK_BYTES = 128 << 10;
constexpr int64_t PACKED_INPUTS = 2048;       // beyond which rows and weights leave the cache
constexpr int64_t PACKED_BYTES = 128 << 10;   // of weights that are packed for one call
constexpr int64_t MANY_ROWS = 128;            // that leave a core's first cache while a block meets them
constexpr int64_t THREAD_BYTES = 64 << 10;  // of weights, read once, for which a thread pays

inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
inline int64_t whole(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// 64-byte aligned memory, null where there is none.
struct Memory {
  void* start;
  explicit Memory(int64_t size) : start(std::malloc(size + 64)) {}
  ~Memory() { std::free(start); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* get() const {
    auto place = reinterpret_cast<uintptr_t>(start);
    return start ? reinterpret_cast<uint8_t*>((place + 63) / 64 * 64) : nullptr;
  }
};

// How many threads pay for reading the weights of `rows` rows.
inline int threads_for(int64_t rows, int64_t out, int64_t row_bytes, int threads) {
  return static_cast<int>(most(1, least(threads, out * row_bytes * (1 + rows / 4) / THREAD_BYTES)));
}

// Outputs of a block: a multiple of those of a tile; every thread gets some blocks.
inline int64_t outs_of_block(int64_t out, int64_t row_bytes, int64_t block_bytes, int threads) {
  return most(8, least(most(block_bytes / most(row_bytes, 1), 8), out / (threads * 4)) / 8 * 8);
}

// One slab of rows: all are rounded, then blocks of outputs multiplied.
template <typename Job, typename Multiply>
struct Slab {
  const Job& job;
  void (*round)(const Job&, int64_t, int64_t);
  const Multiply& multiply;  // (row, rows, out, outs, worker)
  int64_t outs, row, rows;
};

template <typename Job, typename Multiply>
void run_slabs(const Job& j, void (*round)(const Job&, int64_t, int64_t), const Multiply& multiply,
               int64_t most_rows, int64_t outs, int threads) {
  using Some = Slab<Job, Multiply>;
  Some slab = {j, round, multiply, outs, 0, 0};
  for (; slab.row < j.rows; slab.row += most_rows) {
    slab.rows = least(most_rows, j.rows - slab.row);
    const int64_t roundings = (slab.rows + 3) / 4;
    for_each<Some>(roundings > 2 ? threads : 1, slab, roundings, [](const Some& s, int64_t i, int64_t) {
      for (int64_t m = i * 4; m < least(i * 4 + 4, s.rows); m++) s.round(s.job, s.row + m, m);
    });
    for_each<Some>(threads, slab, (j.out + outs - 1) / outs, [](const Some& s, int64_t i, int64_t worker) {
      const int64_t n = i * s.outs;
      s.multiply(s.row, s.rows, n, least(s.outs, s.job.out - n), worker);
    });
  }
}

// Whether it pays to pack a weight for one call: sums of few inputs cost much where a vector holds one output's.
inline bool packing_pays(const Dynamic& j) { return j.in <= PACKED_INPUTS && j.rows >= 8 + j.in / 24; }

using RoundRows = void (*)(const Dynamic&, int64_t, int64_t);

// Rounded rows of a slab times blocks of outputs whose weights are packed; false where memory is short.
inline bool multiply_packed(Dynamic j, RoundRows round, int64_t most_rows, int threads) {
  const Kernels& use = kernels();
  const int64_t groups_bytes = whole(j.in, 4) * LANES;  // of 16 outputs
  threads = threads_for(j.rows, j.out, j.in, threads);
  const int64_t packed_bytes = j.rows < MANY_ROWS ? PACKED_BYTES / 4 : PACKED_BYTES;
  const int64_t blocks = least(packed_bytes / groups_bytes, whole(j.out, LANES) / LANES / threads);
  const int64_t outs = most(1, blocks / 2) * 2 * LANES;
  j.ahead = threads * outs;
  const int64_t bytes = whole(outs / LANES * groups_bytes + outs * 4, 64);
  const Memory room(threads * bytes);
  if (!room.start) return false;
  const auto multiply = [&](int64_t row, int64_t rows, int64_t n, int64_t some, int64_t worker) {
    use.multiply_packed(j, row, rows, n, some, room.get() + worker * bytes);
    if (j.function) use.apply_function(j, row, rows, n, some);
  };
  run_slabs(j, round, multiply, most_rows, outs, threads);
  return true;
}

template <typename Job>
void round_nothing(const Job&, int64_t, int64_t) {}

// Dynamic int8 products of one x and several weights; false where memory is short. Rows are rounded once
// where one slab has them.
inline bool multiply_rounded(Dynamic* jobs, int64_t count, int threads) {
  const Kernels& use = kernels();
  const int64_t rows = jobs->rows, padded = whole(jobs->in, 64);
  const int64_t slab_rows = most(4, least(rows, DYNAMIC_SLAB_BYTES / most(padded, 1) / 4 * 4));
  const Memory codes(slab_rows * padded), numbers(slab_rows * 8);
  if (!codes.start || !numbers.start) return false;
  for (int64_t i = 0; i < count; i++) {
    Dynamic& j = jobs[i];
    j.padded = padded, j.codes = codes.get();
    j.scales = reinterpret_cast<float*>(numbers.get());
    j.zeros = reinterpret_cast<int32_t*>(numbers.get()) + slab_rows;
    const RoundRows round = i && rows <= slab_rows ? round_nothing<Dynamic> : use.round_dynamic;
    if (use.depth == 4 && packing_pays(j)) {
      if (!multiply_packed(j, round, slab_rows, threads)) return false;
      continue;
    }
    const int some = threads_for(rows, j.out, j.in, threads);
    const auto multiply = [&](int64_t row, int64_t some_rows, int64_t n, int64_t outs, int64_t) {
      use.multiply_dynamic(j, row, some_rows, n, outs);
      if (j.function) use.apply_function(j, row, some_rows, n, outs);
    };
    run_slabs(j, round, multiply, slab_rows, outs_of_block(j.out, j.in, DYNAMIC_BLOCK_BYTES, some), some);
  }
  return true;
}

}  // namespace torch_quant
