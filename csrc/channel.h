// How ranks bring their summaries to each other through memory that all of them see: GPUs of one node through NVLink,
// processes of one machine through shared pages. Every rank does, call after call and in the same order,
//
//   publish   write the summary of each own unit into the buffer, slot epoch % 2, of every rank that it reaches; then
//             tell every rank, by signals, the epoch
//   collect   wait for the signals of every rank, combine what lies in the own buffer
//
// A transfer thus ends as early as it can, whatever its reader does meanwhile, and everything is read where it is near.
//
// Why nothing is overwritten while somebody reads it. Rank p writes into slot n % 2 of rank q in its call n, and q last
// read that slot in its call n - 2. Before call n, p has collected call n - 1, that is, has acquired from every rank q
// the signals n - 1. q released those after its collect of call n - 2 had ended (its calls run one after the other), so
// all of q's reads of call n - 2 come before p's write. This is why collect waits for all ranks, even if it reads few.
//
// Why everybody comes to an end. Publish waits for nobody, and collect for the publishing of others alone: it runs
// after the own publishing, so that it takes no room from that. On a GPU each block of publish is a part that counts
// its own calls, writes its share and signals by itself, so that no block waits for another one of its rank.
//
// A wait is bounded. When it runs out, the rank that did not come is written to `error`, which the host looks at,
// results are NaN, and no later wait of this channel waits at all.
#pragma once
#include "combine.h"
#ifndef __CUDACC__
#include <chrono>
#include <thread>
#endif

namespace lasp {

constexpr int PARTS = 16;  // signals from each rank to each; lasp/parallel/native.py knows this number, too

struct Channel {
  char* const* buffers;  // every rank's buffer: two slots, then the signals
  uint32_t* local;       // this rank's: the epoch of every part, then whether a wait has run out
  int32_t* error;        // 0, or 1 + the rank that did not come; the host can read it at any time
  int64_t slot_bytes, patience_ns;
  int32_t rank;
  Layout layout;
  Shape shape;
  int32_t backward;
  int32_t reach[2];   // of each unit of this rank: how many units reach it,
  int32_t spread[2];  // how many it reaches,
  int32_t passes[2];  // and whether anything passes through it, so that its transition is needed

  LASP_BOTH int step() const { return backward ? -1 : 1; }
  LASP_BOTH uint32_t epoch() const { return local[0]; }  // once published
  LASP_BOTH uint32_t* given_up() const { return local + PARTS; }
  LASP_BOTH uint32_t* signals(int to, int from) const {
    return (uint32_t*)(buffers[to] + 2 * slot_bytes) + from * PARTS;
  }

  // Whether unit `place` of this rank reaches a unit of rank `to`.
  LASP_BOTH bool reaches(int place, int to) const {
    for (int other = 0; other < layout.units_per_rank; ++other) {
      const int ahead = (layout.unit(to, other) - layout.unit(rank, place)) * step();
      if (ahead > 0 && ahead <= spread[place]) return true;
    }
    return false;
  }
};

// A slot of a rank's buffer. It has a place for every unit of the sequence: [H, K, V] states, then transitions, each
// padded to 16 bytes.
template <class T>
struct Slot {
  T* start;
  int64_t state_size, size;  // padded, in numbers

  LASP_BOTH Slot(const Channel& c, int owner, uint32_t epoch)
      : start((T*)(c.buffers[owner] + epoch % 2 * c.slot_bytes)),
        state_size(padded(c.shape.state_size())),
        size(state_size + padded(c.shape.transition_size())) {}

  LASP_BOTH T* state(int unit) const { return start + unit * size; }
  LASP_BOTH T* transition(int unit) const { return start + unit * size + state_size; }

  static LASP_BOTH int64_t padded(int64_t numbers) {
    constexpr int N = 16 / sizeof(T);
    return (numbers + N - 1) / N * N;
  }
};

LASP_BOTH void store_release(uint32_t* at, uint32_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#else
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
#endif
}

LASP_BOTH uint32_t load_acquire(const uint32_t* at) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
#else
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#endif
}

LASP_BOTH uint32_t load_relaxed(const uint32_t* at) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
#else
  return __atomic_load_n(at, __ATOMIC_RELAXED);
#endif
}

LASP_BOTH int64_t now_ns() {
#ifdef __CUDA_ARCH__
  int64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
#elif !defined(__CUDACC__)
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
#else
  return 0;  // the host half of the device compiler's output is not used
#endif
}

// Whether signal number `i` of all ranks' has reached the epoch (which may wrap around). Gives up at once where an
// earlier wait has run out.
LASP_BOTH bool came(const Channel& c, int i, uint32_t epoch) {
  const uint32_t* seen = c.signals(c.rank, 0) + i;
  const uint32_t too_late = load_relaxed(c.given_up());  // looked at below, so that a GPU loads both at once
  int64_t start = 0;
  while ((int32_t)(load_acquire(seen) - epoch) < 0) {
    if (load_relaxed(c.given_up()) != 0) return false;
    if (start == 0) start = now_ns();
    const int64_t waited = now_ns() - start;
    if (waited > c.patience_ns) {
      store_release((uint32_t*)c.error, 1 + i / PARTS);
      store_release(c.given_up(), 1);
      return false;
    }
#ifndef __CUDACC__
    if (waited < 50'000)  // the others may need this processor
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(20));
#endif
  }
  return too_late == 0;
}

}  // namespace lasp
