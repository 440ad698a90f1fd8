// The parts of a layer that work on rows: norms, activations, biases.
#include "kernel.h"

namespace host {
namespace {

template <class T>
float inverse_rms(const T* row, int dim, float inverse_dim, float epsilon) {
    float sum = 0;
    for (int i = 0; i < dim; ++i) sum += float(row[i]) * float(row[i]);
    return 1 / std::sqrt(sum * inverse_dim + epsilon);
}

// The value is rounded before it is multiplied with the weight, as transformers and the device do; a weight around zero
// is one less than the factor.
template <class T>
void scale_row(T* out, const T* in, const T* weight, int dim, float factor, bool around_zero) {
    for (int i = 0; i < dim; ++i)
        out[i] = around_zero ? float(in[i]) * factor * (1 + float(weight[i])) : float(T(float(in[i]) * factor)) * float(weight[i]);
}

bool around_zero(const Launch& launch) { return launch.has("<true,") || launch.has(", true>"); }

// RMSNorm(T* out, int out_ld, const T* in, int in_ld, const T* weight, int dim, int n, float eps, float 1/dim)
void rms_norm(const Launch& launch) {
    const int out_ld = launch.arg<int>(1), in_ld = launch.arg<int>(3), dim = launch.arg<int>(5), n = launch.arg<int>(6);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, size_t(n - 1) * out_ld + dim, "output");
        const T* in = launch.array<T>(2, size_t(n - 1) * in_ld + dim, "input");
        const T* weight = launch.array<T>(4, dim, "weight");
        for (int i = 0; i < n; ++i) {
            const T* row = in + size_t(i) * in_ld;
            scale_row(out + size_t(i) * out_ld, row, weight, dim, inverse_rms(row, dim, launch.arg<float>(8), launch.arg<float>(7)), around_zero(launch));
        }
    });
}

// BiasResidualRMSNorm(T* residual, T* hidden, const T* weight, const T* bias, int dim, int n, float eps, float 1/dim):
// residual += hidden + bias; hidden = norm(residual) * weight
void residual_rms_norm(const Launch& launch) {
    const int dim = launch.arg<int>(4), n = launch.arg<int>(5);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* residual = launch.array<T>(0, size_t(n) * dim, "residual");
        T* hidden = launch.array<T>(1, size_t(n) * dim, "hidden");
        const T* weight = launch.array<T>(2, dim, "weight");
        const T* bias = launch.arg<const T*>(3);
        for (int i = 0; i < n; ++i, residual += dim, hidden += dim) {
            for (int d = 0; d < dim; ++d) {
                residual[d] = float(residual[d]) + float(hidden[d]);
                if (bias) residual[d] = float(residual[d]) + float(bias[d]);
            }
            scale_row(hidden, residual, weight, dim, inverse_rms(residual, dim, launch.arg<float>(7), launch.arg<float>(6)), around_zero(launch));
        }
    });
}

// QkRMSNorm(T* qkv, int ld, const T* q_weight, const T* k_weight, int dim, int q_heads, int k_heads, int n, int, float eps, float 1/dim, …)
void qk_rms_norm(const Launch& launch) {
    const int ld = launch.arg<int>(1), dim = launch.arg<int>(4), q_heads = launch.arg<int>(5), k_heads = launch.arg<int>(6), n = launch.arg<int>(7);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* qkv = launch.array<T>(0, size_t(n - 1) * ld + size_t(q_heads + k_heads) * dim, "qkv");
        const T* q_weight = launch.array<T>(2, dim, "q weight");
        const T* k_weight = launch.array<T>(3, dim, "k weight");
        for (int i = 0; i < n; ++i) {
            for (int head = 0; head < q_heads + k_heads; ++head) {
                T* row = qkv + size_t(i) * ld + size_t(head) * dim;
                scale_row(row, row, head < q_heads ? q_weight : k_weight, dim, inverse_rms(row, dim, launch.arg<float>(10), launch.arg<float>(9)), around_zero(launch));
            }
        }
    });
}

// Activation(T* gate, const T* up, functor, int64 stride, int n, int dim, const int*): gate = silu(gate) * up
void activation(const Launch& launch) {
    require(launch.has("Silu<") && launch.has("<false,"), launch, "this activation");
    const int64_t stride = launch.arg<int64_t>(3);
    const int n = launch.arg<int>(4), dim = launch.arg<int>(5);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* gate = launch.array<T>(0, size_t(n - 1) * stride + dim, "gate");
        const T* up = launch.array<T>(1, size_t(n - 1) * stride + dim, "up");
        for (int i = 0; i < n; ++i, gate += stride, up += stride)
            for (int d = 0; d < dim; ++d) gate[d] = float(gate[d]) / (1 + std::exp(-float(gate[d]))) * float(up[d]);
    });
}

