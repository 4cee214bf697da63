// The tile operations compiled for: avx512.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/softmax.h"
#include "tile_ops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"
#define FAE_LAMBDA __attribute__((always_inline))
#define FAE_ISA isa_avx512
#include "tile_ops_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
