// What a unit of the sequence does to the state before it (docs/mathematics.md §1), for one element of the state. Shared
// by host and device. H here counts batch rows times heads.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LASP_BOTH __host__ __device__ inline
#else
#define LASP_BOTH inline
#endif

namespace lasp {

enum Transition : int32_t { NONE, SCALAR, DIAGONAL, MATRIX };  // 1, log of a scalar, log of a diagonal [K], [K, K]

struct Shape {
  int64_t H;
  int32_t K, V;
  Transition transition;

  LASP_BOTH int64_t state_size() const { return H * K * V; }
  LASP_BOTH int64_t transition_size() const {
    const int64_t per_head[] = {0, 1, K, (int64_t)K * K};
    return H * per_head[transition];
  }
};

// (A x)[k, v] or, if backward, (A^T x)[k, v] of head h; x is [K, width], a points to the transitions of a whole unit.
template <class T>
LASP_BOTH T through(const Shape& shape, const T* a, const T* x, int64_t h, int k, int v, int width, bool backward) {
  const int K = shape.K;
  if (shape.transition == NONE) return x[k * width + v];
  if (shape.transition == SCALAR) return exp(a[h]) * x[k * width + v];
  if (shape.transition == DIAGONAL) return exp(a[h * K + k]) * x[k * width + v];
  const T* row = a + h * K * K + (backward ? k : k * K);
  T sum = 0;
  for (int j = 0; j < K; ++j) sum += row[backward ? j * K : j] * x[j * width + v];
  return sum;
}

// Which rank holds a unit, and at which place: rank r has unit r and, if there are two a rank, also 2 R - 1 - r (zigzag).
struct Layout {
  int32_t ranks, units_per_rank;

  LASP_BOTH int owner(int unit) const { return unit < ranks ? unit : 2 * ranks - 1 - unit; }
  LASP_BOTH int place(int unit) const { return unit < ranks ? 0 : 1; }
  LASP_BOTH int unit(int rank, int place) const { return place == 0 ? rank : 2 * ranks - 1 - rank; }
};

}  // namespace lasp
