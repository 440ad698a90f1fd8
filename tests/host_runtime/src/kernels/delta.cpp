// Layers with a recurrent state (gated delta rule): gates, normalised keys, convolution, the state, the gated norm.
#include "kernel.h"

#include <vector>

namespace host {
namespace {

constexpr int kHead = 128;

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

template <class T>
T* inside(const Launch& launch, T* at, size_t count, const char* what) {
    if (!is_allocated(at, count * sizeof(T))) die("%s: %s (%p) outside of device memory", launch.name.c_str(), what, (const void*)at);
    return at;
}

// ComputeBetaG(float* beta, float* g, int64 stride, const T* b, int64 b_stride, const T* a, int64 a_stride, const T* A_log,
// const T* dt_bias, int n, int heads): beta = sigmoid(b); g = -exp(A_log) * softplus(a + dt_bias), the log of the decay
void beta_and_decay(const Launch& launch) {
    const int64_t stride = launch.arg<int64_t>(2), b_stride = launch.arg<int64_t>(4), a_stride = launch.arg<int64_t>(6);
    const int n = launch.arg<int>(9), heads = launch.arg<int>(10);
    float* beta = launch.array<float>(0, n * stride, "beta");
    float* g = launch.array<float>(1, n * stride, "decay");
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        const T* b = launch.array<T>(3, (n - 1) * b_stride + heads, "b");
        const T* a = launch.array<T>(5, (n - 1) * a_stride + heads, "a");
        const T* a_log = launch.array<T>(7, heads, "A_log");
        const T* dt_bias = launch.array<T>(8, heads, "dt_bias");
        for (int i = 0; i < n; ++i) {
            for (int h = 0; h < stride; ++h) {
                const bool used = h < heads;
                const float x = used ? float(a[i * a_stride + h]) + float(dt_bias[h]) : 0.f;
                const float softplus = x > 20 ? x : std::log1p(std::exp(x));
                beta[i * stride + h] = used ? sigmoid(float(b[i * b_stride + h])) : 0.f;
                g[i * stride + h] = used ? -std::exp(float(a_log[h])) * softplus : 0.f;
            }
        }
    });
}

// L2NormalizeQK(T* q, int64 batch_stride, int64 token_stride, T* k, int64, int64, int tokens, int heads, float epsilon)
void normalise_queries_and_keys(const Launch& launch) {
    const int tokens = launch.arg<int>(6), heads = launch.arg<int>(7), batches = int(launch.grid.x) / std::max(1, tokens * heads);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        for (int which = 0; which < 2; ++which) {
            T* data = launch.arg<T*>(3 * which);
            const int64_t batch_stride = launch.arg<int64_t>(3 * which + 1), token_stride = launch.arg<int64_t>(3 * which + 2);
            for (int b = 0; b < batches; ++b) {
                for (int t = 0; t < tokens; ++t) {
                    for (int h = 0; h < heads; ++h) {
                        T* row = inside(launch, data + b * batch_stride + t * token_stride + int64_t(h) * kHead, kHead, "a head");
                        float sum = 0;
                        for (int d = 0; d < kHead; ++d) sum += float(row[d]) * float(row[d]);
                        const float factor = 1 / std::sqrt(sum + launch.arg<float>(8));
                        for (int d = 0; d < kHead; ++d) row[d] = float(row[d]) * factor;
                    }
                }
            }
        }
    });
}

// fused_conv1d_batched_v2(T* out, const T* in, const T* weight, const T* bias, void** states, const int* q_offsets,
// const int* k_offsets, const bool* finished, int* counter, int batch, int channels, int in_stride, int, int state_offset,
// int, int): a causal convolution of 4 taps per channel and SiLU. weight is (4, channels). A state holds the last 4 inputs of
// a request as (4, channels), the input of position p in row p % 4.
void convolution(const Launch& launch) {
    constexpr int kTaps = 4;
    require(launch.has("<4, "), launch, "another number of taps");
    const int batch = launch.arg<int>(9), channels = launch.arg<int>(10), in_stride = launch.arg<int>(11), offset = launch.arg<int>(13);
    const int* q_offsets = launch.array<int>(5, batch + 1, "q_offsets");
    const int* k_offsets = launch.array<int>(6, batch + 1, "k_offsets");
    const bool* finished = launch.arg<const bool*>(7);
    void* const* states = launch.array<void*>(4, batch, "states");
    const int n = q_offsets[batch];
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, size_t(n) * channels, "output");
        const T* in = launch.array<T>(1, size_t(n - 1) * in_stride + channels, "input");
        const T* weight = launch.array<T>(2, size_t(kTaps) * channels, "weight");
        const T* bias = launch.arg<const T*>(3);
        for (int b = 0; b < batch; ++b) {
            const int begin = q_offsets[b], length = q_offsets[b + 1] - begin;
            const int history = k_offsets[b + 1] - k_offsets[b] - length;
            T* state = inside(launch, static_cast<T*>(states[b]) + offset, size_t(kTaps) * channels, "a state");
            std::vector<float> sums(channels);
            for (int i = 0; i < length; ++i) {
                std::fill(sums.begin(), sums.end(), 0.f);
                for (int tap = 0; tap < kTaps; ++tap) {
                    const int at = i - (kTaps - 1) + tap;
                    // Rows before the first token were cleared when the request got its state.
                    const T* row = at >= 0 ? in + size_t(begin + at) * in_stride : state + size_t((history + at + kTaps) % kTaps) * channels;
                    for (int c = 0; c < channels; ++c) sums[c] += float(row[c]) * float(weight[size_t(tap) * channels + c]);
                }
                T* line = out + size_t(begin + i) * channels;
                for (int c = 0; c < channels; ++c) {
                    const float x = sums[c] + (bias ? float(bias[c]) : 0.f);
                    line[c] = x * sigmoid(x);
                }
            }
            if (finished && finished[b]) continue;
            for (int i = std::max(0, length - kTaps); i < length; ++i)
                std::copy_n(in + size_t(begin + i) * in_stride, channels, state + size_t((history + i) % kTaps) * channels);
        }
    });
}

