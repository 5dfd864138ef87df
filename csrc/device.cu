// The exchange on GPUs whose memory all peers can read. Two kernels, one after the other: since `publish` waits for
// nobody and `collect` for the publishing of others alone, no number of resident blocks is needed for progress.
#include "channel.h"

using namespace lasp;

namespace {

constexpr int THREADS = 256, PUBLISHERS = 32, MOST_SHARED = 48 * 1024;

template <class T>
__global__ void publish(Channel c, const T* states, const T* transitions) {
  const uint32_t epoch = c.local[0] + 1;  // the last block to end changes it, when all have read it
  const int n = c.layout.units_per_rank;
  const int64_t state_size = n * c.shape.state_size(), size = state_size + n * c.shape.transition_size();
  T* message = (T*)c.slot(c.rank, epoch);
  for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < size; i += gridDim.x * THREADS)
    message[i] = i < state_size ? states[i] : transitions[i - state_size];
  __threadfence_system();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicAdd(c.local + 1, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) {
    c.local[0] = epoch;
    c.local[1] = 0;
  }
  __threadfence_system();
  for (int r = threadIdx.x; r < c.layout.ranks; r += THREADS) signal(c, r, epoch);
}

// One block for each unit of this rank, head, and `width` columns of the state.
template <class T>
__global__ void collect(Channel c, T* arrived, int width) {
  extern __shared__ char memory[];
  const uint32_t epoch = c.local[0];
  bool here = true;
  for (int r = threadIdx.x; r < c.layout.ranks; r += THREADS) here = came(c, r, epoch) && here;
  const bool all = __syncthreads_and(here);

  const int K = c.shape.K, V = c.shape.V, step = c.backward ? -1 : 1, place = blockIdx.z;
  const int64_t h = blockIdx.y, head = h * K * V, first_column = (int64_t)blockIdx.x * width;
  const int size = K * width, reach = c.reach[place], unit = c.layout.unit(c.rank, place);
  T *x = (T*)memory, *y = x + size;
  for (int e = threadIdx.x; e < size; e += THREADS) x[e] = all ? T(0) : T(NAN);
  for (int i = all ? reach : 0; i > 0; --i) {
    const int from = unit - i * step;
    const T *state = state_of<T>(c, from, epoch) + head, *a = transition_of<T>(c, from, epoch);
    __syncthreads();
    for (int e = threadIdx.x; e < size; e += THREADS) {
      const int k = e / width, v = e % width;
      if (first_column + v < V)
        y[e] = state[k * V + first_column + v] + (i == reach ? T(0) : through(c.shape, a, x, h, k, v, width, c.backward));
    }
    T* swapped = x;
    x = y;
    y = swapped;
  }
  T* out = arrived + place * c.shape.state_size() + head;
  for (int e = threadIdx.x; e < size; e += THREADS)
    if (first_column + e % width < V) out[(e / width) * V + first_column + e % width] = x[e];
}

template <class T>
int exchange(const Channel& c, const T* states, const T* transitions, T* arrived, cudaStream_t stream) {
  int width = 32;
  while (width > 1 && 2 * c.shape.K * width * (int)sizeof(T) > MOST_SHARED) width /= 2;
  const int shared = 2 * c.shape.K * width * (int)sizeof(T);
  const dim3 blocks((c.shape.V + width - 1) / width, c.shape.H, c.layout.units_per_rank);
  publish<T><<<PUBLISHERS, THREADS, 0, stream>>>(c, states, transitions);
  collect<T><<<blocks, THREADS, shared, stream>>>(c, arrived, width);
  return cudaGetLastError();
}

}  // namespace

extern "C" int lasp_exchange(const Channel* c, int doubles, const void* states, const void* transitions, void* arrived,
                             void* stream) {
  if (doubles)
    return exchange(*c, (const double*)states, (const double*)transitions, (double*)arrived, (cudaStream_t)stream);
  return exchange(*c, (const float*)states, (const float*)transitions, (float*)arrived, (cudaStream_t)stream);
}
