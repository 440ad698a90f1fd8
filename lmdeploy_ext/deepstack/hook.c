// Reports to Python the points of TurboMind's forward that DeepStack needs: the positions of images
// in a batch, the output of a vision block, the end of a decoder layer.
//
// `hook_attach` replaces four functions of LMDeploy's module by the functions below, which call the
// originals, and `hook_detach` restores them: see call_slots.h. Needs libc and libdl, not CUDA.
//
// Cost: three functions are called only for vision and for prompts with images. The fourth, the
// norm after each half of a decoder layer, is called in every step of every request; without a
// running forward with images it costs one comparison, see `residual_rms_norm`.
#include "call_slots.h"

// ---- what Python is told ------------------------------------------------------------------------------------

enum Kind { SEGMENTS, VISION_BEGINS, BLOCK_ENDS, LAYER_ENDS };

// `data` is device memory, valid in the order of `stream`, for the time of the call.
//   SEGMENTS       int[count][6], see MropeSegment in upstream's qwenvit_kernels.h; on the scheduling thread
//   VISION_BEGINS  patches (count, width) of all images of a forward; like the rest on the forward's thread
//   BLOCK_ENDS     the same behind vision block `index`
//   LAYER_ENDS     residual (count, width) of all tokens, before decoder layer `index` adds its last part to it
struct Event {
    void *data;
    void *stream;
    int32_t kind, index, count, width, dtype;
};

typedef void (*Listener)(const struct Event *);

static _Atomic(Listener) listener;
static _Atomic(uint64_t) wanted_blocks;  // bit b: report the end of vision block b
static atomic_int wanted_layers;         // report the end of so many first decoder layers

// The forward that a thread runs, and the events to report for it: an engine may be closed
// meanwhile.
static _Thread_local struct {
    bool with_images;
    int block_norms, layer_norms, layers;
    uint64_t blocks;
} forward;
static atomic_int forwards_with_images;

static void tell(enum Kind kind, int index, const void *data, int count, int width, int dtype, void *stream) {
    const Listener listen = atomic_load_explicit(&listener, memory_order_acquire);
    if (!listen) return;
    const struct Event event = {(void *)data, stream, kind, index, count, width, dtype};
    listen(&event);
}

static void end_forward(void) {
    if (forward.with_images) atomic_fetch_sub(&forwards_with_images, 1);
    forward.with_images = false;
}

static void begin_forward(void) {
    end_forward();
    if (!atomic_load_explicit(&listener, memory_order_acquire)) return;
    forward.with_images = true;
    forward.block_norms = forward.layer_norms = 0;
    forward.blocks = atomic_load_explicit(&wanted_blocks, memory_order_relaxed);
    forward.layers = atomic_load_explicit(&wanted_layers, memory_order_relaxed);
    atomic_fetch_add(&forwards_with_images, 1);
}

// ---- the functions of TurboMind -----------------------------------------------------------------------------

typedef void MropePositionIds(int *ids, const void *segments, int count, int longest, void *stream);
typedef void FusedPosEmbedMerge(void *hidden, const void *embeds, const void *weights, const int *mapped,
                                const void *bias, int rows, int dim, int dtype, void *stream);
typedef void ResidualBiasLayerNorm(void *hidden, void *residual, const void *weight, const void *bias,
                                   const void *residual_bias, int dtype, int dim, int rows, float epsilon,
                                   void *stream);
typedef void ResidualBiasRMSNorm(void *hidden, void *residual, const void *weight, const void *bias, int dtype,
                                 int dim, int rows, float epsilon, bool zero_centered, void *stream);

enum { MROPE, MERGE, LAYER_NORM, RMS_NORM, FUNCTIONS };
static struct Hooked functions[FUNCTIONS];

static inline Function *original(int f) { return original_of(&functions[f]); }

// Called to prepare a batch in which prompts with images are prefilled.
static void mrope_position_ids(int *ids, const void *segments, int count, int longest, void *stream) {
    tell(SEGMENTS, 0, segments, count, 6, 0, stream);
    ((MropePositionIds *)original(MROPE))(ids, segments, count, longest, stream);
}

