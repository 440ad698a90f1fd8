// Mixture of experts: routing, the grouped products, and the sum over a token's experts.
#include "kernel.h"
#include "tensor_map.h"

#include <vector>

namespace host {
namespace {

// transposeAxis01(T* out, const T* in, int d0, int d1, int d2): (d0, d1, d2) -> (d1, d0, d2), 16-bit numbers
void transpose(const Launch& launch) {
    require(launch.has("__nv_bfloat16") || launch.has("half") || launch.has("unsigned short"), launch, "an element that has not 16 bits");
    const size_t d0 = launch.arg<int>(2), d1 = launch.arg<int>(3), d2 = launch.arg<int>(4);
    uint16_t* out = launch.array<uint16_t>(0, d0 * d1 * d2, "output");
    const uint16_t* in = launch.array<uint16_t>(1, d0 * d1 * d2, "input");
    for (size_t i = 0; i < d0; ++i)
        for (size_t j = 0; j < d1; ++j) std::copy_n(in + (i * d1 + j) * d2, d2, out + (j * d0 + i) * d2);
}

struct alignas(16) StridedPointer {
    void* data;
    int stride;
};

// fill_strided_ptrs({pointers[64], pointers* out, int n})
void fill_pointers(const Launch& launch) {
    struct Parameters { StridedPointer data[64]; StridedPointer* out; int n; };
    require(launch.has("<64>"), launch, "another number of pointers");
    const auto* p = static_cast<const Parameters*>(launch.arguments[0]);
    if (!is_allocated(p->out, p->n * sizeof(StridedPointer))) die("%s: output", launch.name.c_str());
    std::copy_n(p->data, p->n, p->out);
}

// MoeGate(float* scales, int8* masks, int* counts, const float* logits, const bool* token_mask, int log_tile, int tiles, int n,
// int padded, int experts, int k, bool softmax, bool norm, float scale): each token's k experts, in rising order. masks
// (experts, padded) holds the rank of the expert among the token's, or -1; scales (k, n); counts (experts, tiles) of tokens.
void gate(const Launch& launch) {
    require(launch.has("signed char"), launch, "another type of masks");
    const int log_tile = launch.arg<int>(5), tiles = launch.arg<int>(6), n = launch.arg<int>(7), padded = launch.arg<int>(8);
    const int experts = launch.arg<int>(9), k = launch.arg<int>(10);
    const bool softmax = launch.arg<bool>(11), norm = launch.arg<bool>(12);
    float* scales = launch.array<float>(0, size_t(k) * n, "scales");
    int8_t* masks = launch.array<int8_t>(1, size_t(experts) * padded, "masks");
    int* counts = launch.array<int>(2, size_t(experts) * tiles, "counts");
    const float* logits = launch.array<float>(3, size_t(n) * experts, "logits");
    const bool* token_mask = launch.array<bool>(4, n, "token mask");
    std::fill_n(masks, size_t(experts) * padded, int8_t(-1));
    for (int t = 0; t < n; ++t) {
        if (!token_mask[t]) continue;
        const float* row = logits + size_t(t) * experts;
        std::vector<int> order(experts);
        for (int e = 0; e < experts; ++e) order[e] = e;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
        const float highest = row[order[0]];
        float sum = softmax ? 0.f : 1.f;
        for (int i = 0; softmax && i < (norm ? k : experts); ++i) sum += std::exp(row[order[i]] - highest);
        std::sort(order.begin(), order.begin() + k);
        for (int i = 0; i < k; ++i) {
            const float value = softmax ? std::exp(row[order[i]] - highest) : row[order[i]];
            scales[size_t(i) * n + t] = value / sum * launch.arg<float>(13);
            masks[size_t(order[i]) * padded + t] = int8_t(i);
            ++counts[order[i] * tiles + (t >> log_tile)];
        }
    }
}

// MoeScan(int* token_of, int* expert_of, int* row_of, int* offsets, masks, counts, int, int, int n, int padded, int experts):
// the rows of the grouped products, expert by expert. row_of is (k, n).
void scan(const Launch& launch) {
    const int n = launch.arg<int>(8), padded = launch.arg<int>(9), experts = launch.arg<int>(10);
    int* offsets = launch.array<int>(3, experts + 1, "offsets");
    const int8_t* masks = launch.array<int8_t>(4, size_t(experts) * padded, "masks");
    int rows = 0;
    for (int e = 0; e < experts; ++e) {
        offsets[e] = rows;
        for (int t = 0; t < n; ++t) {
            const int rank = masks[size_t(e) * padded + t];
            if (rank < 0) continue;
            *(launch.array<int>(0, rows + 1, "tokens") + rows) = t;
            *(launch.array<int>(1, rows + 1, "experts") + rows) = e;
            *(launch.array<int>(2, size_t(rank) * n + t + 1, "rows") + size_t(rank) * n + t) = rows;
            ++rows;
        }
    }
    offsets[experts] = rows;
}

// gemm_kernel_sm90_bf16(maps of a, b, c, u, v, then the same as matrices, bool fuse_silu, scheduler, buffer): for each group g,
// rows [offsets[g], offsets[g + 1]) of c = rows of a, by index or in place, times the group's weights (N, K) transposed. With
// fuse_silu the columns come in blocks of 64 gates and their 64 ups, and c has half of them.
struct Matrix {
    void* data;
    int stride;
    int *offsets, *indices;
};
constexpr int kGateBlock = 64;

void grouped_product(const Launch& launch) {
    const TensorMap& weights = *static_cast<const TensorMap*>(launch.arguments[1]);
    const auto a = launch.arg<Matrix>(5), b = launch.arg<Matrix>(6), c = launch.arg<Matrix>(9);
    const bool silu = launch.arg<bool>(10);
    require(weights.magic == TensorMap::kMagic && a.offsets && b.stride == 0, launch, "this form of the product");
    const int k = int(weights.dims[0]), n = int(weights.dims[1]), groups = static_cast<const int*>(launch.arguments[11])[3];
    std::vector<float> sums(n);
    for (int g = 0; g < groups; ++g) {
        const StridedPointer expert = static_cast<const StridedPointer*>(b.data)[g];
        const Bf16* weight = static_cast<const Bf16*>(expert.data);
        if (!is_allocated(weight, (size_t(n - 1) * expert.stride + k) * sizeof(Bf16))) die("%s: weights", launch.name.c_str());
        for (int row = a.offsets[g]; row < a.offsets[g + 1]; ++row) {
            const Bf16* in = static_cast<const Bf16*>(a.data) + size_t(a.indices ? a.indices[row] : row) * a.stride;
            Bf16* out = static_cast<Bf16*>(c.data) + size_t(row) * c.stride;
            if (!is_allocated(in, k * sizeof(Bf16)) || !is_allocated(out, (silu ? n / 2 : n) * sizeof(Bf16)))
                die("%s: row %d of group %d", launch.name.c_str(), row, g);
            for (int j = 0; j < n; ++j) {
                const Bf16* line = weight + size_t(j) * expert.stride;
                float sum = 0;
                for (int i = 0; i < k; ++i) sum += float(in[i]) * float(line[i]);
                sums[j] = sum;
            }
            for (int j = 0; j < (silu ? n / 2 : n); ++j) {
                const int from = silu ? j / kGateBlock * 2 * kGateBlock + j % kGateBlock : j;
                out[j] = silu ? sums[from] / (1 + std::exp(-sums[from])) * sums[from + kGateBlock] : sums[from];
            }
        }
    }
}

// MoeReduce(T* out, const T* rows, const T* bias, const float* scales, const int* row_of, const int*, const float*,
// const T* shared, int, int, int dim, int n, T): the sum of the scaled rows of a token's experts
void combine(const Launch& launch) {
    const int dim = launch.arg<int>(10), n = launch.arg<int>(11);
    const std::string& name = launch.name;  // MoeReduceKernel<vector, k, bias, …>
    const int k = std::stoi(name.substr(name.find(", ") + 2));
    require(launch.has(", false,") && !launch.arg<const float*>(6) && !launch.arg<const void*>(7), launch, "a bias or a shared expert");
    const float* scales = launch.array<float>(3, size_t(k) * n, "scales");
    const int* row_of = launch.array<int>(4, size_t(k) * n, "rows");
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, size_t(n) * dim, "output");
        const T* rows = launch.array<T>(1, size_t(n) * k * dim, "rows");
        for (int t = 0; t < n; ++t, out += dim) {
            for (int d = 0; d < dim; ++d) {
                float sum = 0;
                for (int i = 0; i < k; ++i)
                    if (const int row = row_of[size_t(i) * n + t]; row >= 0) sum += float(rows[size_t(row) * dim + d]) * scales[size_t(i) * n + t];
                out[d] = sum;
            }
        }
    });
}

void nothing(const Launch&) {}

const Register kernels({
    {"turbomind::transposeAxis01", transpose, 5},
    {"turbomind::gemm::(anonymous namespace)::fill_strided_ptrs", fill_pointers, 1},
    {"turbomind::MoeGateKernel_v8", gate, 14},
    {"turbomind::MoeScanKernel_v2_classic", scan, 11},
    {"turbomind::gemm::prepare_tma_descs_sm90_bf16", nothing, kAny},
    {"turbomind::gemm::gemm_kernel_sm90_bf16", grouped_product, 13},
    {"turbomind::MoeReduceKernel", combine, 13},
});

}  // namespace
}  // namespace host