// One step of the rule on the state (key, value) of a head in float: forget, correct what the key finds, read by the query.
template <class T>
void step(std::vector<float>& state, const T* q, const T* k, const T* v, float beta, float g, T* out) {
    const float decay = std::exp(g);
    float found[kHead] = {}, read[kHead] = {};
    for (int i = 0; i < kHead; ++i) {
        float* row = &state[size_t(i) * kHead];
        const float key = k[i];
        for (int j = 0; j < kHead; ++j) row[j] *= decay, found[j] += row[j] * key;
    }
    for (int j = 0; j < kHead; ++j) found[j] = (float(v[j]) - found[j]) * beta;
    for (int i = 0; i < kHead; ++i) {
        float* row = &state[size_t(i) * kHead];
        const float key = k[i], query = q[i];
        for (int j = 0; j < kHead; ++j) row[j] += key * found[j], read[j] += row[j] * query;
    }
    const float scale = 1 / std::sqrt(float(kHead));
    for (int j = 0; j < kHead; ++j) out[j] = read[j] * scale;
}

// Where the tokens of a launch lie, and the states. Token t of the batch is in slot t % slots of line t / slots.
struct Rows {
    int64_t line, token;
    int64_t at(int t, int slots) const { return t / slots * line + t % slots * token; }
};

template <class T, class State>
void update(const Launch& launch, State* state, int tokens, bool store, const int key_head, const int value_head, const T* q,
            const T* k, const T* v, const float* beta, const float* g, T* out, const int begin, const int slots, const Rows rows[5]) {
    inside(launch, state, size_t(kHead) * kHead, "a state");
    std::vector<float> values(state, state + size_t(kHead) * kHead);
    for (int t = begin; t < begin + tokens; ++t) {
        const int64_t gate = rows[4].at(t, slots) + value_head;
        step(values, inside(launch, q + rows[1].at(t, slots) + int64_t(key_head) * kHead, kHead, "queries"),
             inside(launch, k + rows[2].at(t, slots) + int64_t(key_head) * kHead, kHead, "keys"),
             inside(launch, v + rows[3].at(t, slots) + int64_t(value_head) * kHead, kHead, "values"),
             *inside(launch, beta + gate, 1, "beta"), *inside(launch, g + gate, 1, "decay"),
             inside(launch, out + rows[0].at(t, slots) + int64_t(value_head) * kHead, kHead, "output"));
    }
    if (store) std::copy(values.begin(), values.end(), state);
}

template <class Body>
void with_state_type(const Launch& launch, Body body) {
    if (launch.has(", float>")) body(float{});
    else with_type(launch, body);
}

// Chunked(T* out, int64 line, int64 token, const T* q, .., .., const T* k, .., .., const T* v, .., .., const float* beta,
// const float* g, int64 line, int64 token, const int64* states, const int* q_offsets, const bool* finished, int slots,
// int requests, int key_heads, int value_heads, int64 state_offset, int head_groups, int heads_per_block): a prefill
void chunked(const Launch& launch) {
    require(launch.has("<128, 16, 256,"), launch, "another size of heads");
    const int slots = launch.arg<int>(19), requests = launch.arg<int>(20), key_heads = launch.arg<int>(21), heads = launch.arg<int>(22);
    const int groups = launch.arg<int>(24), per_block = launch.arg<int>(25);
    const int64_t* states = launch.array<int64_t>(16, size_t(requests) * groups, "states");
    const int* q_offsets = launch.array<int>(17, requests + 1, "q_offsets");
    const bool* finished = launch.array<bool>(18, requests, "finished");
    Rows rows[5];
    for (int i = 0; i < 4; ++i) rows[i] = {launch.arg<int64_t>(3 * i + 1), launch.arg<int64_t>(3 * i + 2)};
    rows[4] = {launch.arg<int64_t>(14), launch.arg<int64_t>(15)};
    with_type(launch, [&](auto type) {
        with_state_type(launch, [&](auto state_type) {
            using T = decltype(type);
            for (int r = 0; r < requests; ++r) {
                for (int h = 0; h < heads; ++h) {
                    auto* state = reinterpret_cast<decltype(state_type)*>(states[r * groups + h / per_block]) + launch.arg<int64_t>(23) +
                                  int64_t(h % per_block) * kHead * kHead;
                    update(launch, state, q_offsets[r + 1] - q_offsets[r], !finished[r], h / (heads / key_heads), h, launch.arg<const T*>(3),
                           launch.arg<const T*>(6), launch.arg<const T*>(9), launch.arg<const float*>(12), launch.arg<const float*>(13),
                           launch.arg<T*>(0), q_offsets[r], slots, rows);
                }
            }
        });
    });
}

