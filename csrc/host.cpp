// The exchange on a CPU: the same steps as on a GPU, by one thread of each process.
#include <algorithm>
#include <limits>
#include <vector>

#include "channel.h"

using namespace lasp;

namespace {

// out = S + A x or, if backward, S + A^T x, of one head; all but the transition are [K, V].
template <class T>
void pass(const Shape& shape, const T* state, const T* transition, const T* x, T* out, int64_t h, bool backward) {
  const int K = shape.K, V = shape.V;
  std::copy_n(state, K * V, out);
  for (int k = 0; k < K; ++k) {
    if (shape.transition != MATRIX) {
      const T w = weight(shape, transition, h * K + k);
      for (int v = 0; v < V; ++v) out[k * V + v] += w * x[k * V + v];
      continue;
    }
    const T* a = transition + h * K * K + (backward ? k : k * K);
    for (int j = 0; j < K; ++j)
      for (int v = 0; v < V; ++v) out[k * V + v] += a[backward ? j * K : j] * x[j * V + v];
  }
}

template <class T>
void combine(const Channel& c, uint32_t epoch, int place, T* arrived) {
  const int64_t head = c.shape.K * c.shape.V;
  const int unit = c.layout.unit(c.rank, place);
  const Slot<T> slot(c, c.rank, epoch);
  std::vector<T> x(head), y(head);
  for (int64_t h = 0; h < c.shape.H; ++h) {
    std::fill(x.begin(), x.end(), T(0));
    for (int i = c.reach[place]; i > 0; --i) {
      const int from = unit - i * c.step();
      const T* state = slot.state(from) + h * head;
      if (i == c.reach[place]) {
        std::copy_n(state, head, x.begin());
      } else {
        pass(c.shape, state, slot.transition(from), x.data(), y.data(), h, c.backward);
        std::swap(x, y);
      }
    }
    std::copy_n(x.begin(), head, arrived + place * c.shape.state_size() + h * head);
  }
}

template <class T>
void publish(const Channel& c, const T* states, const T* transitions) {
  const uint32_t epoch = c.epoch() + 1;
  const int64_t state_size = c.shape.state_size(), transition_size = c.shape.transition_size();
  for (int to = 0; to < c.layout.ranks; ++to) {
    const Slot<T> slot(c, to, epoch);
    for (int place = 0; place < c.layout.units_per_rank; ++place) {
      if (!c.reaches(place, to)) continue;
      const int unit = c.layout.unit(c.rank, place);
      std::copy_n(states + place * state_size, state_size, slot.state(unit));
      if (transition_size && c.passes[place])
        std::copy_n(transitions + place * transition_size, transition_size, slot.transition(unit));
    }
  }
  std::fill_n(c.local, PARTS, epoch);
  for (int to = 0; to < c.layout.ranks; ++to)
    for (int part = 0; part < PARTS; ++part) store_release(c.signals(to, c.rank) + part, epoch);
}

template <class T>
void collect(const Channel& c, T* arrived) {
  bool all = true;
  for (int i = 0; i < c.layout.ranks * PARTS; ++i) all = came(c, i, c.epoch()) && all;
  const int n = c.layout.units_per_rank;
  if (!all) std::fill_n(arrived, n * c.shape.state_size(), std::numeric_limits<T>::quiet_NaN());
  for (int place = 0; all && place < n; ++place) combine(c, c.epoch(), place, arrived);
}

}  // namespace

extern "C" int lasp_publish(const Channel* c, int doubles, const void* states, const void* transitions, void*) {
  if (doubles)
    publish(*c, (const double*)states, (const double*)transitions);
  else
    publish(*c, (const float*)states, (const float*)transitions);
  return 0;
}

extern "C" int lasp_collect(const Channel* c, int doubles, void* arrived, void*) {
  if (doubles)
    collect(*c, (double*)arrived);
  else
    collect(*c, (float*)arrived);
  return 0;
}
