// cuBLAS: the one product that TurboMind asks of it.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {

int cublasCreate_v2(void** handle) { *handle = std::malloc(1); return 0; }
int cublasDestroy_v2(void* handle) { std::free(handle); return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                 const void*, void*, int, int, int, int) { return 0; }

}  // extern "C"