// Recurrent(T* out, int64 stride, const T* q, int64, const T* k, int64, const T* v, int64, const float* beta, int64,
// const float* g, const int64* states, const bool* finished, int work, int key_heads, int value_heads, int64 state_offset,
// int head_groups, int heads_per_block): one token of each request
void recurrent(const Launch& launch) {
    require(launch.has("<128, 256,"), launch, "another size of heads");
    const int key_heads = launch.arg<int>(14), heads = launch.arg<int>(15), requests = launch.arg<int>(13) / heads;
    const int groups = launch.arg<int>(17), per_block = launch.arg<int>(18);
    const int64_t* states = launch.array<int64_t>(11, size_t(requests) * groups, "states");
    const bool* finished = launch.array<bool>(12, requests, "finished");
    Rows rows[5];
    for (int i = 0; i < 5; ++i) rows[i] = {launch.arg<int64_t>(2 * i + 1), 0};
    with_type(launch, [&](auto type) {
        with_state_type(launch, [&](auto state_type) {
            using T = decltype(type);
            for (int r = 0; r < requests; ++r) {
                for (int h = 0; h < heads; ++h) {
                    auto* state = reinterpret_cast<decltype(state_type)*>(states[r * groups + h / per_block]) + launch.arg<int64_t>(16) +
                                  int64_t(h % per_block) * kHead * kHead;
                    update(launch, state, 1, !finished[r], h / (heads / key_heads), h, launch.arg<const T*>(2), launch.arg<const T*>(4),
                           launch.arg<const T*>(6), launch.arg<const float*>(8), launch.arg<const float*>(10), launch.arg<T*>(0), r, 1, rows);
                }
            }
        });
    });
}

// rms_norm_gated(T* hidden, const T* gate, const T* weight, float epsilon, int rows, int dim, int gate_stride, int heads):
// hidden = norm(hidden) * weight * silu(gate), a row for each head of each token
void gated_norm(const Launch& launch) {
    const int rows = launch.arg<int>(4), dim = launch.arg<int>(5), gate_stride = launch.arg<int>(6), heads = launch.arg<int>(7);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* hidden = launch.array<T>(0, size_t(rows) * dim, "hidden");
        const T* gates = launch.arg<const T*>(1);
        const T* weight = launch.array<T>(2, dim, "weight");
        for (int i = 0; i < rows; ++i, hidden += dim) {
            const T* gate = inside(launch, gates + size_t(i / heads) * gate_stride + size_t(i % heads) * dim, dim, "gate");
            float sum = 0;
            for (int d = 0; d < dim; ++d) sum += float(hidden[d]) * float(hidden[d]);
            const float factor = 1 / std::sqrt(sum / float(dim) + launch.arg<float>(3));
            for (int d = 0; d < dim; ++d) hidden[d] = float(hidden[d]) * factor * float(weight[d]) * (float(gate[d]) * sigmoid(float(gate[d])));
        }
    });
}

// SigmoidGateMultiply(T* data, const T* gate, int dim, int gate_stride, int n): data *= sigmoid(gate)
void sigmoid_gate(const Launch& launch) {
    const int dim = launch.arg<int>(2), gate_stride = launch.arg<int>(3), n = launch.arg<int>(4);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* data = launch.array<T>(0, size_t(n) * dim, "data");
        const T* gate = launch.array<T>(1, size_t(n - 1) * gate_stride + dim, "gate");
        for (int i = 0; i < n; ++i)
            for (int d = 0; d < dim; ++d) data[size_t(i) * dim + d] = float(data[size_t(i) * dim + d]) * sigmoid(float(gate[size_t(i) * gate_stride + d]));
    });
}

const Register kernels({
    {"turbomind::ComputeBetaGKernel", beta_and_decay, 11},
    {"turbomind::L2NormalizeQKKernel", normalise_queries_and_keys, 9},
    {"turbomind::fused_conv1d_batched_kernel_v2", convolution, 16},
    {"turbomind::linear_attn::delta_rule::detail::ChunkedGdrKernel", chunked, 26},
    {"turbomind::linear_attn::delta_rule::detail::RecurrentGdrKernel", recurrent, 19},
    {"turbomind::rms_norm_gated_kernel", gated_norm, 8},
    {"turbomind::SigmoidGateMultiplyKernel", sigmoid_gate, 5},
});

}  // namespace
}  // namespace host
