// Sends this rank's summaries: into the memory of all peers that they reach (channel.h).
#include "device.h"

using namespace lasp;

namespace {

constexpr int SENDERS = 512;  // threads of a block
// Forward waits for it; backward, from Hopper on, computes meanwhile, for which it leaves room.
constexpr int FORWARD_BLOCKS = PARTS, BACKWARD_BLOCKS = 4;
static_assert(PARTS % BACKWARD_BLOCKS == 0);

// This part's share of what unit `place` sends: read once, and written to every rank that it reaches, `to(rank)`, which
// is aligned; `from` may lie anywhere.
template <class T, class Target>
__device__ void send(const Channel& c, int place, int part, const T* from, int64_t count, const Target& to) {
  constexpr int N = WIDE<T>, AT_ONCE = 8, STRIDE = PARTS * SENDERS;
  const int64_t first = part * SENDERS + threadIdx.x, packs = aligned(from) ? count / N : 0;
  const auto each = [&](auto&& store) {
    for (int i = 1; i <= c.layout.ranks; ++i) {
      const int rank = (c.rank + i) % c.layout.ranks;  // not all to the same rank at the same time
      if (c.reaches(place, rank)) store(to(rank));
    }
  };
  for (int64_t i = first; i < packs; i += AT_ONCE * STRIDE) {
    Pack<T, N> some[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n)
      if (i + n * STRIDE < packs) some[n] = ((const Pack<T, N>*)from)[i + n * STRIDE];
    each([&](T* target) {
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n)
        if (i + n * STRIDE < packs) ((Pack<T, N>*)target)[i + n * STRIDE] = some[n];
    });
  }
  for (int64_t i = packs * N + first; i < count; i += STRIDE) each([&](T* target) { target[i] = from[i]; });
}

template <class T>
__device__ void publish_part(const Channel& c, int part, const T* states, const T* transitions) {
  const uint32_t epoch = c.local[part] + 1;
  const int64_t state_size = c.shape.state_size(), transition_size = c.shape.transition_size();
  for (int place = 0; place < c.layout.units_per_rank; ++place) {
    if (c.spread[place] == 0) continue;
    const int unit = c.layout.unit(c.rank, place);
    send(c, place, part, states + place * state_size, state_size,
         [&](int to) { return Slot<T>(c, to, epoch).state(unit); });
    if (transition_size && c.passes[place])
      send(c, place, part, transitions + place * transition_size, transition_size,
           [&](int to) { return Slot<T>(c, to, epoch).transition(unit); });
  }
  __syncthreads();  // what a thread releases includes what came before this in the others
  if (threadIdx.x == 0) c.local[part] = epoch;
  for (int to = threadIdx.x; to < c.layout.ranks; to += SENDERS) store_release(c.signals(to, c.rank) + part, epoch);
}

template <class T>
__global__ void __launch_bounds__(SENDERS, 1)
    publish(const __grid_constant__ Channel c, const T* states, const T* transitions) {
  follow();
  for (int part = blockIdx.x; part < PARTS; part += gridDim.x) publish_part(c, part, states, transitions);
}

}  // namespace

extern "C" int lasp_publish(const Channel* c, int doubles, const void* states, const void* transitions, void* stream) {
  const int blocks = c->backward && __CUDA_ARCH_LIST__ >= 900 ? BACKWARD_BLOCKS : FORWARD_BLOCKS;
  if (doubles)
    return launch(publish<double>, blocks, SENDERS, 0, stream, *c, (const double*)states, (const double*)transitions);
  return launch(publish<float>, blocks, SENDERS, 0, stream, *c, (const float*)states, (const float*)transitions);
}