// (x - mean) / deviation * weight + bias, in float
template <class T>
void normalise_row(T* out, const T* in, const T* weight, const T* bias, int dim, float epsilon) {
    float sum = 0, squares = 0;
    for (int d = 0; d < dim; ++d) sum += float(in[d]), squares += float(in[d]) * float(in[d]);
    const float mean = sum / float(dim), factor = 1 / std::sqrt(std::max(squares / float(dim) - mean * mean, 0.f) + epsilon);
    for (int d = 0; d < dim; ++d) out[d] = (float(in[d]) - mean) * factor * float(weight[d]) + (bias ? float(bias[d]) : 0.f);
}

// LayerNorm(T* out, int out_ld, const T* in, int in_ld, const T* weight, const T* bias, int dim, int n, float eps, float 1/dim)
void layer_norm(const Launch& launch) {
    const int out_ld = launch.arg<int>(1), in_ld = launch.arg<int>(3), dim = launch.arg<int>(6), n = launch.arg<int>(7);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, size_t(n - 1) * out_ld + dim, "output");
        const T* in = launch.array<T>(2, size_t(n - 1) * in_ld + dim, "input");
        const T* weight = launch.array<T>(4, dim, "weight");
        for (int i = 0; i < n; ++i)
            normalise_row(out + size_t(i) * out_ld, in + size_t(i) * in_ld, weight, launch.arg<const T*>(5), dim, launch.arg<float>(8));
    });
}

// ResidualBiasLayerNorm(T* hidden, T* residual, const T* weight, const T* bias, const T* residual_bias, int dim, int n, float eps, float):
// residual += hidden + residual_bias; hidden = norm(residual) * weight + bias
void residual_layer_norm(const Launch& launch) {
    const int dim = launch.arg<int>(5), n = launch.arg<int>(6);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* hidden = launch.array<T>(0, size_t(n) * dim, "hidden");
        T* residual = launch.array<T>(1, size_t(n) * dim, "residual");
        const T* weight = launch.array<T>(2, dim, "weight");
        const T* residual_bias = launch.arg<const T*>(4);
        for (int i = 0; i < n; ++i, residual += dim, hidden += dim) {
            for (int d = 0; d < dim; ++d) {
                residual[d] = float(residual[d]) + float(hidden[d]);
                if (residual_bias) residual[d] = float(residual[d]) + float(residual_bias[d]);
            }
            normalise_row(hidden, residual, weight, launch.arg<const T*>(3), dim, launch.arg<float>(7));
        }
    });
}

// AddBiasActivation(T* data, const T* bias, int64 stride, int n, int dim): gelu(data + bias), by tanh or exact
void bias_gelu(const Launch& launch) {
    const bool exact = launch.has("GeluErfActivation");
    require(exact || launch.has("GeluActivation"), launch, "this activation");
    const int64_t stride = launch.arg<int64_t>(2);
    const int n = launch.arg<int>(3), dim = launch.arg<int>(4);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* data = launch.array<T>(0, size_t(n - 1) * stride + dim, "data");
        const T* bias = launch.arg<const T*>(1);
        for (int i = 0; i < n; ++i, data += stride) {
            for (int d = 0; d < dim; ++d) {
                const float x = float(data[d]) + (bias ? float(bias[d]) : 0.f);
                const float part = exact ? std::erf(x * 0.70710678f) : std::tanh(0.79788456f * (x + 0.044715f * x * x * x));
                data[d] = 0.5f * x * (1 + part);
            }
        }
    });
}

// bias(T* out, T* data, const T* bias, int n, int dim); the form with bias groups of experts has other arguments
void add_bias(const Launch& launch) {
    const int n = launch.arg<int>(3), dim = launch.arg<int>(4);
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* out = launch.array<T>(0, size_t(n) * dim, "output");
        const T* data = launch.array<T>(1, size_t(n) * dim, "data");
        const T* bias = launch.array<T>(2, dim, "bias");
        for (int i = 0; i < n; ++i)
            for (int d = 0; d < dim; ++d) out[size_t(i) * dim + d] = float(data[size_t(i) * dim + d]) + float(bias[d]);
    });
}

const Register kernels({
    {"turbomind::kernel::LayerNorm", layer_norm, 10},
    {"turbomind::kernel::ResidualBiasLayerNorm", residual_layer_norm, 9},
    {"turbomind::AddBiasActivationKernel", bias_gelu, 5},
    {"turbomind::biasKernel<__nv_bfloat16, __nv_bfloat16,", add_bias, 5},
    {"turbomind::biasKernel<__half, __half,", add_bias, 5},
    {"turbomind::kernel::RMSNorm", rms_norm, 9},
    {"turbomind::BiasResidualRMSNormKernel", residual_rms_norm, 8},
    {"turbomind::kernel::QkRMSNorm", qk_rms_norm, 12},
    {"turbomind::ActivationKernel", activation, 7},
});

}  // namespace
}  // namespace host
