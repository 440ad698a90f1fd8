// The parameters of TurboMind's attention kernels, as they lie in memory, and rotary positions.
#pragma once
#include "kernel.h"

namespace host {

struct RopeParameters {
    int type;  // 0 none, 1 default, 2 linear, 3 dynamic, 4 yarn, 5 llama3
    float* dynamic_base;
    int dim;
    float scale_factor, inverse_factor;  // inverse frequency of value i = inverse_factor * 2^(i * scale_factor)
    float yarn[4];
    float llama3[3];
    int mrope_mode;  // 0 none, 1 chunked, 2 interleaved
    struct {
        int section[3];         // pairs for time, height, width
        int* position_ids;      // (rows, 3)
        int* position_delta;    // per request
        int* position_offsets;  // per request: its first row in position_ids
        int* length;            // per request: rows of this forward that have position ids
    } mrope;
};
static_assert(sizeof(RopeParameters) == 112, "as on the device");

struct FastDivisor {
    int divisor;
    unsigned multiplier, shift;
};

// Context parallelism, windows and sinks are there but not supported here.
struct AttentionParameters {
    void *out, *q, *k, *v;
    int64_t stride;
    void *q_bias, *k_bias, *v_bias;
    const int *cu_q_len, *cu_k_len, *readonly_block_num;
    const bool* finished;
    const float* rope_theta;
    const bool* token_mask;
    const void* sinks;
    float scale_sinks;
    struct { const void* kv_cache; int head_stride, key_to_value; } linear;
    struct { char** blocks; const int* cu_block_num; int offset, block_len; } block;
    int token_num, batch_size, max_q_len, max_k_len;
    int heads, kv_heads, head_dim;
    float scale_log2;  // 1/sqrt(head_dim) * log2(e)
    int window_size;
    bool causal;
    int layer;
    RopeParameters rope;
    bool use_logn_attn;
    int max_position_embeddings;
    int quant_policy;
    int max_split_k;
    int* split_cnt;
    float *partial_o, *partial_ml;
    int cp_rank;
    FastDivisor cp_size;
};
static_assert(offsetof(AttentionParameters, cp_size) == 372, "as on the device");

// Turns values 2i and 2i+1 of a head by the angle of pair i.
class Rope {
public:
    Rope(const RopeParameters& p, int request, const Launch& launch) : p_(p), request_(request) {
        require(p.type <= 2, launch, "this type of rotary position");
    }

    // token: index within this forward; time: index within the request.
    template <class T>
    void apply(T* head, int token, int time) const {
        if (p_.type == 0) return;
        int coordinate[3] = {time, time, time};
        if (p_.mrope_mode) locate(token, time, coordinate);
        for (int i = 0; i < p_.dim; i += 2) {
            const int axis = p_.mrope_mode ? axis_of(i / 2) : 0;
            const float angle = coordinate[axis] * (p_.inverse_factor * std::exp2(float(i) * p_.scale_factor));
            // The device rotates in the type of the head.
            const float c = T(std::cos(angle)), s = T(std::sin(angle)), x = head[i], y = head[i + 1];
            head[i] = float(T(c * x)) - float(T(s * y));
            head[i + 1] = float(T(c * y)) + float(T(s * x));
        }
    }

private:
    void locate(int token, int time, int* coordinate) const {
        if (token < p_.mrope.length[request_]) std::copy_n(p_.mrope.position_ids + 3 * (p_.mrope.position_offsets[request_] + token), 3, coordinate);
        else std::fill_n(coordinate, 3, time + p_.mrope.position_delta[request_]);
    }

    int axis_of(int pair) const {
        const int* s = p_.mrope.section;
        if (p_.mrope_mode == 1) return pair < s[0] ? 0 : pair < s[0] + s[1] ? 1 : 2;
        const int axis = pair % 3;
        return axis && pair / 3 < s[axis] ? axis : 0;
    }

    const RopeParameters& p_;
    int request_;
};

// Where a token of a request lies in the paged cache: per layer and head, block_len rows of keys, then of values.
struct PagedCache {
    char** blocks;
    int block_len, offset, head_dim;

    template <class T>
    T* row(int head, int token, bool value) const {
        const size_t head_rows = size_t(block_len) * head_dim;
        char* block = blocks[token / block_len] + offset;
        T* at = reinterpret_cast<T*>(block) + (2 * head + value) * head_rows + size_t(token % block_len) * head_dim;
        if (!is_allocated(at, head_dim * sizeof(T))) die("cache row of token %d, head %d is not device memory", token, head);
        return at;
    }
};

}  // namespace host
