// The exchange on a CPU: the same steps as on a GPU, by one thread of each process.
#include <cstring>
#include <limits>
#include <vector>

#include "channel.h"

using namespace lasp;

namespace {

template <class T>
void combine(const Channel& c, uint32_t epoch, int place, T* arrived) {
  const int K = c.shape.K, V = c.shape.V, step = c.backward ? -1 : 1;
  const int unit = c.layout.unit(c.rank, place);
  std::vector<T> x(K * V), y(K * V);
  for (int64_t h = 0; h < c.shape.H; ++h) {
    std::fill(x.begin(), x.end(), T(0));
    for (int i = c.reach[place]; i > 0; --i) {
      const int from = unit - i * step;
      const T* state = state_of<T>(c, from, epoch) + h * K * V;
      const T* a = transition_of<T>(c, from, epoch);
      const bool first = i == c.reach[place];
      for (int k = 0; k < K; ++k)
        for (int v = 0; v < V; ++v)
          y[k * V + v] = state[k * V + v] + (first ? T(0) : through(c.shape, a, x.data(), h, k, v, V, c.backward));
      std::swap(x, y);
    }
    std::memcpy(arrived + place * c.shape.state_size() + h * K * V, x.data(), K * V * sizeof(T));
  }
}

template <class T>
void exchange(const Channel& c, const T* states, const T* transitions, T* arrived) {
  const uint32_t epoch = c.local[0] + 1;
  const int n = c.layout.units_per_rank;
  T* message = (T*)c.slot(c.rank, epoch);
  std::memcpy(message, states, n * c.shape.state_size() * sizeof(T));
  if (transitions)
    std::memcpy(message + n * c.shape.state_size(), transitions, n * c.shape.transition_size() * sizeof(T));
  c.local[0] = epoch;
  for (int r = 0; r < c.layout.ranks; ++r) signal(c, r, epoch);
  bool all = true;
  for (int r = 0; r < c.layout.ranks; ++r) all = came(c, r, epoch) && all;
  for (int place = 0; place < n; ++place) {
    if (all)
      combine(c, epoch, place, arrived);
    else
      std::fill_n(arrived + place * c.shape.state_size(), c.shape.state_size(), std::numeric_limits<T>::quiet_NaN());
  }
}

}  // namespace

extern "C" int lasp_exchange(const Channel* c, int doubles, const void* states, const void* transitions, void* arrived,
                             void*) {
  if (doubles)
    exchange(*c, (const double*)states, (const double*)transitions, (double*)arrived);
  else
    exchange(*c, (const float*)states, (const float*)transitions, (float*)arrived);
  return 0;
}
