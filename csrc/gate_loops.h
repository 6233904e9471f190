// Floats that meet, over the vectors of one instruction set; gate.h says what they are. Whoever includes
// this file has included static_loops.h before.

template <int FUNCTION>
inline void gate_with(const Gate& j, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; k += LANES) {
    const int64_t left = end - k;
    const F32 x = function_of<FUNCTION>(take(j.gate + k, left), zeros(), all(INFINITE));
    put(j.gate + k, j.up ? product(x, take(j.up + k, left)) : x, left);
  }
}

// A piece of them.
void gate(const Gate& j, int64_t item, int64_t) {
  const int64_t begin = item * FLOATS_OF_ITEM;
  const int64_t end = begin + FLOATS_OF_ITEM < j.size ? begin + FLOATS_OF_ITEM : j.size;
  switch (j.function) {
    case SWISH: return gate_with<SWISH>(j, begin, end);
    case ERF_GELU: return gate_with<ERF_GELU>(j, begin, end);
    case TANH_GELU: return gate_with<TANH_GELU>(j, begin, end);
    case CLAMP: return gate_with<CLAMP>(j, begin, end);
    default: return gate_with<NO_FUNCTION>(j, begin, end);
  }
}
