// Attention over a paged cache: writing it, gathering it for prefill, and softmax(q k) v for both phases.
#include "attention.h"

#include <vector>

namespace host {
namespace {

// Of the template arguments …, keys in a tile, head size, warps, …
int head_dim(const Launch& launch) {
    for (const int dim : {64, 128, 256})
        if (launch.has(("64, " + std::to_string(dim) + ", 4,").c_str())) return dim;
    die("%s: no known head size", launch.name.c_str());
}

void check_layout(const Launch& launch) {
    require(launch.has("block::Config<__nv_bfloat16, __nv_bfloat16,") || launch.has("block::Config<__half, __half,") ||
                launch.has("block::Config<half, half,"), launch, "a quantised cache");
}

template <class T>
T* inside(const Launch& launch, T* at, size_t count, const char* what) {
    if (!is_allocated(at, count * sizeof(T))) die("%s: %s (%p) outside of device memory", launch.name.c_str(), what, (const void*)at);
    return at;
}

template <class T>
void add(T* head, const T* bias, int dim) {
    if (bias)
        for (int d = 0; d < dim; ++d) head[d] = float(head[d]) + float(bias[d]);
}

// Writes a row of the cache, unless it lies in leading blocks that other requests share.
template <class T>
void store(const PagedCache& cache, int head, int token, int readonly_blocks, const T* key, const T* value) {
    if (token < readonly_blocks * cache.block_len) return;
    std::copy_n(key, cache.head_dim, cache.row<T>(head, token, false));
    std::copy_n(value, cache.head_dim, cache.row<T>(head, token, true));
}

// ProcessKV_v2(char** blocks, const T* k, const T* v, const T* k_bias, const T* v_bias, const int* cu_q, const int* cu_k,
// const int* cu_blocks, const int* readonly, rope, int64 stride_b, stride_c, stride_h, stride_s, int offset, int, divisor,
// int block_len, layout): the new keys and values of a prefill into the cache. Strides count heads.
void process_kv(const Launch& launch) {
    check_layout(launch);
    const int dim = head_dim(launch), heads = launch.grid.y, n = launch.grid.z;
    const int* cu_q = launch.array<int>(5, n + 1, "cu_q");
    const int* cu_k = launch.array<int>(6, n + 1, "cu_k");
    const int* cu_blocks = launch.array<int>(7, n + 1, "cu_blocks");
    const int* readonly = launch.arg<const int*>(8);
    const auto rope_parameters = launch.arg<RopeParameters>(9);
    const int64_t stride_c = launch.arg<int64_t>(11), stride_h = launch.arg<int64_t>(12), stride_s = launch.arg<int64_t>(13);
    require(launch.arg<FastDivisor>(16).divisor == 1, launch, "context parallelism");
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        const T *k = launch.arg<const T*>(1), *v = launch.arg<const T*>(2), *k_bias = launch.arg<const T*>(3), *v_bias = launch.arg<const T*>(4);
        std::vector<T> key(dim), value(dim);
        for (int b = 0; b < n; ++b) {
            const PagedCache cache{launch.arg<char**>(0) + cu_blocks[b], launch.arg<int>(17), launch.arg<int>(14), dim};
            const Rope rope(rope_parameters, b, launch);
            const int q_len = cu_q[b + 1] - cu_q[b], history = cu_k[b + 1] - cu_k[b] - q_len;
            for (int i = 0; i < q_len; ++i) {
                for (int h = 0; h < heads; ++h) {
                    const int64_t at = (cu_q[b] * stride_c + i * stride_s + h * stride_h) * dim;
                    std::copy_n(inside(launch, k + at, dim, "keys"), dim, key.data());
                    std::copy_n(inside(launch, v + at, dim, "values"), dim, value.data());
                    add(key.data(), k_bias ? k_bias + h * dim : nullptr, dim);
                    add(value.data(), v_bias ? v_bias + h * dim : nullptr, dim);
                    rope.apply(key.data(), i, history + i);
                    store(cache, h, history + i, readonly ? readonly[b] : 0, key.data(), value.data());
                }
            }
        }
    });
}