// Adds positions to the patches, which is the begin of the vision tower in a forward.
static void fused_pos_embed_merge(void *hidden, const void *embeds, const void *weights, const int *mapped,
                                  const void *bias, int rows, int dim, int dtype, void *stream) {
    begin_forward();
    tell(VISION_BEGINS, 0, hidden, rows, dim, dtype, stream);
    ((FusedPosEmbedMerge *)original(MERGE))(hidden, embeds, weights, mapped, bias, rows, dim, dtype, stream);
}

// Called after attention and after the MLP of each vision block: adds the branch to `residual`,
// then normalises.
static void residual_layer_norm(void *hidden, void *residual, const void *weight, const void *bias,
                                const void *residual_bias, int dtype, int dim, int rows, float epsilon,
                                void *stream) {
    ((ResidualBiasLayerNorm *)original(LAYER_NORM))(hidden, residual, weight, bias, residual_bias, dtype, dim, rows,
                                                    epsilon, stream);
    if (!forward.with_images) return;
    const int call = forward.block_norms++, block = call / 2;
    if (call % 2 && block < 64 && forward.blocks >> block & 1)
        tell(BLOCK_ENDS, block, residual, rows, dim, dtype, stream);
}

__attribute__((noinline, cold))
static void before_residual_rms_norm(void *residual, int dtype, int dim, int rows, void *stream) {
    if (!forward.with_images) return;  // only another thread's forward has images
    const int call = forward.layer_norms++, layer = call / 2;
    if (call % 2 && layer < forward.layers) tell(LAYER_ENDS, layer, residual, rows, dim, dtype, stream);
    if (call >= 2 * forward.layers - 1) end_forward();
}

// Called after attention and after the MLP of each decoder layer: adds the branch to `residual`,
// then normalises. Features that are added to `residual` before the second call are thus part of
// the layer's output.
static void residual_rms_norm(void *hidden, void *residual, const void *weight, const void *bias, int dtype, int dim,
                              int rows, float epsilon, bool zero_centered, void *stream) {
    if (__builtin_expect(atomic_load_explicit(&forwards_with_images, memory_order_relaxed), 0))
        before_residual_rms_norm(residual, dtype, dim, rows, stream);
    ((ResidualBiasRMSNorm *)original(RMS_NORM))(hidden, residual, weight, bias, dtype, dim, rows, epsilon,
                                                zero_centered, stream);
}

static struct Hooked functions[FUNCTIONS] = {
    [MROPE] = {"_ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiiP11CUstream_st",
               (Function *)mrope_position_ids},
    [MERGE] = {"_ZN9turbomind24invokeFusedPosEmbedMergeEPvPKvS2_PKiS2_iiNS_8DataTypeEP11CUstream_st",
               (Function *)fused_pos_embed_merge},
    [LAYER_NORM] = {"_ZN9turbomind27invokeResidualBiasLayerNormEPvS0_PKvS2_S2_NS_8DataTypeEiifP11CUstream_st",
                    (Function *)residual_layer_norm},
    [RMS_NORM] = {"_ZN9turbomind25invokeResidualBiasRMSNormEPvS0_PKvS2_NS_8DataTypeEiifbP11CUstream_st",
                  (Function *)residual_rms_norm},
};

// ---- taking the calls over ----------------------------------------------------------------------------------

// Checks a loaded module, given its path, and changes nothing. Returns NULL, or the problem.
const char *hook_check(const char *path) { return check_calls(path, functions, FUNCTIONS); }

// Intercepts the functions of a loaded module. Returns NULL, or the problem; then nothing is
// changed.
const char *hook_attach(const char *path) { return take_calls(path, functions, FUNCTIONS); }

// The number of the module's call slots that point to this library; 0 if it is not attached, or if
// another library has replaced a slot.
int hook_bound(void) { return bound_calls(functions, FUNCTIONS); }

// Restores the slots that still point to this library.
void hook_detach(void) { restore_calls(functions, FUNCTIONS); }

// Sets the listener and the events to report; NULL removes the listener. A forward that has begun
// keeps its events, and one call to the previous listener may still be running.
void hook_listen(Listener listen, uint64_t blocks, int layers) {
    atomic_store_explicit(&wanted_blocks, blocks, memory_order_relaxed);
    atomic_store_explicit(&wanted_layers, layers, memory_order_relaxed);
    atomic_store_explicit(&listener, listen, memory_order_release);
}
