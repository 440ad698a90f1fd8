// The kernels that move a request forward: without them no warm-up and no request would ever end.
#include "host_runtime.h"

#include <unistd.h>

namespace host {
namespace {

// append_token_ids(int** rows, const int* tokens, const int* positions, int n)
void append_tokens(const Launch& launch) {
    const int n = launch.arg<int>(3);
    int** rows = launch.array<int*>(0, n, "rows");
    const int* tokens = launch.array<int>(1, n, "tokens");
    const int* positions = launch.array<int>(2, n, "positions");
    for (int i = 0; i < n; ++i) rows[i][positions[i]] = tokens[i];
}

// length_criterion(bool* finished, const int* lengths, const int* limits, int n)
void length_criterion(const Launch& launch) {
    const int n = launch.arg<int>(3);
    bool* finished = launch.array<bool>(0, n, "finished");
    const int* lengths = launch.array<int>(1, n, "lengths");
    const int* limits = launch.array<int>(2, n, "limits");
    for (int i = 0; i < n; ++i)
        if (lengths[i] >= limits[i]) finished[i] = true;
}

// stop_words_criterion(const int** tokens, const int* lengths, const int* words, bool* finished, int width, int n)
// `words` holds for each request `width` tokens and then `width` end offsets of the stop sequences, -1 behind the last.
void stop_words(const Launch& launch) {
    const int width = launch.arg<int>(4), n = launch.arg<int>(5);
    int** tokens = launch.array<int*>(0, n, "tokens");
    const int* lengths = launch.array<int>(1, n, "lengths");
    const int* words = launch.array<int>(2, size_t(n) * 2 * width, "stop words");
    bool* finished = launch.array<bool>(3, n, "finished");
    for (int i = 0; i < n; ++i) {
        const int* sequence = words + size_t(i) * 2 * width;
        const int* ends = sequence + width;
        for (int k = 0, begin = 0; k < width && ends[k] >= 0; begin = ends[k++]) {
            const int size = ends[k] - begin;
            bool match = lengths[i] >= size;
            for (int j = 0; match && j < size; ++j) match = tokens[i][lengths[i] - size + j] == sequence[begin + j];
            if (match) finished[i] = true;
        }
    }
}

// sampling(logits, stride, indices, kept, random state, state rows, int* output, int* lengths, …), a block per request
void null_sampling(const Launch& launch) {
    const unsigned n = launch.grid.x;
    int* output = launch.array<int>(6, n, "output");
    int* lengths = launch.array<int>(7, n, "lengths");
    if (settings().delay_us) usleep(settings().delay_us);
    for (unsigned i = 0; i < n; ++i) {
        output[i] = settings().null_token;
        ++lengths[i];
    }
}

const Register kernels({
    {"turbomind::AppendTokenIdsKernel", append_tokens, true},
    {"turbomind::length_criterion_v2", length_criterion, true},
    {"turbomind::stop_words_criterion_v2", stop_words, true},
    {"turbomind::sampling", null_sampling, true},
});

}  // namespace
}  // namespace host
