// Token rows: embedding look-up, gather of hidden states, casts, prefix sums, token masks.
#include "kernel.h"

namespace host {
namespace {

// embeddingLookup(T* out, int out_ld, const T* table, int table_ld, const int* ids, int n, int dim): rows of 16-bit numbers
void embedding(const Launch& launch) {
    const int out_ld = launch.arg<int>(1), table_ld = launch.arg<int>(3), n = launch.arg<int>(5), dim = launch.arg<int>(6);
    require(launch.has("<unsigned short"), launch, "an element that has not 16 bits");
    const int* ids = launch.array<int>(4, n, "ids");
    uint16_t* out = launch.array<uint16_t>(0, size_t(n - 1) * out_ld + dim, "output");
    const int last = *std::max_element(ids, ids + n), first = *std::min_element(ids, ids + n);
    if (first < 0) die("%s: token %d", launch.name.c_str(), first);
    const uint16_t* table = launch.array<uint16_t>(2, size_t(last) * table_ld + dim, "table");
    for (int i = 0; i < n; ++i)
        std::copy_n(table + size_t(ids[i]) * table_ld, dim, out + size_t(i) * out_ld);
}

// collectHiddenStates(const V* rows, const int* indices, V* out, int dim), a block per index; V is a vector of bytes
void collect(const Launch& launch) {
    const size_t width = launch.has("uint4") ? 16 : launch.has("uint2") ? 8 : launch.has("uint1") ? 4 : 2;
    const size_t bytes = launch.arg<int>(3) * width;
    const unsigned n = launch.grid.x;
    const char* rows = launch.arg<const char*>(0);
    const int* indices = launch.array<int>(1, n, "indices");
    char* out = launch.array<char>(2, n * bytes, "output");
    for (unsigned i = 0; i < n; ++i) {
        if (indices[i] < 0) continue;
        const char* row = rows + size_t(indices[i]) * bytes;
        if (!is_allocated(row, bytes)) die("%s: row %d is outside", launch.name.c_str(), indices[i]);
        std::copy_n(row, bytes, out + i * bytes);
    }
}

// castFloat2D(const T* in, float* out, int columns), grid.y rows
void cast_float(const Launch& launch) {
    const size_t n = size_t(launch.grid.y) * launch.arg<int>(2);
    float* out = launch.array<float>(1, n, "output");
    with_type(launch, [&](auto type) {
        const auto* in = launch.array<decltype(type)>(0, n, "input");
        for (size_t i = 0; i < n; ++i) out[i] = in[i];
    });
}

// dtype_cast(To* out, const From* in, size_t n): weights of a file in the other 16-bit type
void cast_type(const Launch& launch) {
    const size_t n = launch.arg<size_t>(2);
    const auto cast = [&](auto to, auto from) {
        auto* out = launch.array<decltype(to)>(0, n, "output");
        const auto* in = launch.array<decltype(from)>(1, n, "input");
        for (size_t i = 0; i < n; ++i) out[i] = float(in[i]);
    };
    if (launch.has("<__half, __nv_bfloat16>")) cast(Half{}, Bf16{});
    else if (launch.has("<__nv_bfloat16, __half>")) cast(Bf16{}, Half{});
    else die("%s: a pair of types that is not supported", launch.name.c_str());
}

// BatchPrefixSum({const int* in}, {int n}, {int* out}): out[i] = sum of in[0, i), n + 1 values
void prefix_sum(const Launch& launch) {
    require(launch.has(", 1>"), launch, "more than one sum in a launch");
    const int n = launch.arg<int>(1);
    const int* in = launch.array<int>(0, n, "input");
    int* out = launch.array<int>(2, n + 1, "output");
    int sum = 0;
    for (int i = 0; i < n; ++i) {
        const int value = in[i];
        out[i] = sum;
        sum += value;
    }
    out[n] = sum;
}

// ClearTokenMask(bool* mask, const bool* finished, const int* offsets, size_t, {int base, …}): rows of finished requests
void clear_token_mask(const Launch& launch) {
    const unsigned n = launch.grid.x;
    require(launch.grid.y == 1, launch, "data parallel attention");
    const bool* finished = launch.array<bool>(1, n, "finished");
    const int* offsets = launch.array<int>(2, n + 1, "offsets");
    bool* mask = launch.array<bool>(0, offsets[n], "mask") + launch.arg<int>(4);
    for (unsigned i = 0; i < n; ++i)
        if (finished[i]) std::fill(mask + offsets[i], mask + offsets[i + 1], false);
}

// curand_uniform(states, size_t n, T* out, float scale, float shift): the warm-up's stand-in for attention
void warm_up_values(const Launch& launch) {
    const size_t n = launch.arg<size_t>(1);
    with_type(launch, [&](auto type) {
        auto* out = launch.array<decltype(type)>(2, n, "output");
        for (size_t i = 0; i < n; ++i) out[i] = launch.arg<float>(3) * 0.5f + launch.arg<float>(4);
    });
}

void nothing(const Launch&) {}

const Register kernels({
    {"turbomind::embeddingLookupKernel", embedding, 7},
    {"turbomind::CollectHiddenStates_Kernel", collect, 4},
    {"turbomind::castFloat2D", cast_float, 3},
    {"turbomind::dtype_cast_kernel", cast_type, 3},
    {"turbomind::BatchPrefixSumKernel", prefix_sum, 3},
    {"turbomind::(anonymous namespace)::ClearTokenMaskKernel", clear_token_mask, 5},
    {"turbomind::curand_uniform", warm_up_values, 5},
    {"turbomind::curand_init", nothing, kAny},
});

}  // namespace
}  // namespace host
