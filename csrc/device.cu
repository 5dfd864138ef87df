// The exchange on GPUs whose memory all peers can write: `publish` sends, `weigh` or `chain` collects (channel.h).
#include <cuda_pipeline.h>

#include "channel.h"

using namespace lasp;

namespace {

constexpr int SENDERS = 512, THREADS = 256;  // threads of a block of publish, and of the others
constexpr int64_t MOST_BLOCKS = 512;         // of weigh: each of them waits for all signals
// Of publish: forward waits for it; backward, from Hopper on, computes meanwhile, for which it leaves room.
constexpr int FORWARD_BLOCKS = PARTS, BACKWARD_BLOCKS = 4;
static_assert(PARTS % BACKWARD_BLOCKS == 0);

// N numbers that are loaded and stored at once.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

template <class T, int N>
__device__ void store(T* to, const Pack<T, N>& x) {
  if constexpr (sizeof(x) == 16)
    __stcg((int4*)to, *(const int4*)&x);  // a plain assignment is compiled to four
  else
    *(Pack<T, N>*)to = x;
}

template <class T>
constexpr int WIDE = 16 / sizeof(T);

template <class T>
__host__ __device__ bool aligned(const T* x) {
  return (uintptr_t)x % 16 == 0;
}

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

// Kernels here may begin while the one before ends, and do nothing before that has; then they let the next one begin,
// which may go on without waiting if it has nothing to do with them: lasp/kernels/triton/pdl.py.
__device__ void follow() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
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

// Whether all parts of all ranks' messages are here; the same for all threads of a block.
__device__ bool all_came(const Channel& c, uint32_t epoch) {
  bool here = true;
  for (int i = threadIdx.x; i < c.layout.ranks * PARTS; i += THREADS) here = came(c, i, epoch) && here;
  return __syncthreads_and(here);
}

// Where transitions are no matrices: a sum with weights. N divides V; blockIdx.y is the unit's place.
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

// Where transitions are matrices: unit by unit, x becomes S + A x (backward S + A^T x). A block has one head and up to
// COLUMNS columns of the state, for all of K. It walks through A in pieces, STAGES of which are in shared memory: ROWS
// rows of the result, DEPTH rows of x. Its threads have 4 rows times 2 columns each.
constexpr int COLUMNS = 16, ROWS = 128, DEPTH = 32, STAGES = 4, PAIRS = COLUMNS / 2, GROUPS = THREADS / PAIRS;
static_assert(4 * GROUPS == ROWS);

// A piece as it lies in A, row by row: [ROWS, DEPTH] or, of the transposed, [DEPTH, ROWS]. The rows are padded so that
// threads side by side read from different banks.
template <class T, bool TRANSPOSED>
struct Piece {
  static constexpr int HEIGHT = TRANSPOSED ? DEPTH : ROWS, LENGTH = TRANSPOSED ? ROWS : DEPTH;
  static constexpr int PITCH = LENGTH + WIDE<T>, SIZE = HEIGHT * PITCH;

  // Starts to load the piece for the rows of the result from k on and the rows of x from j on; zeros beyond A's edges.
  // N numbers at once, which divides K.
  template <int N>
  static __device__ void fetch(T* piece, const T* a, int K, int k, int j) {
    const int top = TRANSPOSED ? j : k, left = TRANSPOSED ? k : j;
    for (int i = threadIdx.x; i < HEIGHT * LENGTH / N; i += THREADS) {
      const int row = i / (LENGTH / N), column = i % (LENGTH / N) * N;
      const bool inside = top + row < K && left + column < K;
      const T* from = inside ? a + (int64_t)(top + row) * K + left + column : a;
      __pipeline_memcpy_async(piece + row * PITCH + column, from, N * sizeof(T), inside ? 0 : N * sizeof(T));
    }
  }

  // Which row of the piece's result a thread's r-th is.
  static __device__ int row(int r) {
    const int group = threadIdx.x / PAIRS;
    return TRANSPOSED ? 4 * group + r : group + GROUPS * r;
  }

