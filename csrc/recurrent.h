// Recurrent layers with int8 weights: what goes in and the hidden state are rounded at each step.
//
//   gates[t] = x[t] W_ih' + b_ih      products of integers, for many steps at a time
//   state    = h W_hh' + b_hh         products of integers, a step at a time
//   h, c     = what the cell makes of both, in float
//
// Each row of x and of h has a scale and a zero point of its own, so that no row depends on others.
#pragma once

#include <atomic>
#include <thread>

#include "kernels.h"

namespace torch_quant {

constexpr int64_t MOST_SHARES = 16;
constexpr int64_t PATIENCE = 4096;  // looks before a thread takes the slice of one that has not come

enum Cell : int64_t { LSTM = 0, GRU = 1, TANH = 2, RELU = 3 };

// One direction of a layer.
struct Direction {
  const int8_t *w_ih, *w_hh;   // [gates * size, in], [gates * size, size]
  const float *s_ih, *s_hh;    // [gates * size]
  const float *b_ih, *b_hh;    // likewise, or null
  float* h;                    // [batch, size]: the state before, then the one behind
  float* c;                    // likewise, of an LSTM
};

// One layer, as the caller gives it: all members have 8 bytes. Sequences are sorted by length: those that
// a step has come first.
struct RecurrentCall {
  const float* x;              // [rows, in]
  const int64_t* first;        // [steps + 1]: at which row a step begins
  float* y;                    // [rows, directions * size]
  Direction of[2];             // the second runs backwards
  int64_t steps, batch, in, size, directions, cell, is_signed;
};

// Threads that share the steps of one item. Each step has as many slices of the state, which whoever is there
// takes, one's own first. Nobody waits for a thread that has not come: its slices are taken by others.
struct alignas(64) Shared {
  std::atomic<int64_t> done{0};     // slices of all steps so far
  std::atomic<int64_t> taken[MOST_SHARES] = {};  // steps of which this slice was taken

  void begin() {
    done = 0;
    for (auto& each : taken) each = 0;
  }
  bool complete(int64_t slices) const { return done.load(std::memory_order_acquire) >= slices; }
  // Returns when so many slices are done, or after `patience` looks, if that is not 0.
  void wait(int64_t slices, int64_t patience) const {
    for (int64_t looks = 1; !complete(slices) && looks != patience; looks++)
      if (looks % 1024 == 0) std::this_thread::yield();
  }
  bool take(int64_t slice, int64_t step) {
    return taken[slice].compare_exchange_strong(step, step + 1, std::memory_order_acq_rel);
  }
  void finish() { done.fetch_add(1, std::memory_order_acq_rel); }
};

constexpr int64_t STEP_OUTS = 128;  // of a packed matrix, which meet all rows of a step while they are cached

struct Recurrent : RecurrentCall {
  int64_t wide, padded;        // gates * size; `size`, up to a multiple of 64
  int64_t blocks, block;       // of a batch, and sequences of one
  int64_t shares, units;       // threads that share the steps of a block, and numbers of the state of each
  Shared* shared;              // [directions * blocks], where there are several
  float* states;               // [directions * blocks, 2, block, size]: h before steps with an even number, an odd one
  int64_t begin[2], end[2];    // the steps whose gates are there
  const float* gates[2];       // [rows of them, wide]
  int32_t* sums;               // [directions * blocks, wide]: of a row of W_hh
  int64_t* known;              // [directions * blocks, shares]: whether these are there
  uint8_t* scratch;            // [threads, scratch_bytes]
  int64_t scratch_bytes;       // codes, state, scales, zero points of a block, and sums of a tile
  const uint8_t* packed[2];    // W_hh as product.h packs a right matrix; null where that does not pay
  const int32_t* of_weights[2];  // [wide, up to a multiple of 16]: sums of its rows
};

}  // namespace torch_quant
