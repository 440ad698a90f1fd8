// What the host runtime keeps in a tensor map, the 128 opaque bytes that describe a matrix to a product kernel.
#pragma once
#include <cstdint>

namespace host {

struct alignas(64) TensorMap {
    static constexpr uint64_t kMagic = 0x686f73742d6d6170;
    uint64_t magic;
    void* data;
    uint64_t dims[2];  // the contiguous one first
    uint64_t stride_bytes;
    uint64_t spare[11];
};
static_assert(sizeof(TensorMap) == 128, "as in the driver");

}  // namespace host
