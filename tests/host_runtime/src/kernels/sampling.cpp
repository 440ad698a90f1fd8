// From logits to a token: penalties, grammar masks, filters, the draw, and what stops a request.
#include "kernel.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <set>
#include <vector>

namespace host {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kMaxLogProbs = 1024;

// ---- random numbers: the XORWOW generator of cuRAND, so that a seed gives the same draws as on a device ----------

struct RandomState {
    unsigned counter, v[5];
    int spare[6];  // for normal numbers, not used
};
static_assert(sizeof(RandomState) == 48, "as on the device");

RandomState seeded(uint64_t seed) {
    const unsigned low = (unsigned(seed) ^ 0xaad26b49u) * 1099087573u, high = (unsigned(seed >> 32) ^ 0xf7dcefddu) * 2591861531u;
    return {6615241u + high + low, {123456789u + low, 362436069u ^ low, 521288629u + high, 88675123u ^ high, 5783321u + low}, {}};
}

float uniform(RandomState& s) {
    const unsigned t = s.v[0] ^ s.v[0] >> 2;
    std::memmove(s.v, s.v + 1, 4 * sizeof(unsigned));
    s.v[4] = (s.v[4] ^ s.v[4] << 4) ^ (t ^ t << 1);
    s.counter += 362437u;
    return float(s.v[4] + s.counter) * 0x1p-32f + 0x1p-33f;
}

// InitializeRandomStates(states, const uint64* seeds, const bool* mask, size_t n)
void init_random(const Launch& launch) {
    const size_t n = launch.arg<size_t>(3);
    RandomState* states = launch.array<RandomState>(0, n, "states");
    const uint64_t* seeds = launch.array<uint64_t>(1, n, "seeds");
    const bool* mask = launch.array<bool>(2, n, "mask");
    for (size_t i = 0; i < n; ++i)
        if (mask[i]) states[i] = seeded(seeds[i]);
}

// ---- penalties and masks ------------------------------------------------------------------------------------------

// batchApplyTemperature(float* logits, bias, const float* temperatures, int n, int vocab, int padded)
void temperature(const Launch& launch) {
    const int n = launch.arg<int>(3), vocab = launch.arg<int>(4), padded = launch.arg<int>(5);
    float* logits = launch.array<float>(0, size_t(n) * padded, "logits");
    const float* temperatures = launch.array<float>(2, n, "temperatures");
    for (int i = 0; i < n; ++i, logits += padded) {
        const float scale = 1 / (temperatures[i] + 1e-6f);
        for (int t = 0; t < vocab; ++t) logits[t] *= scale;
        std::fill(logits + vocab, logits + padded, kNever);
    }
}

// RepetitionPenalty(float* logits, const float* penalties, const int** tokens, const int* lengths, int vocab, int)
void repetition_penalty(const Launch& launch) {
    const int n = launch.grid.x, vocab = launch.arg<int>(4);
    float* logits = launch.array<float>(0, size_t(n) * vocab, "logits");
    const float* penalties = launch.array<float>(1, n, "penalties");
    int** tokens = launch.array<int*>(2, n, "tokens");
    const int* lengths = launch.array<int>(3, n, "lengths");
    for (int i = 0; i < n; ++i, logits += vocab)
        for (const int t : std::set<int>(tokens[i], tokens[i] + lengths[i]))
            logits[t] = logits[t] < 0 ? logits[t] * penalties[i] : logits[t] / penalties[i];
}

// MinLengthPenalty(float* logits, const int* least, const int* lengths, int padded, int n, const int* ends, int width)
void min_length(const Launch& launch) {
    const int padded = launch.arg<int>(3), n = launch.arg<int>(4), width = launch.arg<int>(6);
    float* logits = launch.array<float>(0, size_t(n) * padded, "logits");
    const int* least = launch.array<int>(1, n, "least lengths");
    const int* lengths = launch.array<int>(2, n, "lengths");
    const int* ends = launch.array<int>(5, size_t(n) * width, "end tokens");
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < width; ++k)
            if (const int end = ends[i * width + k]; end > 0 && lengths[i] + 1 < least[i]) logits[size_t(i) * padded + end] = kLowest;
}

