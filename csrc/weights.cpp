// Products with weights of 2, 4 or 8 bits: one, several of one input, and two with what stands between.
#include "gate.h"
#include "work.h"

namespace torch_quant {
namespace {

// As the caller gives it: all members have 8 bytes.
struct Weight {
  const uint8_t* codes;        // [out, row_bytes]
  const float* scale;          // [out, groups]
  const uint8_t* zero_points;  // [out, groups], or null
  const float* zeros;          // [out, groups], or null
  const float* bias;           // [out], or null
  int64_t out, row_bytes, groups, bits, is_signed, zero;
};

constexpr int64_t GATED_ROWS = 256;  // whose numbers between two products are kept

Linear job_of(const float* x, int64_t rows, int64_t in, const Weight& w, float* y) {
  Linear j = {};
  j.x = x, j.weight = w.codes, j.scale = w.scale;
  j.zero_points = w.zero_points, j.zeros = w.zeros, j.bias = w.bias, j.y = y;
  j.rows = rows, j.in = in, j.out = w.out, j.row_bytes = w.row_bytes, j.groups = w.groups;
  j.group = most(in / w.groups, 1);
  j.layout = w.bits == 2   ? BITS2
             : w.bits == 4 ? BITS4
             : w.groups == 1 || j.group % 128 == 0 ? BITS8 : BITS8_FINE;
  j.flip = w.is_signed ? 128 : 0;
  j.zero = static_cast<int>(w.zero);
  const Shape shape = shape_of(j.layout);
  j.chunk = shape.chunk(), j.record = shape.record();
  j.chunks = (in + j.chunk - 1) / j.chunk;
  j.even = j.chunk % j.group ? 0 : static_cast<int>(j.chunk / j.group);
  j.grouped = j.layout == BITS8_FINE || (w.groups > 1 && j.group % j.chunk);
  return j;
}

// Where the scales of a chunk are.
void fill_tables(Linear& j, int32_t* offset) {
  int32_t* first = offset + j.chunks * LANES;
  const int64_t lane = j.chunk / LANES;
  for (int64_t c = 0; c < j.chunks; c++) {
    first[c] = static_cast<int32_t>(j.groups == 1 ? 0 : c * j.chunk / j.group);
    for (int l = 0; l < LANES && j.grouped && (!c || !j.even); l++)
      offset[c * LANES + l] = static_cast<int32_t>((c * j.chunk + l * lane) / j.group - first[c]);
  }
  j.first = first, j.offset = offset;
}

// Whether the rounded rows of one are those of the other.
bool round_alike(const Linear& a, const Linear& b) {
  const bool varies = a.zero_points || a.zeros, other = b.zero_points || b.zeros;
  return a.layout == b.layout && varies == other && (varies || a.zero == b.zero);
}

// y = x @ weight.T + bias for each weight; false where memory is short. Rows are rounded once for all
// weights that want them alike, where one slab has them.
bool multiply_all(int threads, const float* x, int64_t rows, int64_t in, const Weight* weights, float* const* y,
                  int64_t count) {
  const Kernels& use = kernels();
  int64_t size = 0, tables = 0;
  const auto slab_of = [&](const Linear& j) {
    return most(4, least(rows, SLAB_BYTES / most(j.chunks * j.record, 1) / 4 * 4));
  };
  for (int64_t i = 0; i < count; i++) {
    const Linear j = job_of(x, rows, in, weights[i], y[i]);
    size = most(size, slab_of(j) * j.chunks * j.record);
    tables = most(tables, j.chunks * (LANES + 1) * 4 + 64);
  }
  const Memory memory(size), places(tables);
  if (!memory.start || !places.start) return false;
  Linear before = {};
  bool rounded = false;
  for (int64_t i = 0; i < count; i++) {
    Linear j = job_of(x, rows, in, weights[i], y[i]);
    if (!j.out) continue;
    fill_tables(j, reinterpret_cast<int32_t*>(places.get()));
    j.activations = memory.get();
    const int64_t slab_rows = slab_of(j), out = j.out;
    const bool known = rounded && rows <= slab_rows && round_alike(before, j);
    const int some = threads_for(rows, out, j.row_bytes, threads);
    const auto multiply = [&](int64_t row, int64_t some_rows, int64_t n, int64_t outs, int64_t) {
      use.multiply(j, row, some_rows, n, outs);
    };
    run_slabs(j, known ? round_nothing<Linear> : use.round, multiply, slab_rows,
              outs_of_block(out, j.row_bytes, BLOCK_BYTES, some), some);
    before = j, rounded = true;
  }
  return true;
}

}  // namespace
}  // namespace torch_quant

using namespace torch_quant;

// y = x @ weight.T + bias of weights with 2, 4 or 8 bits; 0, or 1 where memory is short.
EXPORT int torch_quant_linear(int threads, const float* x, const void* weight, const float* scale,
                              const uint8_t* zero_points, const float* zeros, const float* bias,
                              float* y, int64_t rows, int64_t in, int64_t out, int64_t row_bytes,
                              int64_t groups, int bits, int is_signed, int zero) {
  if (!rows || !out || !in) return 0;  // without inputs the caller knows the sums
  const Weight w = {static_cast<const uint8_t*>(weight), scale, zero_points, zeros, bias,
                    out, row_bytes, groups, bits, is_signed, zero};
  return multiply_all(threads, x, rows, in, &w, &y, 1) ? 0 : 1;
}

// The same of several weights of one x; `weights` points to so many of Weight.
EXPORT int torch_quant_linears(int threads, const float* x, const void* weights, const void* y, int64_t rows,
                               int64_t in, int64_t count) {
  if (!rows || !in) return 0;
  return multiply_all(threads, x, rows, in, static_cast<const Weight*>(weights),
                      static_cast<float* const*>(y), count) ? 0 : 1;
}

// y = (f(x @ first.T + bias) * (x @ second.T + bias)) @ last.T + bias, without the second factor where
// there are two weights; `weights` points to so many of Weight. 0, or 1 where memory is short.
EXPORT int torch_quant_gated(int threads, const float* x, const void* weights, float* y, int64_t rows, int64_t in,
                             int64_t count, int64_t function) {
  const auto* w = static_cast<const Weight*>(weights);
  const Weight& last = w[count - 1];
  const int64_t middle = w[0].out, both = count - 1;
  if (!rows || !in || !middle || !last.out) return 0;
  const int64_t most_rows = least(rows, GATED_ROWS);
  const Memory memory(most_rows * middle * both * 4);
  if (!memory.start) return 1;
  auto* first = reinterpret_cast<float*>(memory.get());
  float* between[2] = {first, first + most_rows * middle};
  for (int64_t row = 0; row < rows; row += most_rows) {
    const int64_t some = least(most_rows, rows - row), size = some * middle;
    if (!multiply_all(threads, x + row * in, some, in, w, between, both)) return 1;
    const Gate gate = {first, both > 1 ? between[1] : nullptr, size, function};
    const int64_t items = (size + FLOATS_OF_ITEM - 1) / FLOATS_OF_ITEM;
    for_each<Gate>(threads, gate, items, kernels().gate);
    float* result = y + row * last.out;
    if (!multiply_all(threads, first, some, middle, &last, &result, 1)) return 1;
  }
  return 0;
}
