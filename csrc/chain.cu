// Combines what has come in where transitions are matrices (channel.h).
#include <cuda_pipeline.h>

#include "device.h"

using namespace lasp;

namespace {

// Unit by unit, x becomes S + A x (backward S + A^T x). A block has one head and up to COLUMNS columns of the state,
// for all of K. It walks through A in pieces, STAGES of which are in shared memory: ROWS rows of the result, DEPTH rows
// of x. Its threads have 4 rows times 2 columns each.
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

}  // namespace

template <class T>
int lasp::collect_matrices(const Channel& c, T* arrived, void* stream) {
  constexpr int N = WIDE<T>;
  const bool wide = c.shape.K % N == 0;
  const auto launch = c.backward ? (wide ? launch_chain<T, true, N> : launch_chain<T, true, 1>)
                                 : (wide ? launch_chain<T, false, N> : launch_chain<T, false, 1>);
  return launch(c, arrived, stream);
}

template int lasp::collect_matrices(const Channel&, float*, void*);
template int lasp::collect_matrices(const Channel&, double*, void*);
