// The driver functions that _turbomind links. Built twice: with NO_DEVICE for contract tests that need
// only the import, and for the host runtime, where virtual memory and multicast are features that are not there.
#ifdef NO_DEVICE
constexpr int kResult = 100;  // CUDA_ERROR_NO_DEVICE
#else
constexpr int kResult = 801;  // CUDA_ERROR_NOT_SUPPORTED
#endif

extern "C" {

int cuDeviceGetAttribute(int* value, int, int) {
#ifndef NO_DEVICE
    *value = 0;
    return 0;
#else
    return kResult;
#endif
}

int cuGetErrorString(int, const char** text) {
    *text = "not available without a GPU";
    return 0;
}

#define NOT_AVAILABLE(name) int name() { return kResult; }
NOT_AVAILABLE(cuMemAddressFree)
NOT_AVAILABLE(cuMemAddressReserve)
NOT_AVAILABLE(cuMemCreate)
NOT_AVAILABLE(cuMemGetAllocationGranularity)
NOT_AVAILABLE(cuMemMap)
NOT_AVAILABLE(cuMemRelease)
NOT_AVAILABLE(cuMemRetainAllocationHandle)
NOT_AVAILABLE(cuMemSetAccess)
NOT_AVAILABLE(cuMemUnmap)
NOT_AVAILABLE(cuMulticastAddDevice)
NOT_AVAILABLE(cuMulticastBindMem)
NOT_AVAILABLE(cuMulticastCreate)
NOT_AVAILABLE(cuMulticastGetGranularity)
NOT_AVAILABLE(cuMulticastUnbind)

}  // extern "C"
