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

// What a cell makes of the gates of one row, 16 numbers of the state at a time, from `begin` to `end`. What is next
// goes to `y`, to h and to `copy`, if there is one.
template <int CELL>
inline void finish_step(const float* gates, const float* state, float* h, float* c, float* y, float* copy,
                        int64_t size, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; k += LANES) {
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
    if (copy) put(copy + k, next, left);
  }
}

inline void finish_step(int64_t cell, const float* gates, const float* state, float* h, float* c, float* y,
                        float* copy, int64_t size, int64_t begin, int64_t end) {
  switch (cell) {
    case LSTM: return finish_step<LSTM>(gates, state, h, c, y, copy, size, begin, end);
    case GRU: return finish_step<GRU>(gates, state, h, c, y, copy, size, begin, end);
    case TANH: return finish_step<TANH>(gates, state, h, c, y, copy, size, begin, end);
    default: return finish_step<RELU>(gates, state, h, c, y, copy, size, begin, end);
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

// The state of some rows times outputs from `begin` to `stop`, a block of the weight after the other; `sums` are
// made with the FIRST.
template <bool FIRST>
inline void multiply_state(const Dynamic& j, int64_t begin, int64_t stop, int32_t* sums) {
  for (int64_t n = begin; n < stop; n += DYNAMIC_OUTS) {
    const int64_t end = n + DYNAMIC_OUTS < stop ? n + DYNAMIC_OUTS : stop;
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

// The same with a matrix that is packed; `begin` is the first output of a block of it.
inline void multiply_state(const Dynamic& j, int64_t begin, int64_t stop, const uint8_t* packed,
                           const int32_t* of_weights, int32_t* sums) {
  const int64_t groups = groups_of(j.in);
  for (int64_t n = begin; n < stop; n += STEP_OUTS) {
    const int64_t outs = n + STEP_OUTS < stop ? STEP_OUTS : stop - n;
    for (int64_t m = 0; m < j.rows; m += TILE_ROWS) {
      const int64_t rows = j.rows - m < TILE_ROWS ? j.rows - m : TILE_ROWS;
      product_of(rows, j.codes + m * j.padded, j.padded, packed + n / LANES * groups * 64, groups * 64, groups,
                 (outs + LANES - 1) / LANES, nullptr, sums, STEP_OUTS);
      for (int64_t r = 0; r < rows; r++)
        finish_dynamic(j, sums + r * STEP_OUTS, of_weights + n, m + r, m + r, n, outs);
    }
  }
}

// A step of one direction and one block of sequences, as a worker has it.
struct Step {
  int64_t d, item, from, last;   // sequences
  int64_t row;                   // of x and y, where the step begins
  float* copies;                 // where the state goes that others read, or null
  int32_t* tile;
};

// Numbers of the state from `begin` to `end`: the products that their gates need, and what the cell makes of them.
inline void run_slice(const Recurrent& j, const Dynamic& s, const Step& at, int64_t slice, int64_t begin, int64_t end) {
  const Direction& of = j.of[at.d];
  int32_t* sums = j.sums + at.item * j.wide;
  int64_t* known = j.known + at.item * j.shares + slice;
  const bool whole = end - begin == j.size;  // then gates lie one behind the other
  const int64_t gates = whole ? 1 : j.wide / j.size;
  for (int64_t g = 0; g < gates; g++) {
    const int64_t n = g * j.size + begin, stop = whole ? j.wide : g * j.size + end;
    if (j.packed[at.d])
      multiply_state(s, n, stop, j.packed[at.d], j.of_weights[at.d], at.tile);
    else if (*known)
      multiply_state<false>(s, n, stop, sums);
    else
      multiply_state<true>(s, n, stop, sums);
  }
  *known = 1;
  const int64_t origin = j.first[j.begin[at.d]];
  for (int64_t b = at.from; b < at.last; b++) {
    const float* given = j.gates[at.d] + (at.row + b - origin) * j.wide;
    float* y = j.y + (at.row + b) * j.directions * j.size + at.d * j.size;
    finish_step(j.cell, given, s.y + (b - at.from) * j.wide, of.h + b * j.size, of.c ? of.c + b * j.size : nullptr, y,
                at.copies ? at.copies + (b - at.from) * j.size : nullptr, j.size, begin, end);
  }
}

// All steps whose gates are there, of one direction and one block of sequences, or a share of them.
void run_steps(const Recurrent& j, int64_t i, int64_t worker) {
  const int64_t item = i / j.shares, mine = i % j.shares;
  Step at = {};
  at.d = item / j.blocks, at.item = item, at.from = item % j.blocks * j.block;
  const int64_t to = at.from + j.block < j.batch ? at.from + j.block : j.batch;
  const Direction& of = j.of[at.d];
  uint8_t* room = j.scratch + worker * j.scratch_bytes;
  Dynamic s = {};
  s.x = of.h + at.from * j.size;
  s.weight = of.w_hh, s.scale = of.s_hh, s.bias = of.b_hh;
  s.in = j.size, s.out = j.wide, s.is_signed = static_cast<int>(j.is_signed), s.padded = j.padded;
  s.y = reinterpret_cast<float*>(room);
  s.codes = room + j.block * j.wide * 4;
  s.scales = reinterpret_cast<float*>(s.codes + j.block * j.padded);
  s.zeros = reinterpret_cast<int32_t*>(s.scales + j.block);
  at.tile = reinterpret_cast<int32_t*>(room + j.scratch_bytes) - STEP_OUTS * TILE_ROWS;
  const auto round = [&] {
    for (int64_t m = 0; m < s.rows; m++) round_dynamic(s, m, m);
  };
  int64_t step = 0;  // of those that have rows here
  for (int64_t k = 0; k < j.end[at.d] - j.begin[at.d]; k++) {
    const int64_t t = at.d ? j.end[1] - 1 - k : j.begin[0] + k;
    at.row = j.first[t];
    const int64_t present = j.first[t + 1] - at.row;
    at.last = present < to ? present : to;
    if (at.last <= at.from) continue;
    s.rows = at.last - at.from;
    if (j.shares == 1) {
      round();
      run_slice(j, s, at, 0, 0, j.size);
      continue;
    }
    Shared& shared = j.shared[item];
    const int64_t odd = (at.d ? j.steps - 1 - t : t) & 1;
    float* states = j.states + item * 2 * j.block * j.size;
    s.x = states + odd * j.block * j.size, at.copies = states + (1 - odd) * j.block * j.size;
    shared.wait(step * j.shares, 0);
    bool rounded = false;
    for (int64_t n = 0; n < j.shares; n++) {
      if (n == 1) shared.wait((step + 1) * j.shares, PATIENCE);
      const int64_t slice = (mine + n) % j.shares, begin = slice * j.units;
      if (!shared.take(slice, step)) continue;
      if (!rounded) round();
      rounded = true;
      run_slice(j, s, at, slice, begin, begin + j.units < j.size ? begin + j.units : j.size);
      shared.finish();
    }
    step++;
  }
}
