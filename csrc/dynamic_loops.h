// Dynamic int8 products of many rows, over the vectors of one instruction set. A block of the weight is
// packed as the right matrix of a product is (product.h), which pays where hundreds of rows meet it; the
// numbers are those of `multiply_dynamic`. Whoever includes this file has included static_loops.h before.

// `rows` rounded rows, the first of which is `row`, times outputs from `n` on.
void multiply_packed(const Dynamic& j, int64_t row, int64_t rows, int64_t n, int64_t outs, uint8_t* room) {
  const int64_t groups = groups_of(j.in), blocks = (outs + LANES - 1) / LANES, wide = blocks * LANES;
  uint8_t* packed = room;
  auto* of_weights = reinterpret_cast<int32_t*>(packed + blocks * groups * 64);
  int32_t* sums = of_weights + wide;
  pack_weight(j.weight + n * j.in, outs, j.in, -1, packed, of_weights);
  for (int64_t m = 0; m < rows; m += TILE_ROWS) {
    const int64_t some = rows - m < TILE_ROWS ? rows - m : TILE_ROWS;
    product_of(some, j.codes + m * j.padded, j.padded, packed, groups * 64, groups, blocks, nullptr, sums, wide);
    for (int64_t r = 0; r < some; r++)
      finish_dynamic(j, sums + r * wide, of_weights, m + r, row + m + r, n, outs);
  }
}
