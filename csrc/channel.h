// How ranks read each other's summaries out of memory that all of them see: GPUs of one node through NVLink, processes
// of one machine through shared pages. Every rank does, call after call and in the same order,
//
//   publish   write the own message into the own buffer, slot epoch % 2; then tell every rank, by a signal, the epoch
//   collect   wait for the signal of every rank, read the slots, combine
//
// Why no slot is overwritten while somebody reads it. Rank p writes slot n % 2 in its call n, and others last read that
// slot in their call n - 2. Before call n, p has collected call n - 1, that is, has acquired from every rank q the signal
// n - 1. q released that signal after its collect of call n - 2 had ended (its calls run one after the other), so all of
// q's reads of call n - 2 come before p's write. This is why collect waits for all ranks, even if it reads few.
//
// A wait is bounded. When it runs out, the rank that did not come is written to `error`, which the host looks at, results
// are NaN, and no later wait of this channel waits at all.
#pragma once
#include "combine.h"
#ifndef __CUDACC__
#include <chrono>
#include <thread>
#endif

namespace lasp {

struct Channel {
  char* const* buffers;  // every rank's buffer: two slots, then one signal a rank
  uint32_t* local;       // this rank's: epoch, blocks that have published, whether a wait has run out
  int32_t* error;        // 0, or 1 + the rank that did not come; the host can read it at any time
  int64_t slot_bytes, patience_ns;
  int32_t rank;
  Layout layout;
  Shape shape;
  int32_t backward;
  int32_t reach[2];  // how many units reach each unit of this rank

  LASP_BOTH char* slot(int owner, uint32_t epoch) const { return buffers[owner] + (epoch % 2) * slot_bytes; }
  LASP_BOTH uint32_t* signals(int owner) const { return (uint32_t*)(buffers[owner] + 2 * slot_bytes); }
};

// A message is [units, H, K, V] states, then [units, ...] transitions.
template <class T>
LASP_BOTH const T* state_of(const Channel& c, int unit, uint32_t epoch) {
  return (const T*)c.slot(c.layout.owner(unit), epoch) + c.layout.place(unit) * c.shape.state_size();
}

template <class T>
LASP_BOTH const T* transition_of(const Channel& c, int unit, uint32_t epoch) {
  return (const T*)c.slot(c.layout.owner(unit), epoch) + c.layout.units_per_rank * c.shape.state_size() +
         c.layout.place(unit) * c.shape.transition_size();
}

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

LASP_BOTH void signal(const Channel& c, int to, uint32_t epoch) { store_release(c.signals(to) + c.rank, epoch); }

// Whether rank `from` has published this epoch; epochs may wrap around. Gives up at once where one wait has run out.
LASP_BOTH bool came(const Channel& c, int from, uint32_t epoch) {
  const uint32_t* seen = c.signals(c.rank) + from;
  for (const int64_t start = now_ns(); (int32_t)(load_acquire(seen) - epoch) < 0;) {
    if (load_acquire(c.local + 2) != 0) return false;
    if (now_ns() - start > c.patience_ns) {
      store_release((uint32_t*)c.error, 1 + from);
      store_release(c.local + 2, 1);
      return false;
    }
#ifndef __CUDACC__
    std::this_thread::yield();  // the others may need this processor
#endif
  }
  return load_acquire(c.local + 2) == 0;
}

}  // namespace lasp