// BanBadWords(float* logits, const int** tokens, const int* lengths, const int* words, size_t width, int vocab)
void ban_words(const Launch& launch) {
    const int n = launch.grid.y, vocab = launch.arg<int>(5);
    const size_t width = launch.arg<size_t>(4);
    float* logits = launch.array<float>(0, size_t(n) * vocab, "logits");
    int** tokens = launch.array<int*>(1, n, "tokens");
    const int* lengths = launch.array<int>(2, n, "lengths");
    const int* words = launch.array<int>(3, size_t(n) * 2 * width, "words");
    for (int i = 0; i < n; ++i, logits += vocab) {
        const int* sequence = words + size_t(i) * 2 * width;
        const int* ends = sequence + width;
        for (size_t k = 0; k < width && ends[k] >= 0; ++k) {
            const int begin = k ? ends[k - 1] : 0, before = ends[k] - begin - 1;
            bool match = lengths[i] >= before;
            for (int j = 0; match && j < before; ++j) match = tokens[i][lengths[i] - before + j] == sequence[begin + j];
            const int banned = sequence[ends[k] - 1];
            if (match && 0 < banned && banned < vocab) logits[banned] = kLowest;
        }
    }
}

// HOST_RUNTIME_MASKS: a line for each row that a grammar masks, eight hexadecimal digits for 32 tokens
void write_mask(const uint32_t* mask, int vocab) {
    static FILE* const file = settings().masks ? std::fopen(settings().masks, "a") : nullptr;
    if (!file) return;
    for (int i = 0; i < (vocab + 31) / 32; ++i) std::fprintf(file, "%08x", mask[i]);
    std::fputc('\n', file);
    std::fflush(file);
}

// LogitsBitmask(float* logits, const int* mask, const int* rows, int vocab, int logits_stride, int mask_stride)
void grammar_mask(const Launch& launch) {
    const int n = launch.grid.y, vocab = launch.arg<int>(3), stride = launch.arg<int>(4), mask_stride = launch.arg<int>(5);
    const int* rows = launch.arg<const int*>(2);
    float* logits = launch.arg<float*>(0);
    const uint32_t* mask = launch.arg<const uint32_t*>(1);
    for (int i = 0; i < n; ++i) {
        const size_t row = rows ? rows[i] : i;
        if (!is_allocated(logits + row * stride, vocab * sizeof(float))) die("%s: logits", launch.name.c_str());
        write_mask(mask + row * mask_stride, vocab);
        for (int t = 0; t < vocab; ++t)
            if (!(mask[row * mask_stride + t / 32] >> (t % 32) & 1)) logits[row * stride + t] = kNever;
    }
}

// ---- filters: rows become probabilities in falling order, with their tokens in `indices` and their number in `kept` -----

std::vector<int> falling(const float* values, int n, int top) {
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    // Of equal values the lower token comes first.
    const auto before = [&](int a, int b) { return values[a] > values[b] || (values[a] == values[b] && a < b); };
    std::partial_sort(order.begin(), order.begin() + top, order.end(), before);
    order.resize(top);
    return order;
}

// The device sorts in two launches; the first has the logits, the second the place for the result, and
// in between the values wait where the first put them: at [0, k) of the request's part of the buffers.
// topKSortStage1(float* logits, int* ids, float* values, int max_k, const int* ks, int vocab, int padded), 8 blocks per request
constexpr int kParts = 8;

void top_k_find(const Launch& launch) {
    const int n = launch.grid.x / kParts, max_k = launch.arg<int>(3), vocab = launch.arg<int>(5), padded = launch.arg<int>(6);
    require(launch.has(", 8>"), launch, "this division of the vocabulary");
    const float* logits = launch.array<float>(0, size_t(n) * padded, "logits");
    int* ids = launch.array<int>(1, size_t(n) * kParts * max_k, "ids");
    float* values = launch.array<float>(2, size_t(n) * kParts * max_k, "values");
    const int* ks = launch.array<int>(4, n, "ks");
    for (int i = 0; i < n; ++i, logits += padded, ids += kParts * max_k, values += kParts * max_k) {
        const std::vector<int> order = falling(logits, vocab, std::min(ks[i], vocab));
        for (size_t j = 0; j < order.size(); ++j) ids[j] = order[j], values[j] = logits[order[j]];
    }
}

