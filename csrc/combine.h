// What a unit of the sequence does to the state before it (docs/mathematics.md §1). Shared by host and device. H here
// counts batch rows times heads.
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
    return transition == NONE ? 0 : H * (transition == SCALAR ? 1 : transition == DIAGONAL ? K : (int64_t)K * K);
  }
};

// What a transition that is no matrix multiplies row `row` of the H * K rows of a state with.
template <class T>
LASP_BOTH T weight(const Shape& shape, const T* transition, int row) {
  if (shape.transition == NONE) return 1;
  return exp(transition[shape.transition == SCALAR ? row / shape.K : row]);
}

// Which rank holds a unit: rank r has unit r and, if there are two a rank, also 2 R - 1 - r (zigzag).
struct Layout {
  int32_t ranks, units_per_rank;

  LASP_BOTH int unit(int rank, int place) const { return place == 0 ? rank : 2 * ranks - 1 - rank; }
};

}  // namespace lasp