  // sum += piece x; x points to the first row and the thread's columns.
  static __device__ void multiply(const T* piece, const T* x, int width, T (&sum)[4][2]) {
#pragma unroll
    for (int j = 0; j < DEPTH; j += 4) {
      Pack<T, 4> a[4];  // of the thread's rows, columns j to j + 3; of the transposed, the other way round
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = *(const Pack<T, 4>*)(piece + (TRANSPOSED ? (j + i) * PITCH + row(0) : row(i) * PITCH + j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto y = *(const Pack<T, 2>*)(x + (j + i) * width);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const T factor = TRANSPOSED ? a[i].at[r] : a[r].at[i];
          sum[r][0] += factor * y.at[0];
          sum[r][1] += factor * y.at[1];
        }
      }
    }
  }
};

__host__ __device__ int cut(int length, int size) { return (length + size - 1) / size; }

// blockIdx.x is head * blocks per head + the block of `width` columns, blockIdx.y the unit's place.
template <class T, bool TRANSPOSED, int N>
__global__ void __launch_bounds__(THREADS, 1) chain(const __grid_constant__ Channel c, T* arrived, int width) {
  using Piece = Piece<T, TRANSPOSED>;
  extern __shared__ __align__(16) char memory[];
  follow();
  const uint32_t epoch = c.epoch();
  const bool all = all_came(c, epoch);

  const int K = c.shape.K, V = c.shape.V, place = blockIdx.y, reach = all ? c.reach[place] : 0;
  const int unit = c.layout.unit(c.rank, place), depths = cut(K, DEPTH), passes = cut(K, ROWS);
  const int64_t h = blockIdx.x / cut(V, width), first = blockIdx.x % cut(V, width) * width;
  const int column = threadIdx.x % PAIRS * 2;
  T *pieces = (T*)memory, *x = pieces + STAGES * Piece::SIZE, *y = x + depths * DEPTH * width;
  const Slot<T> slot(c, c.rank, epoch);
  const auto state = [&](int i) { return slot.state(unit - i * c.step()) + h * K * V + first; };

  const int total = (reach - 1) * passes * depths;  // pieces: of one unit after the other, then of k, then of j
  const auto fetch = [&](int n) {
    if (n < total) {
      const int i = reach - 1 - n / (passes * depths), k = n / depths % passes * ROWS, j = n % depths * DEPTH;
      const T* a = slot.transition(unit - i * c.step()) + h * K * K;
      Piece::template fetch<N>(pieces + n % STAGES * Piece::SIZE, a, K, k, j);
    }
    __pipeline_commit();
  };
  for (int n = 0; n < STAGES - 1; ++n) fetch(n);

  for (int e = threadIdx.x; e < depths * DEPTH * width; e += THREADS) {
    const bool inside = e < K * width && first + e % width < V;
    x[e] = all ? T(0) : T(NAN);
    if (reach > 0 && inside) x[e] = state(reach)[(int64_t)(e / width) * V + e % width];
    y[e] = T(0);
  }
  T sum[4][2], own[4][2];
  for (int n = 0; n < total; ++n) {
    const int i = reach - 1 - n / (passes * depths), k = n / depths % passes * ROWS, j = n % depths * DEPTH;
    const auto each = [&](auto&& act) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (const int row = k + Piece::row(r); row < K && column + s < width && first + column + s < V)
            act(row, column + s, sum[r][s], own[r][s]);
    };
    if (j == 0) {
      for (auto& pair : sum) pair[0] = pair[1] = T(0);
      each([&](int row, int s, T&, T& own) { own = state(i)[(int64_t)row * V + s]; });
    }
    __pipeline_wait_prior(STAGES - 2);
    __syncthreads();
    fetch(n + STAGES - 1);
    if (column < width) Piece::multiply(pieces + n % STAGES * Piece::SIZE, x + j * width + column, width, sum);
    if (j / DEPTH == depths - 1) {
      each([&](int row, int s, T& sum, T& own) { y[row * width + s] = own + sum; });
      if (k / ROWS == passes - 1) {
        T* swapped = x;
        x = y;
        y = swapped;
      }
    }
  }
  __syncthreads();
  T* out = arrived + place * c.shape.state_size() + h * K * V + first;
  for (int e = threadIdx.x; e < K * width; e += THREADS)
    if (first + e % width < V) out[(int64_t)(e / width) * V + e % width] = x[e];
}

template <class... Arguments>
int launch(void (*kernel)(Arguments...), dim3 blocks, int threads, size_t shared, void* stream,
           Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream;
#if __CUDA_ARCH_LIST__ >= 900
  config.attrs = &early;
  config.numAttrs = 1;
#endif
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, bool TRANSPOSED, int N>
int launch_chain(const Channel& c, T* arrived, void* stream) {
  int device, most, width = COLUMNS;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto shared = [&] {
    return (int)sizeof(T) * (STAGES * Piece<T, TRANSPOSED>::SIZE + 2 * cut(c.shape.K, DEPTH) * DEPTH * width);
  };
  while (width > 2 && shared() > most) width /= 2;
  const auto kernel = chain<T, TRANSPOSED, N>;
  if (const int code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared())) return code;
  const dim3 blocks(c.shape.H * cut(c.shape.V, width), c.layout.units_per_rank);
  return launch(kernel, blocks, THREADS, shared(), stream, c, arrived, width);
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
  constexpr int N = WIDE<T>;
  const bool matrix = c.shape.transition == MATRIX;
  const bool wide = matrix ? c.shape.K % N == 0 : c.shape.V % N == 0 && aligned(arrived);
  const auto launch = !matrix      ? (wide ? launch_weigh<T, N> : launch_weigh<T, 1>)
                      : c.backward ? (wide ? launch_chain<T, true, N> : launch_chain<T, true, 1>)
                                   : (wide ? launch_chain<T, false, N> : launch_chain<T, false, 1>);
  return launch(c, arrived, stream);
}

}  // namespace

extern "C" int lasp_publish(const Channel* c, int doubles, const void* states, const void* transitions, void* stream) {
  const int blocks = c->backward && __CUDA_ARCH_LIST__ >= 900 ? BACKWARD_BLOCKS : FORWARD_BLOCKS;
  if (doubles)
    return launch(publish<double>, blocks, SENDERS, 0, stream, *c, (const double*)states, (const double*)transitions);
  return launch(publish<float>, blocks, SENDERS, 0, stream, *c, (const float*)states, (const float*)transitions);
}

extern "C" int lasp_collect(const Channel* c, int doubles, void* arrived, void* stream) {
  return doubles ? collect(*c, (double*)arrived, stream) : collect(*c, (float*)arrived, stream);
}
