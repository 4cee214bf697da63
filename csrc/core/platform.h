// Host and device annotations. The only place that asks which compiler is at work.
#pragma once

#if defined(__CUDACC__)
#define FAE_HD __host__ __device__ __forceinline__
#define FAE_DEVICE __device__ __forceinline__
#else
#define FAE_HD inline
#endif

// Symbols that another shared object may use (the introspection module reads plans and registry rows).
#if defined(__GNUC__)
#define FAE_API __attribute__((visibility("default")))
#else
#define FAE_API
#endif
