// What the kernels for GPUs share; the exchange there is one of publish.cu, then one of collect.cu or chain.cu.
#pragma once
#include "channel.h"

namespace lasp {

constexpr int THREADS = 256;  // of a block that collects

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

// Kernels may begin while the one before ends, and do nothing before that has; then they let the next one begin,
// which may go on without waiting if it has nothing to do with them: lasp/kernels/triton/pdl.py.
__device__ inline void follow() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Whether all parts of all ranks' messages are here; the same for all threads of a block.
__device__ inline bool all_came(const Channel& c, uint32_t epoch) {
  bool here = true;
  for (int i = threadIdx.x; i < c.layout.ranks * PARTS; i += THREADS) here = came(c, i, epoch) && here;
  return __syncthreads_and(here);
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

// In chain.cu.
template <class T>
int collect_matrices(const Channel& c, T* arrived, void* stream);

}  // namespace lasp
