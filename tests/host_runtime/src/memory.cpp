// Device memory is host memory: allocations are counted against a limit, copies are memmove.
#include "host_runtime.h"
#include "tensor_map.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

namespace {

struct Heap {
    std::mutex mutex;
    std::map<uintptr_t, std::pair<size_t, bool>> live;  // start -> (bytes, counts as device memory)
    size_t used = 0;
};

Heap& heap() {
    static Heap* value = new Heap;  // never destroyed: threads of the engine may outlive static objects
    return *value;
}

constexpr size_t kPage = 4096;

size_t mapped(size_t bytes) { return (bytes ? bytes + kPage - 1 : kPage) / kPage * kPage; }

// Pages come from the system when they are touched, so a large KV cache costs nothing until it is used.
cudaError_t allocate(void** out, size_t bytes, bool device) {
    Heap& h = heap();
    std::lock_guard<std::mutex> lock(h.mutex);
    if (device && h.used + bytes > host::settings().memory_bytes) return cudaErrorMemoryAllocation;
    // One page more, without access: a kernel or a copy that runs over the end is caught at once.
    const size_t size = mapped(bytes);
    void* p = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return cudaErrorMemoryAllocation;
    mprotect(static_cast<char*>(p) + size, kPage, PROT_NONE);
    if (device && host::settings().poison && bytes <= (size_t(64) << 20)) std::memset(p, 0xff, bytes);
    h.live[reinterpret_cast<uintptr_t>(p)] = {bytes, device};
    if (device) h.used += bytes;
    *out = p;
    return cudaSuccess;
}

cudaError_t release(void* p) {
    if (!p) return cudaSuccess;
    Heap& h = heap();
    std::lock_guard<std::mutex> lock(h.mutex);
    const auto it = h.live.find(reinterpret_cast<uintptr_t>(p));
    if (it == h.live.end()) return cudaErrorInvalidValue;
    if (it->second.second) h.used -= it->second.first;
    munmap(p, mapped(it->second.first) + kPage);
    h.live.erase(it);
    return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
    if (bytes) std::memmove(to, from, bytes);
    return cudaSuccess;
}

}  // namespace

bool host::is_allocated(const void* pointer, size_t bytes) {
    Heap& h = heap();
    std::lock_guard<std::mutex> lock(h.mutex);
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto it = h.live.upper_bound(address);
    if (it == h.live.begin()) return false;
    --it;
    return address + bytes <= it->first + it->second.first;
}

extern "C" {

cudaError_t cudaMalloc(void** p, size_t n) { return allocate(p, n, true); }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(p, n, true); }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t) { return allocate(p, n, true); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return allocate(p, n, false); }
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    Heap& h = heap();
    std::lock_guard<std::mutex> lock(h.mutex);
    *total = host::settings().memory_bytes;
    *available = *total - h.used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    std::memset(a, 0, sizeof *a);
    a->type = host::is_allocated(p, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    a->devicePointer = a->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { return copy(to, from, n); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) { return copy(to, from, n); }
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t n) { return copy(to, from, n); }

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; ++row)
        copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t n) { std::memset(p, value, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) { return cudaMemset(p, value, n); }

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { *pool = reinterpret_cast<cudaMemPool_t>(0x10); return cudaSuccess; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { *pool = reinterpret_cast<cudaMemPool_t>(0x20); return cudaSuccess; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

}  // extern "C"

// ---- driver functions that the engine asks for by name -------------------------------------------

namespace {

// cuMemcpyBatchAsync of CUDA 12: many copies in one call.
int copy_batch(void** to, void** from, size_t* bytes, size_t count, void*, size_t*, size_t, size_t*, void*) {
    for (size_t i = 0; i < count; ++i) copy(to[i], from[i], bytes[i]);
    return 0;
}

// cuTensorMapEncodeTiled, for matrices.
int encode_tensor_map(host::TensorMap* map, int, unsigned rank, void* data, const uint64_t* dims, const uint64_t* strides,
                      const unsigned*, const unsigned*, int, int, int, int) {
    if (rank != 2) return 1;  // CUDA_ERROR_INVALID_VALUE
    *map = {host::TensorMap::kMagic, data, {dims[0], dims[1]}, strides[0], {}};
    return 0;
}

void* driver_function(const char* symbol) {
    if (!std::strcmp(symbol, "cuMemcpyBatchAsync")) return reinterpret_cast<void*>(copy_batch);
    if (!std::strcmp(symbol, "cuTensorMapEncodeTiled")) return reinterpret_cast<void*>(encode_tensor_map);
    return nullptr;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                               cudaDriverEntryPointQueryResult* result) {
    *function = driver_function(symbol);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