// topKSortStage2(const int* ks, int max_k, const int* ids, float* values, int padded, float* sorted, int* indices, int* kept)
void top_k_keep(const Launch& launch) {
    const int n = launch.grid.x, max_k = launch.arg<int>(1), padded = launch.arg<int>(4);
    const int* ks = launch.array<int>(0, n, "ks");
    const int* ids = launch.array<int>(2, size_t(n) * kParts * max_k, "ids");
    const float* values = launch.array<float>(3, size_t(n) * kParts * max_k, "values");
    float* sorted = launch.array<float>(5, size_t(n) * padded, "sorted");
    int* indices = launch.array<int>(6, size_t(n) * padded, "indices");
    int* kept = launch.array<int>(7, n, "kept");
    for (int i = 0; i < n; ++i, ids += kParts * max_k, values += kParts * max_k, sorted += padded, indices += padded) {
        if (ks[i] == 0) continue;  // sorted by top-p
        const int k = kept[i] = std::min(kept[i], ks[i]);
        float sum = 0;
        for (int j = 0; j < k; ++j) sum += sorted[j] = std::exp(values[j] - values[0]);
        for (int j = 0; j < k; ++j) sorted[j] /= sum, indices[j] = ids[j];
    }
}

// softmax(float* logits, int padded, int vocab, const int* kept): only of rows that top-k has not cut
void softmax(const Launch& launch) {
    const int n = launch.grid.x, padded = launch.arg<int>(1), vocab = launch.arg<int>(2);
    float* logits = launch.array<float>(0, size_t(n) * padded, "logits");
    const int* kept = launch.array<int>(3, n, "kept");
    for (int i = 0; i < n; ++i, logits += padded) {
        if (kept[i] != vocab) continue;
        const float highest = *std::max_element(logits, logits + vocab);
        float sum = 0;
        for (int t = 0; t < vocab; ++t) sum += logits[t] = std::exp(logits[t] - highest);
        for (int t = 0; t < vocab; ++t) logits[t] /= sum;
    }
}

// topp_beam_topk(const float* logits, float* sorted, int* indices, int* kept, int vocab, int padded, int* begin, int* end,
// const float* top_ps, const int* top_ks). Here it sorts the whole row, and the sort that follows has nothing to do.
void top_p_sort(const Launch& launch) {
    const int n = launch.grid.x, vocab = launch.arg<int>(4), padded = launch.arg<int>(5);
    const float* logits = launch.array<float>(0, size_t(n) * padded, "probabilities");
    float* sorted = launch.array<float>(1, size_t(n) * padded, "sorted");
    int* indices = launch.array<int>(2, size_t(n) * padded, "indices");
    int* kept = launch.array<int>(3, n, "kept");
    const float* top_ps = launch.array<float>(8, n, "top p");
    const int* top_ks = launch.array<int>(9, n, "top k");
    for (int i = 0; i < n; ++i, logits += padded, sorted += padded, indices += padded) {
        if (top_ks[i] > 0) continue;
        const std::vector<int> order = falling(logits, vocab, vocab);
        std::vector<float> values(vocab);
        for (int j = 0; j < vocab; ++j) values[j] = logits[order[j]];
        std::copy(values.begin(), values.end(), sorted);
        std::copy(order.begin(), order.end(), indices);
        if (values[0] >= top_ps[i]) kept[i] = 1, sorted[0] = 1;
    }
}

void already_sorted(const Launch&) {}

