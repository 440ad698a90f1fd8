// The runtime wheel ships the CUDA headers without this one, which only names compiler attributes.
// For a plain C++ compiler nearly all of them mean nothing.
#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __forceinline__ inline
#define CUDARTAPI
#define CUDARTAPI_CDECL
