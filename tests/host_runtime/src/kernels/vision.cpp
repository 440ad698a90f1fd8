// The vision tower: positions of patches, packed qkv, and the position ids that images give to the decoder.
#include "kernel.h"

namespace host {
namespace {

// Grids of the images of a forward: (t, h, w) in patches, and where each starts among the rows of the
// tower and among the positions of all grids (one frame each).
struct Grids {
    const int *thw, *offsets;
    int count;

    Grids(const Launch& launch, int thw_index, int offsets_index, int n)
        : thw(launch.array<int>(thw_index, 3 * n, "grids")), offsets(launch.array<int>(offsets_index, 2 * n, "grid offsets")), count(n) {}
    int t(int g) const { return thw[3 * g]; }
    int h(int g) const { return thw[3 * g + 1]; }
    int w(int g) const { return thw[3 * g + 2]; }
    int first_row(int g) const { return offsets[2 * g]; }
    int first_position(int g) const { return offsets[2 * g + 1]; }
};

// buildMappedIdxBatched(int* mapped, const int* grids, const int* offsets, int n, int S): for each row of the tower, in which
// S x S patches that will be merged are neighbours, its position in reading order.
void mapped_indices(const Launch& launch) {
    const int n = launch.arg<int>(3), s = launch.arg<int>(4);
    const Grids grids(launch, 1, 2, n);
    for (int g = 0; g < n; ++g) {
        const int h = grids.h(g), w = grids.w(g);
        int* mapped = launch.array<int>(0, grids.first_row(g) + grids.t(g) * h * w, "mapped") + grids.first_row(g);
        for (int frame = 0; frame < grids.t(g); ++frame)
            for (int row = 0; row < h; row += s)
                for (int column = 0; column < w; column += s)
                    for (int inner = 0; inner < s * s; ++inner)
                        *mapped++ = grids.first_position(g) + (row + inner / s) * w + column + inner % s;
    }
}

// The i-th of n numbers that divide [0, last] evenly, as torch.linspace computes it.
float spread(int i, int n, int last) {
    if (n == 1) return 0;
    const float step = float(last) / float(n - 1);
    return i < n / 2 ? step * float(i) : float(last) - step * float(n - 1 - i);
}

// fastPosEmbedIdxWeight(int* indices, T* weights, const int* grids, const int* offsets, int n, int total, int side): the four
// cells of the learned side x side grid around each position, and their bilinear weights.
void position_cells(const Launch& launch) {
    const int n = launch.arg<int>(4), total = launch.arg<int>(5), side = launch.arg<int>(6);
    const Grids grids(launch, 2, 3, n);
    int* indices = launch.array<int>(0, size_t(total) * 4, "indices");
    with_type(launch, [&](auto type) {
        auto* weights = launch.array<decltype(type)>(1, size_t(total) * 4, "weights");
        for (int g = 0; g < n; ++g) {
            for (int i = 0; i < grids.h(g) * grids.w(g); ++i) {
                const float y = spread(i / grids.w(g), grids.h(g), side - 1), x = spread(i % grids.w(g), grids.w(g), side - 1);
                const int top = int(y), left = int(x), bottom = std::min(top + 1, side - 1), right = std::min(left + 1, side - 1);
                const float dy = y - float(top), dx = x - float(left);
                const size_t at = size_t(grids.first_position(g) + i) * 4;
                const int cells[] = {top * side + left, top * side + right, bottom * side + left, bottom * side + right};
                const float shares[] = {(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx};
                for (int k = 0; k < 4; ++k) indices[at + k] = cells[k], weights[at + k] = shares[k];
            }
        }
    });
}

// fusedPosEmbedMerge(T* hidden, const T* cells, const T* weights, const int* mapped, const T* bias, int dim, int dim/vector):
// hidden += bias, then += the weighted cells. Each addition is rounded, as in transformers.
void add_positions(const Launch& launch) {
    const int n = launch.grid.x, dim = launch.arg<int>(5);
    const int* mapped = launch.array<int>(3, n, "mapped");
    const int last = n ? *std::max_element(mapped, mapped + n) : -1;
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* hidden = launch.array<T>(0, size_t(n) * dim, "hidden");
        const T* cells = launch.array<T>(1, size_t(last + 1) * 4 * dim, "cells");
        const T* weights = launch.array<T>(2, size_t(last + 1) * 4, "weights");
        const T* bias = launch.arg<const T*>(4);
        for (int i = 0; i < n; ++i, hidden += dim) {
            for (int d = 0; d < dim; ++d) {
                float position = 0;
                for (int k = 0; k < 4; ++k)
                    position += T(float(cells[(size_t(mapped[i]) * 4 + k) * dim + d]) * float(weights[mapped[i] * 4 + k]));
                const float value = bias ? float(T(float(hidden[d]) + float(bias[d]))) : float(hidden[d]);
                hidden[d] = value + float(T(position));
            }
        }
    });
}

// fastRotaryPosEmb(T* cos_sin, const int* grids, const int* offsets, int n, int total, int head_dim, float scale): the first
// half of a head's pairs turns with the row, the second with the column; pairs lie as (cos, sin).
void rotary_table(const Launch& launch) {
    const int n = launch.arg<int>(3), total = launch.arg<int>(4), dim = launch.arg<int>(5);
    const Grids grids(launch, 1, 2, n);
    with_type(launch, [&](auto type) {
        auto* table = launch.array<decltype(type)>(0, size_t(total) * dim, "table");
        for (int g = 0; g < n; ++g) {
            for (int i = 0; i < grids.h(g) * grids.w(g); ++i) {
                auto* row = table + size_t(grids.first_position(g) + i) * dim;
                for (int pair = 0; pair < dim / 2; ++pair) {
                    const int coordinate = pair < dim / 4 ? i / grids.w(g) : i % grids.w(g);
                    const float angle = float(coordinate) * std::exp2(float(pair % (dim / 4)) * launch.arg<float>(6));
                    row[2 * pair] = std::cos(angle);
                    row[2 * pair + 1] = std::sin(angle);
                }
            }
        }
    });
}

// prepareQKV(T* qkv, T* kv, const T* bias, const T* rotary, const int* mapped, int n, int heads, int, int rotary_dim): adds the
// bias, turns q in place, and puts turned k and v into (heads, 2, n, head_dim).
void prepare_qkv(const Launch& launch) {
    const int n = launch.arg<int>(5), heads = launch.arg<int>(6), rotary_dim = launch.arg<int>(8);
    const int dim = launch.has(", 64>") ? 64 : launch.has(", 72>") ? 72 : 128;
    const int* mapped = launch.array<int>(4, n, "mapped");
    const int last = n ? *std::max_element(mapped, mapped + n) : -1;
    with_type(launch, [&](auto type) {
        using T = decltype(type);
        T* qkv = launch.array<T>(0, size_t(n) * 3 * heads * dim, "qkv");
        T* kv = launch.array<T>(1, size_t(n) * 2 * heads * dim, "kv");
        const T* bias = launch.array<T>(2, size_t(3) * heads * dim, "bias");
        const T* rotary = launch.array<T>(3, size_t(last + 1) * rotary_dim, "rotary");
        for (int i = 0; i < n; ++i) {
            const T* turn = rotary + size_t(mapped[i]) * rotary_dim;
            for (int part = 0; part < 3; ++part) {
                for (int head = 0; head < heads; ++head) {
                    T* from = qkv + (size_t(i) * 3 + part) * heads * dim + size_t(head) * dim;
                    const T* b = bias + (size_t(part) * heads + head) * dim;
                    T* to = part == 0 ? from : kv + ((size_t(head) * 2 + part - 1) * n + i) * dim;
                    for (int d = 0; d < dim; d += 2) {
                        const float x = float(from[d]) + float(b[d]), y = float(from[d + 1]) + float(b[d + 1]);
                        // Values behind the rotary part pad the head, and are nought.
                        const float c = d < rotary_dim ? float(turn[d]) : 0.f, s = d < rotary_dim ? float(turn[d + 1]) : 0.f;
                        to[d] = part == 2 ? x : c * x - s * y;
                        to[d + 1] = part == 2 ? y : c * y + s * x;
                    }
                }
            }
        }
    });
}

// mropeScatter(int* ids, const segments*): position ids (time, height, width) of each row of each segment of a prompt.
void mrope_positions(const Launch& launch) {
    struct Segment { int first_row, rows, base, h, w, offset; };  // h = 0: text; offset: rows of the image before this forward
    const Segment* segments = launch.array<Segment>(1, launch.grid.x, "segments");
    for (unsigned i = 0; i < launch.grid.x; ++i) {
        const Segment& s = segments[i];
        if (!s.rows) continue;
        int* ids = launch.array<int>(0, 3 * size_t(s.first_row + s.rows), "ids") + 3 * size_t(s.first_row);
        for (int row = 0; row < s.rows; ++row, ids += 3) {
            const int k = s.offset + row;
            ids[0] = s.base + (s.h ? k / (s.h * s.w) : k);
            ids[1] = s.base + (s.h ? k / s.w % s.h : k);
            ids[2] = s.base + (s.h ? k % s.w : k);
        }
    }
}

const Register kernels({
    {"turbomind::(anonymous namespace)::buildMappedIdxBatchedKernel", mapped_indices, 5},
    {"turbomind::(anonymous namespace)::fastPosEmbedIdxWeightKernel", position_cells, 7},
    {"turbomind::(anonymous namespace)::fusedPosEmbedMergeKernel", add_positions, 7},
    {"turbomind::(anonymous namespace)::fastRotaryPosEmbKernel", rotary_table, 7},
    {"turbomind::(anonymous namespace)::prepareQKVKernel", prepare_qkv, 9},
    {"turbomind::(anonymous namespace)::mropeScatterKernel", mrope_positions, 2},
});

}  // namespace
}  // namespace host
