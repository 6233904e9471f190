// The steps of recurrent layers, over the vectors of one instruction set; recurrent.h says what they are.
// Whoever includes this file has included row_loops.h before.

// 2^x for -126 <= x <= 126, to 2e-7: 2^n times the series of what is left, -0.5 to 0.5.
inline F32 exact_two_to(F32 x) {
  const F32 moved = plus(x, all(12582912.0f));  // the last bits are those of n
  const F32 f = minus(x, minus(moved, all(12582912.0f)));
  F32 y = plus_product(all(0.0013333558f), all(0.00015403530f), f);
  y = plus_product(all(0.0096181291f), y, f);
  y = plus_product(all(0.055504109f), y, f);
  y = plus_product(all(0.24022651f), y, f);
  y = plus_product(all(0.69314718f), y, f);
  y = plus_product(all(1.0f), y, f);
  return from_bits(add(as_bits(y), shifted23(as_bits(moved))));
}

// 1 / (1 + exp(-x)), of NaN itself.
inline F32 sigmoid(F32 x) {
  const F32 near = least(largest(product(x, all(static_cast<float>(-LOG2E))), all(-126.0f)), all(126.0f));
  const F32 y = reciprocal(plus(all(1.0f), exact_two_to(near)));
  return pick_between(x, all(-INFINITE), all(INFINITE), y, x);
}

inline F32 tanh_of(F32 x) { return plus_product(all(-1.0f), sigmoid(plus(x, x)), all(2.0f)); }

// What a cell makes of the gates of one row, 16 numbers of the state at a time.
template <int CELL>
inline void finish_step(const float* gates, const float* state, float* h, float* c, float* y, int64_t size) {
  for (int64_t k = 0; k < size; k += LANES) {
    const int64_t left = size - k;
    const auto gate = [&](int64_t i) {
      return plus(take(gates + i * size + k, left), take(state + i * size + k, left));
    };
    F32 next;
    if (CELL == LSTM) {
      const F32 cell = plus_product(product(sigmoid(gate(1)), take(c + k, left)), sigmoid(gate(0)),
                                    tanh_of(gate(2)));
      put(c + k, cell, left);
      next = product(sigmoid(gate(3)), tanh_of(cell));
    } else if (CELL == GRU) {
      const F32 reset = sigmoid(gate(0)), update = sigmoid(gate(1));
      const F32 made = tanh_of(plus_product(take(gates + 2 * size + k, left), reset,
                                            take(state + 2 * size + k, left)));
      next = plus_product(made, update, minus(take(h + k, left), made));
    } else if (CELL == TANH) {
      next = tanh_of(gate(0));
    } else {
      next = largest(zeros(), gate(0));  // NaN stays
    }
    put(h + k, next, left);
    put(y + k, next, left);
  }
}

inline void finish_step(int64_t cell, const float* gates, const float* state, float* h, float* c, float* y,
                        int64_t size) {
  switch (cell) {
    case LSTM: return finish_step<LSTM>(gates, state, h, c, y, size);
    case GRU: return finish_step<GRU>(gates, state, h, c, y, size);
    case TANH: return finish_step<TANH>(gates, state, h, c, y, size);
    default: return finish_step<RELU>(gates, state, h, c, y, size);
  }
}

template <bool FIRST, int M>
inline void state_rows(const Dynamic& j, int64_t& m, int64_t n, int64_t end, int32_t* sums) {
  if (FIRST && m + M <= j.rows) {
    dynamic_tiles<true, M>(j, m, m, n, end, sums);
    m += M;
  }
  for (; m + M <= j.rows; m += M) dynamic_tiles<false, M>(j, m, m, n, end, sums);
}