// topPMinPFilter(float* sorted, int* indices, int* kept, int padded, const float* top_ps, const float* min_ps)
void top_p_min_p(const Launch& launch) {
    const int n = launch.grid.x, padded = launch.arg<int>(3);
    float* sorted = launch.array<float>(0, size_t(n) * padded, "sorted");
    int* kept = launch.array<int>(2, n, "kept");
    const float* top_ps = launch.array<float>(4, n, "top p");
    const float* min_ps = launch.array<float>(5, n, "min p");
    for (int i = 0; i < n; ++i, sorted += padded) {
        int count = kept[i];
        float sum = 0;
        if (top_ps[i] != 1) {  // up to the first token with which the sum exceeds p
            int j = 0;
            while (j < count && sum <= top_ps[i]) sum += sorted[j++];
            count = j;
        }
        if (min_ps[i] != 0) {
            int j = 0;
            while (j < count && sorted[j] >= sorted[0] * min_ps[i]) ++j;
            count = j;
        }
        if (top_ps[i] == 1 && min_ps[i] == 0) continue;
        sum = std::accumulate(sorted, sorted + count, 0.f);
        for (int j = 0; j < count; ++j) sorted[j] /= sum;
        kept[i] = count;
    }
}

// ---- the draw --------------------------------------------------------------------------------------------------------

// sampling(const float* sorted, int stride, const int* indices, const int* kept, states, const int* state_rows, int* output,
// int* lengths, float* logprobs, int* logprob_tokens, int* logprob_numbers), a block per request
void sample(const Launch& launch) {
    const int n = launch.grid.x, stride = launch.arg<int>(1);
    int* output = launch.array<int>(6, n, "output");
    int* lengths = launch.array<int>(7, n, "lengths");
    if (settings().delay_us) usleep(settings().delay_us);
    for (int i = 0; i < n; ++i) ++lengths[i];
    if (settings().mode == Mode::Null) {
        std::fill_n(output, n, settings().null_token);
        return;
    }
    const float* sorted = launch.array<float>(0, size_t(n - 1) * stride + 1, "sorted");
    const int* indices = launch.array<int>(2, size_t(n - 1) * stride + 1, "indices");
    const int* kept = launch.array<int>(3, n, "kept");
    const int* state_rows = launch.array<int>(5, n, "state rows");
    float* logprobs = launch.arg<float*>(8);
    for (int i = 0; i < n; ++i, sorted += stride, indices += stride) {
        const float draw = uniform(launch.arg<RandomState*>(4)[state_rows[i]]);
        int chosen = 0;
        for (float sum = sorted[0]; sum <= draw && chosen + 1 < kept[i]; sum += sorted[chosen]) ++chosen;
        output[i] = indices[chosen];
        if (!logprobs) continue;
        const int count = launch.arg<int*>(10)[i] = std::min(kept[i], kMaxLogProbs);
        for (int j = 0; j < count; ++j) {
            const int from = j == kMaxLogProbs - 1 && chosen >= kMaxLogProbs ? chosen : j;
            logprobs[size_t(i) * kMaxLogProbs + j] = std::log(sorted[from]);
            launch.arg<int*>(9)[size_t(i) * kMaxLogProbs + j] = indices[from];
        }
    }
}

// ---- what follows: without these no warm-up and no request would ever end ----------------------------------------------

// AppendTokenIds(int** rows, const int* tokens, const int* positions, int n)
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

const Register kernels({
    {"turbomind::InitializeRandomStates_Kernel", init_random, 4},
    {"turbomind::batchApplyTemperaturePenalty_v2", temperature, 6},
    {"turbomind::RepetitionPenaltyKernel", repetition_penalty, 6},
    {"turbomind::batchApplyMinLengthPenalty", min_length, 7},
    {"turbomind::BanBadWordsKernel", ban_words, 6},
    {"LogitsBitmaskKernel", grammar_mask, 6},
    {"turbomind::topKSortStage1", top_k_find, 7},
    {"turbomind::topKSortStage2", top_k_keep, 8},
    {"turbomind::softmax", softmax, 4},
    {"turbomind::topPSortInitialize", already_sorted, kAny},
    {"cub::DeviceSegmentedRadixSortKernel", already_sorted, kAny},
    {"turbomind::topp_beam_topk_kernel", top_p_sort, 10},
    {"turbomind::topPMinPFilter", top_p_min_p, 6},
    {"turbomind::sampling", sample, 11, true},
    {"turbomind::AppendTokenIdsKernel", append_tokens, 4, true},
    {"turbomind::length_criterion_v2", length_criterion, 4, true},
    {"turbomind::stop_words_criterion_v2", stop_words, 6, true},
});

}  // namespace
}  // namespace host