// flattenKV_v2(T* k, T* v, char** blocks, const int* cu_k, const int* cu_blocks, rope, int64 stride_b, stride_c, stride_h,
// stride_s, int offset, int, divisor, layout {int heads, int block_len}): the cache of each request as plain rows.
void flatten_kv(const Launch& launch) {
    check_layout(launch);
    const int dim = head_dim(launch), heads = launch.grid.y, n = launch.grid.z;
    const int* cu_k = launch.array<int>(3, n + 1, "cu_k");
    const int* cu_blocks = launch.array<int>(4, n + 1, "cu_blocks");
    const int64_t stride_c = launch.arg<int64_t>(7), stride_h = launch.arg<int64_t>(8), stride_s = launch.arg<int64_t>(9);
    require(launch.arg<RopeParameters>(5).type == 0, launch, "rotation of cached keys");
    require(launch.arg<FastDivisor>(12).divisor == 1, launch, "context parallelism");
    struct Layout { int heads, block_len; };
    const auto layout = launch.arg<Layout>(13);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T *k = launch.arg<T*>(0), *v = launch.arg<T*>(1);
        for (int b = 0; b < n; ++b) {
            const PagedCache cache{launch.arg<char**>(2) + cu_blocks[b], layout.block_len, launch.arg<int>(10), dim};
            const int begin = cu_k[b] - cu_k[0];
            for (int i = 0; i < cu_k[b + 1] - cu_k[b]; ++i) {
                for (int h = 0; h < heads; ++h) {
                    const int64_t at = (begin * stride_c + i * stride_s + h * stride_h) * dim;
                    std::copy_n(cache.row<T>(h, i, false), dim, inside(launch, k + at, dim, "keys"));
                    std::copy_n(cache.row<T>(h, i, true), dim, inside(launch, v + at, dim, "values"));
                }
            }
        }
    });
}

// One head of one query over `count` keys: softmax(scale * q k) v, with weights rounded to T as on the device.
template <class T, class Row>
void attend(const T* q, int dim, int count, float scale_log2, Row row, T* out) {
    std::vector<float> weights(count), sums(dim, 0.f);
    float highest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int i = 0; i < count; ++i) {
        const T* key = row(i, false);
        float sum = 0;
        for (int d = 0; d < dim; ++d) sum += float(q[d]) * float(key[d]);
        highest = std::max(highest, weights[i] = sum * scale_log2);
    }
    for (int i = 0; i < count; ++i) total += weights[i] = std::exp2(weights[i] - highest);
    for (int i = 0; i < count; ++i) {
        const T* value = row(i, true);
        const float weight = T(weights[i]);
        for (int d = 0; d < dim; ++d) sums[d] += weight * float(value[d]);
    }
    for (int d = 0; d < dim; ++d) out[d] = sums[d] / total;
}

template <class T>
struct Attention {
    const Launch& launch;
    const AttentionParameters& p;
    const bool decoding, causal;
    const int dim = p.head_dim, group = p.heads / p.kv_heads;

    void run() const {
        for (int b = 0; b < p.batch_size; ++b) {
            if (p.finished[b]) continue;
            const Rope rope(p.rope, b, launch);
            const int q_len = p.cu_q_len[b + 1] - p.cu_q_len[b], k_len = p.cu_k_len[b + 1] - p.cu_k_len[b];
            const int history = k_len - q_len;
            for (int i = 0; i < q_len; ++i) {
                const int token = p.cu_q_len[b] + i;
                if (decoding) write_cache(b, token, i, history + i, rope);
                for (int h = 0; h < p.heads; ++h) one_head(b, token, i, h, history + i, causal ? history + i + 1 : k_len, rope);
            }
        }
    }

    PagedCache cache(int b) const { return {p.block.blocks + p.block.cu_block_num[b], p.block.block_len, p.block.offset, dim}; }

