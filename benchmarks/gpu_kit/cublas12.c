// libcublas.so.12 for a machine that has cuBLAS 13 only. TurboMind of LMDeploy 0.18 calls six functions of cuBLAS, whose
// signatures are the same in both releases; each is looked up in cuBLAS 13 at its first call and called from then on.
// Symbols carry the version libcublas.so.12, which the module asks for; see `layout.build_forwarder`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *Handle;
typedef int Status;

static void *find(const char *name) {
    // By its name where torch has loaded it, else beside this library: `$ORIGIN` is in its search path.
    static void *library;
    if (!library) library = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    void *function = library ? dlsym(library, name) : NULL;
    if (!function) {
        fprintf(stderr, "cuBLAS 12 is forwarded to cuBLAS 13, and there is no %s: %s\n", name, dlerror());
        abort();
    }
    return function;
}

#define FORWARD(name, parameters, arguments)               \
    Status name parameters {                               \
        static Status(*function) parameters;               \
        if (!function) *(void **)&function = find(#name);  \
        return function arguments;                         \
    }

FORWARD(cublasCreate_v2, (Handle * handle), (handle))
FORWARD(cublasDestroy_v2, (Handle handle), (handle))
FORWARD(cublasGetMathMode, (Handle handle, int *mode), (handle, mode))
FORWARD(cublasSetStream_v2, (Handle handle, void *stream), (handle, stream))
FORWARD(cublasSetWorkspace_v2, (Handle handle, void *workspace, size_t bytes), (handle, workspace, bytes))
FORWARD(cublasGemmEx,
        (Handle handle, int transa, int transb, int m, int n, int k, const void *alpha, const void *a, int atype,
         int lda, const void *b, int btype, int ldb, const void *beta, void *c, int ctype, int ldc, int compute,
         int algorithm),
        (handle, transa, transb, m, n, k, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype, ldc, compute,
         algorithm))
