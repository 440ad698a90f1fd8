// cuBLAS: the one product that TurboMind asks of it, C = alpha op(A) op(B) + beta C, column-major,
// 16-bit or float in and out, accumulated in float.
#include "host_runtime.h"
#include "numeric.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace {

using host::Bf16;
using host::Half;

constexpr int kFloat = 0, kHalf = 2, kBf16 = 14;  // cudaDataType
constexpr int kSuccess = 0, kNotSupported = 15;   // cublasStatus_t

// Blocks of C are rows x columns; a panel of A is turned to float once and used for every column.
constexpr int kRows = 256, kDepth = 64, kColumns = 4;

struct Matrix {
    const void* data;
    int type, ld;
    bool transposed;
};

size_t offset(const Matrix& x, int row, int column) {
    return x.transposed ? size_t(row) * x.ld + column : size_t(column) * x.ld + row;
}

template <class T>
void read(const Matrix& x, int row, int rows, int column, int columns, float* to, int to_ld) {
    const T* data = static_cast<const T*>(x.data);
    for (int c = 0; c < columns; ++c) {
        const T* from = data + offset(x, row, column + c);
        const size_t step = x.transposed ? x.ld : 1;
        float* line = to + size_t(c) * to_ld;
        if (step == 1) for (int r = 0; r < rows; ++r) line[r] = from[r];
        else for (int r = 0; r < rows; ++r) line[r] = from[r * step];
    }
}

void read(const Matrix& x, int row, int rows, int column, int columns, float* to, int to_ld) {
    if (x.type == kBf16) read<Bf16>(x, row, rows, column, columns, to, to_ld);
    else if (x.type == kHalf) read<Half>(x, row, rows, column, columns, to, to_ld);
    else read<float>(x, row, rows, column, columns, to, to_ld);
}

template <class T>
void write(T* c, int rows, const float* sums, float alpha, float beta) {
    for (int r = 0; r < rows; ++r) c[r] = alpha * sums[r] + (beta == 0 ? 0.f : beta * float(c[r]));
}

void multiply_add(const float* a, const float* b, int rows, int depth, int columns, int b_ld, float* sums) {
    for (int k = 0; k < depth; ++k) {
        const float* line = a + size_t(k) * kRows;
        for (int c = 0; c < columns; ++c) {
            const float factor = b[size_t(c) * b_ld + k];
            float* sum = sums + size_t(c) * kRows;
            for (int r = 0; r < rows; ++r) sum[r] += factor * line[r];
        }
    }
}

void product(int m, int n, int k, float alpha, const Matrix& a, const Matrix& b, float beta, void* c, int c_type, int c_ld) {
    std::vector<float> panel(size_t(kRows) * k), columns(size_t(k) * n), sums(kRows * kColumns);
    read(b, 0, k, 0, n, columns.data(), k);
    for (int row = 0; row < m; row += kRows) {
        const int rows = std::min(kRows, m - row);
        read(a, row, rows, 0, k, panel.data(), kRows);
        for (int column = 0; column < n; column += kColumns) {
            const int width = std::min(kColumns, n - column);
            std::fill(sums.begin(), sums.end(), 0.f);
            for (int depth = 0; depth < k; depth += kDepth)
                multiply_add(panel.data() + size_t(depth) * kRows, columns.data() + size_t(column) * k + depth, rows,
                             std::min(kDepth, k - depth), width, k, sums.data());
            for (int j = 0; j < width; ++j) {
                const size_t at = size_t(column + j) * c_ld + row;
                const float* sum = sums.data() + size_t(j) * kRows;
                if (c_type == kBf16) write(static_cast<Bf16*>(c) + at, rows, sum, alpha, beta);
                else if (c_type == kHalf) write(static_cast<Half*>(c) + at, rows, sum, alpha, beta);
                else write(static_cast<float*>(c) + at, rows, sum, alpha, beta);
            }
        }
    }
}

bool known(int type) { return type == kFloat || type == kHalf || type == kBf16; }

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) { *handle = std::malloc(1); return kSuccess; }
int cublasDestroy_v2(void* handle) { std::free(handle); return kSuccess; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return kSuccess; }
int cublasSetStream_v2(void*, void*) { return kSuccess; }
int cublasSetWorkspace_v2(void*, void*, size_t) { return kSuccess; }

int cublasGemmEx(void*, int a_op, int b_op, int m, int n, int k, const void* alpha, const void* a, int a_type, int a_ld,
                 const void* b, int b_type, int b_ld, const void* beta, void* c, int c_type, int c_ld, int, int) {
    if (host::settings().mode == host::Mode::Null) return kSuccess;
    if (!known(a_type) || !known(b_type) || !known(c_type)) return kNotSupported;
    product(m, n, k, *static_cast<const float*>(alpha), {a, a_type, a_ld, a_op != 0}, {b, b_type, b_ld, b_op != 0},
            *static_cast<const float*>(beta), c, c_type, c_ld);
    return kSuccess;
}

}  // extern "C"