    void write_cache(int b, int token, int i, int time, const Rope& rope) const {
        std::vector<T> key(dim), value(dim);
        for (int h = 0; h < p.kv_heads; ++h) {
            const int64_t at = token * p.stride + int64_t(h) * dim;
            std::copy_n(inside(launch, static_cast<const T*>(p.k) + at, dim, "keys"), dim, key.data());
            std::copy_n(inside(launch, static_cast<const T*>(p.v) + at, dim, "values"), dim, value.data());
            add(key.data(), p.k_bias ? static_cast<const T*>(p.k_bias) + h * dim : nullptr, dim);
            add(value.data(), p.v_bias ? static_cast<const T*>(p.v_bias) + h * dim : nullptr, dim);
            rope.apply(key.data(), i, time);
            store(cache(b), h, time, p.readonly_block_num ? p.readonly_block_num[b] : 0, key.data(), value.data());
        }
    }

    void one_head(int b, int token, int i, int h, int time, int count, const Rope& rope) const {
        std::vector<T> q(dim);
        std::copy_n(inside(launch, static_cast<const T*>(p.q) + token * p.stride + int64_t(h) * dim, dim, "queries"), dim, q.data());
        add(q.data(), p.q_bias ? static_cast<const T*>(p.q_bias) + h * dim : nullptr, dim);
        rope.apply(q.data(), i, time);
        T* out = inside(launch, static_cast<T*>(p.out) + (int64_t(token) * p.heads + h) * dim, dim, "output");
        const int kv_head = h / group;
        if (decoding) {
            const PagedCache paged = cache(b);
            attend(q.data(), dim, count, p.scale_log2, [&](int k, bool value) { return paged.row<T>(kv_head, k, value); }, out);
        } else {
            const T* rows = static_cast<const T*>(p.linear.kv_cache) + int64_t(kv_head) * p.linear.head_stride + int64_t(p.cu_k_len[b] - p.cu_k_len[0]) * dim;
            attend(q.data(), dim, count, p.scale_log2, [&](int k, bool value) { return rows + int64_t(k) * dim + (value ? p.linear.key_to_value : 0); }, out);
        }
    }
};

// attention_kernel(parameters, cache iterator, grid map, int, int, int). The work is split over blocks on a device; here a
// launch computes all of it, and the reduction that may follow has only to clear the rows of finished requests.
void attention(const Launch& launch) {
    const auto p = launch.arg<AttentionParameters>(0);
    require(p.cp_size.divisor == 1, launch, "context parallelism");
    const bool decoding = launch.has("DecodingCtaMap");
    const bool causal = launch.has("CtaMap, true>");
    require(!p.sinks && !p.use_logn_attn && (!causal || p.window_size > p.max_k_len) && !p.quant_policy, launch, "this kind of attention");
    require(p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256, launch, "this head size");
    with_type(launch, [&](auto type) { Attention<decltype(type)>{launch, p, decoding, causal}.run(); });
}

// reduce(T* out, partial_ml, partial_o, split counts, const bool* token_mask, int, int queries, int heads, …)
void reduce(const Launch& launch) {
    if (launch.grid.z != 1) return;  // an inner step
    const int queries = launch.arg<int>(6), heads = launch.arg<int>(7);
    const bool* mask = launch.arg<const bool*>(4);
    const size_t size = size_t(heads) * (launch.has(", 64, 4,") ? 64 : launch.has(", 256, 4,") ? 256 : 128);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, queries * size, "output");
        for (int i = 0; i < queries; ++i)
            if (mask && !mask[i]) std::fill_n(out + i * size, size, T(0.f));
    });
}

const Register kernels({
    {"turbomind::ProcessKV_v2", process_kv, 19},
    {"turbomind::flattenKV_v2", flatten_kv, 14},
    {"turbomind::attention_kernel", attention, 6},
    {"turbomind::attention::reduce", reduce, 12},
});

}  // namespace
}  // namespace host
