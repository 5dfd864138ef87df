// Combines what has come in (channel.h): here where transitions are no matrices, in chain.cu where they are.
#include "device.h"

using namespace lasp;

namespace {

constexpr int64_t MOST_BLOCKS = 512;  // each of them waits for all signals

// A sum with weights. N divides V; blockIdx.y is the unit's place.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1) weigh(const __grid_constant__ Channel c, T* arrived) {
  follow();
  const uint32_t epoch = c.epoch();
  const bool all = all_came(c, epoch);
  const Slot<T> slot(c, c.rank, epoch);
  const int place = blockIdx.y, reach = all ? c.reach[place] : 0, unit = c.layout.unit(c.rank, place);
  const int64_t size = c.shape.state_size();
  const int64_t first = N * ((int64_t)blockIdx.x * THREADS + threadIdx.x), stride = N * (int64_t)gridDim.x * THREADS;
  for (int64_t e = first; e < size; e += stride) {
    const int row = (uint32_t)e / (uint32_t)c.shape.V;
    Pack<T, N> x;
    for (int n = 0; n < N; ++n) x.at[n] = all ? T(0) : T(NAN);
    if (reach > 0) x = *(const Pack<T, N>*)(slot.state(unit - reach * c.step()) + e);
#pragma unroll 4
    for (int i = reach - 1; i > 0; --i) {
      const int from = unit - i * c.step();
      const auto state = *(const Pack<T, N>*)(slot.state(from) + e);
      const T w = weight(c.shape, slot.transition(from), row);
      for (int n = 0; n < N; ++n) x.at[n] = state.at[n] + w * x.at[n];
    }
    store(arrived + place * size + e, x);
  }
}

template <class T, int N>
int launch_weigh(const Channel& c, T* arrived, void* stream) {
  const int64_t size = c.shape.state_size(), blocks = (size / N + THREADS - 1) / THREADS;
  if (size >= int64_t(1) << 32) return cudaErrorInvalidValue;
  const dim3 grid(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, c.layout.units_per_rank);
  return launch(weigh<T, N>, grid, THREADS, 0, stream, c, arrived);
}

template <class T>
int collect(const Channel& c, T* arrived, void* stream) {
  if (c.shape.transition == MATRIX) return collect_matrices(c, arrived, stream);
  constexpr int N = WIDE<T>;
  const bool wide = c.shape.V % N == 0 && aligned(arrived);
  return wide ? launch_weigh<T, N>(c, arrived, stream) : launch_weigh<T, 1>(c, arrived, stream);
}

}  // namespace

extern "C" int lasp_collect(const Channel* c, int doubles, void* arrived, void* stream) {
  return doubles ? collect(*c, (double*)arrived, stream) : collect(*c, (float*)arrived, stream);
}
