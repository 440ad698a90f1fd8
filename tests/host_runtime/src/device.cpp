// One device that looks like an H200 (compute capability 9.0), or of another capability with the sizes of an A100 below 9.0,
// so that the engine picks the kernels that it would pick there. Every stream runs at once and in order: a call has finished when it returns.
#include "host_runtime.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace {

struct Model {
    int multiprocessors, shared_per_block, shared_per_multiprocessor, l2_cache;
};

const Model& model() {
    static const Model h200{132, 232448, 233472, 50 << 20}, a100{108, 166912, 167936, 40 << 20};
    return host::settings().capability >= 90 ? h200 : a100;
}

// Events only keep the time at which they were recorded.
struct Event {
    std::chrono::steady_clock::time_point time;
};

Event* event(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

int attribute(cudaDeviceAttr which) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: return host::settings().capability / 10;
        case cudaDevAttrComputeCapabilityMinor: return host::settings().capability % 10;
        case cudaDevAttrMultiProcessorCount: return model().multiprocessors;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return model().shared_per_block;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return model().shared_per_multiprocessor;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrL2CacheSize: return model().l2_cache;
        case cudaDevAttrWarpSize: return 32;
        default: return 0;  // a feature that is not there
    }
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "host runtime error"; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error of the host runtime"; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { *value = attribute(which); return cudaSuccess; }

cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* p, int) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "host runtime");
    p->totalGlobalMem = host::settings().memory_bytes;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    for (int i = 0; i < 3; ++i) p->maxThreadsDim[i] = 1024, p->maxGridSize[i] = 65535;
    p->major = host::settings().capability / 10;
    p->minor = host::settings().capability % 10;
    p->multiProcessorCount = model().multiprocessors;
    p->l2CacheSize = model().l2_cache;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerMultiprocessor = model().shared_per_multiprocessor;
    p->sharedMemPerBlockOptin = model().shared_per_block;
    p->clockRate = 1980000;
    p->memoryClockRate = 3201000;
    p->memoryBusWidth = 6144;
    p->unifiedAddressing = 1;
    p->memoryPoolsSupported = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { *s = static_cast<cudaStream_t>(std::malloc(1)); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int) { return cudaStreamCreateWithFlags(s, flags); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { std::free(s); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = reinterpret_cast<cudaEvent_t>(new Event{}); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { delete event(e); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) { event(e)->time = std::chrono::steady_clock::now(); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = std::chrono::duration<float, std::milli>(event(to)->time - event(from)->time).count();
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    std::memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->binaryVersion = a->ptxVersion = host::settings().capability;
    a->maxDynamicSharedSizeBytes = model().shared_per_block;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 1; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t*) { *n = 16; return cudaSuccess; }

}  // extern "C"