// The state of some rows times the weight, a block of it after the other; `sums` are made with the FIRST.
template <bool FIRST>
inline void multiply_state(const Dynamic& j, int32_t* sums) {
  for (int64_t n = 0; n < j.out; n += DYNAMIC_OUTS) {
    const int64_t end = n + DYNAMIC_OUTS < j.out ? n + DYNAMIC_OUTS : j.out;
    int64_t m = 0;
    bool first = FIRST;
    if (MR <= j.rows) {
      first ? state_rows<true, MR>(j, m, n, end, sums + n) : state_rows<false, MR>(j, m, n, end, sums + n);
      first = false;
    }
    if (MR > 2 && m + 2 <= j.rows) {
      first ? state_rows<true, 2>(j, m, n, end, sums + n) : state_rows<false, 2>(j, m, n, end, sums + n);
      first = false;
    }
    first ? state_rows<true, 1>(j, m, n, end, sums + n) : state_rows<false, 1>(j, m, n, end, sums + n);
  }
}

// The same with a matrix that is packed.
inline void multiply_state(const Dynamic& j, const uint8_t* packed, const int32_t* of_weights, int32_t* sums) {
  const int64_t groups = groups_of(j.in);
  for (int64_t n = 0; n < j.out; n += STEP_OUTS) {
    const int64_t outs = n + STEP_OUTS < j.out ? STEP_OUTS : j.out - n;
    for (int64_t m = 0; m < j.rows; m += TILE_ROWS) {
      const int64_t rows = j.rows - m < TILE_ROWS ? j.rows - m : TILE_ROWS;
      product_of(rows, j.codes + m * j.padded, j.padded, packed + n / LANES * groups * 64, groups * 64, groups,
                 (outs + LANES - 1) / LANES, nullptr, sums, STEP_OUTS);
      for (int64_t r = 0; r < rows; r++)
        finish_dynamic(j, sums + r * STEP_OUTS, of_weights + n, m + r, m + r, n, outs);
    }
  }
}

// All steps whose gates are there, of one direction and one block of sequences.
void run_steps(const Recurrent& j, int64_t item, int64_t worker) {
  const int64_t d = item / j.blocks, from = item % j.blocks * j.block;
  const int64_t to = from + j.block < j.batch ? from + j.block : j.batch;
  const Direction& of = j.of[d];
  uint8_t* room = j.scratch + worker * j.scratch_bytes;
  Dynamic s = {};
  s.x = of.h + from * j.size;
  s.weight = of.w_hh, s.scale = of.s_hh, s.bias = of.b_hh;
  s.in = j.size, s.out = j.wide, s.is_signed = static_cast<int>(j.is_signed), s.padded = j.padded;
  s.y = reinterpret_cast<float*>(room);
  s.codes = room + j.block * j.wide * 4;
  s.scales = reinterpret_cast<float*>(s.codes + j.block * j.padded);
  s.zeros = reinterpret_cast<int32_t*>(s.scales + j.block);
  auto* tile = reinterpret_cast<int32_t*>(room + j.scratch_bytes) - STEP_OUTS * TILE_ROWS;
  int32_t* sums = j.sums + item * j.wide;
  const int64_t origin = j.first[j.begin[d]];
  for (int64_t i = 0; i < j.end[d] - j.begin[d]; i++) {
    const int64_t t = d ? j.end[d] - 1 - i : j.begin[d] + i, row = j.first[t];
    const int64_t present = j.first[t + 1] - row, last = present < to ? present : to;
    if (last <= from) continue;
    s.rows = last - from;
    for (int64_t m = 0; m < s.rows; m++) round_dynamic(s, m, m);
    if (j.packed[d]) {
      multiply_state(s, j.packed[d], j.of_weights[d], tile);
    } else if (j.known[item]) {
      multiply_state<false>(s, sums);
    } else {
      multiply_state<true>(s, sums);
      j.known[item] = 1;
    }
    for (int64_t b = from; b < last; b++) {
      const float* gates = j.gates[d] + (row + b - origin) * j.wide;
      float* y = j.y + (row + b) * j.directions * j.size + d * j.size;
      finish_step(j.cell, gates, s.y + (b - from) * j.wide, of.h + b * j.size,
                  of.c ? of.c + b * j.size : nullptr, y, j.size);
    }
  }
}
