// Stands in front of TurboMind's invokeMropePositionIds and writes down what it is asked to compute.
// Loaded with LD_PRELOAD, so that the module's call ends here; on the null runtime nobody needs the ids.

#include <cstdio>
#include <cstdlib>

typedef struct CUstream_st* cudaStream_t;

namespace turbomind {

struct MropeSegment {
    int first_row, rows, base, h, w, offset;  // h = 0: text; offset: rows of the image in earlier forwards
};

int invokeMropePositionIds(int*, const MropeSegment* segments, int count, int, cudaStream_t)
{
    std::FILE* out = std::fopen(std::getenv("SEGMENTS"), "a");
    if (!out) std::abort();
    std::fputc('[', out);
    for (int i = 0; i < count; ++i) {
        const MropeSegment& s = segments[i];
        std::fprintf(out, "%s[%d,%d,%d,%d,%d,%d]", i ? "," : "", s.first_row, s.rows, s.base, s.h, s.w, s.offset);
    }
    std::fputs("]\n", out);
    std::fclose(out);
    return 0;
}

}  // namespace turbomind
