// Reports to Python the points of TurboMind's forward that DeepStack needs: the positions of images
// in a batch, the output of a vision block, the end of a decoder layer.
//
// LMDeploy's module calls its own exported functions through a table of addresses (the "global
// offset table"), as position-independent code does for every symbol that another library might
// replace. `hook_attach` finds the entries of four functions through the module's dynamic section
// and replaces them by the functions below, which call the originals. The module's code and classes
// are not changed, and `hook_detach` restores the entries. Needs libc and libdl, not CUDA.
//
// Cost: three functions are called only for vision and for prompts with images. The fourth, the
// norm after each half of a decoder layer, is called in every step of every request; without a
// running forward with images it costs one comparison, see `residual_rms_norm`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
enum { CALL_SLOT = R_X86_64_JUMP_SLOT, ADDRESS_SLOT = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { CALL_SLOT = R_AARCH64_JUMP_SLOT, ADDRESS_SLOT = R_AARCH64_GLOB_DAT };
#else
#error "unknown processor"
#endif

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
typedef void Function(void);

enum { MROPE, MERGE, LAYER_NORM, RMS_NORM, FUNCTIONS };
static _Atomic(Function *) originals[FUNCTIONS];  // calls may come while `hook_check` looks again

static inline Function *original(int f) { return atomic_load_explicit(&originals[f], memory_order_relaxed); }

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

static const struct { const char *symbol; Function *replacement; } functions[FUNCTIONS] = {
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

enum { MOST_SLOTS = 16 };
static Function **slots[FUNCTIONS][MOST_SLOTS];
static int slot_count[FUNCTIONS];
static char problem[512];

#define FAIL(...) return snprintf(problem, sizeof problem, __VA_ARGS__), problem

struct Module {
    const struct link_map *map;
    const ElfW(Sym) *symbols;
    const char *names;
    const ElfW(Rela) *tables[2];
    size_t counts[2];
    uintptr_t sealed_begin, sealed_end;  // read-only after relocation
};

static int find_sealed(struct dl_phdr_info *info, size_t size, void *argument) {
    struct Module *module = argument;
    (void)size;
    if (info->dlpi_addr != module->map->l_addr) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        if (header->p_type != PT_GNU_RELRO) continue;
        module->sealed_begin = info->dlpi_addr + header->p_vaddr;
        module->sealed_end = module->sealed_begin + header->p_memsz;
    }
    return 1;
}

static struct Module read_module(const struct link_map *map) {
    struct Module module = {.map = map};
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
        const uintptr_t value = entry->d_un.d_val;
        const uintptr_t address = value < map->l_addr ? value + map->l_addr : value;  // glibc has added l_addr
        switch (entry->d_tag) {
            case DT_SYMTAB: module.symbols = (const ElfW(Sym) *)address; break;
            case DT_STRTAB: module.names = (const char *)address; break;
            case DT_JMPREL: module.tables[0] = (const ElfW(Rela) *)address; break;
            case DT_PLTRELSZ: module.counts[0] = value / sizeof(ElfW(Rela)); break;
            case DT_RELA: module.tables[1] = (const ElfW(Rela) *)address; break;
            case DT_RELASZ: module.counts[1] = value / sizeof(ElfW(Rela)); break;
        }
    }
    dl_iterate_phdr(find_sealed, &module);
    return module;
}

static void find_slots(const struct Module *module) {
    memset(slot_count, 0, sizeof slot_count);
    for (int table = 0; table < 2; ++table) {
        for (size_t i = 0; i < module->counts[table]; ++i) {
            const ElfW(Rela) *relocation = &module->tables[table][i];
            const unsigned type = ELF64_R_TYPE(relocation->r_info);
            if (type != CALL_SLOT && type != ADDRESS_SLOT) continue;
            const char *name = module->names + module->symbols[ELF64_R_SYM(relocation->r_info)].st_name;
            for (int f = 0; f < FUNCTIONS; ++f)
                if (slot_count[f] < MOST_SLOTS && !strcmp(name, functions[f].symbol))
                    slots[f][slot_count[f]++] = (Function **)(module->map->l_addr + relocation->r_offset);
        }
    }
}

// The file of the library that contains an address, or NULL.
static const char *home(Function *address, uintptr_t *base) {
    Dl_info info;
    *base = 0;
    if (!dladdr((void *)(uintptr_t)address, &info)) return NULL;
    *base = (uintptr_t)info.dli_fbase;
    return info.dli_fname;
}

static const char *check_function(const struct Module *module, void *handle, int f) {
    const char *symbol = functions[f].symbol;
    const uintptr_t base = module->map->l_addr;
    uintptr_t found = 0;
    Function *const function = (Function *)(uintptr_t)dlsym(handle, symbol);
    if (!function) FAIL("it has no function %s", symbol);
    atomic_store_explicit(&originals[f], function, memory_order_relaxed);
    if (!home(function, &found) || found != base) FAIL("%s belongs to another library", symbol);
    if (!slot_count[f]) FAIL("it calls %s directly, so that the call cannot be taken over", symbol);
    for (int s = 0; s < slot_count[f]; ++s) {
        const uintptr_t slot = (uintptr_t)slots[f][s];
        if (slot >= module->sealed_begin && slot < module->sealed_end)
            FAIL("its table of calls is read-only (%s)", symbol);
        const char *name = home(*slots[f][s], &found);
        // An unbound slot also points into the module.
        if (*slots[f][s] != functions[f].replacement && found != base)
            FAIL("%s is already taken over by %s", symbol, name ? name : "something unknown");
    }
    return NULL;
}

// Checks a loaded module, given its path, and changes nothing. Returns NULL, or the problem.
const char *hook_check(const char *path) {
    void *handle = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
    if (!handle) FAIL("%s is not loaded", path);
    struct link_map *map = NULL;
    const char *wrong = NULL;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map)) wrong = "its dynamic section cannot be read";
    if (!wrong) {
        const struct Module module = read_module(map);
        find_slots(&module);
        for (int f = 0; !wrong && f < FUNCTIONS; ++f) wrong = check_function(&module, handle, f);
    }
    dlclose(handle);
    return wrong;
}

// Intercepts the functions of a loaded module. Returns NULL, or the problem; then nothing is
// changed.
const char *hook_attach(const char *path) {
    const char *wrong = hook_check(path);
    if (wrong) return wrong;
    for (int f = 0; f < FUNCTIONS; ++f)
        for (int s = 0; s < slot_count[f]; ++s)
            __atomic_store_n(slots[f][s], functions[f].replacement, __ATOMIC_RELEASE);
    return NULL;
}

// The number of the module's call slots that point to this library; 0 if it is not attached, or if
// another library has replaced a slot.
int hook_bound(void) {
    int bound = 0;
    for (int f = 0; f < FUNCTIONS; ++f) {
        for (int s = 0; s < slot_count[f]; ++s) {
            if (*slots[f][s] != functions[f].replacement) return 0;
            ++bound;
        }
    }
    return bound;
}

// Restores the slots that still point to this library.
void hook_detach(void) {
    for (int f = 0; f < FUNCTIONS; ++f)
        for (int s = 0; s < slot_count[f]; ++s)
            if (*slots[f][s] == functions[f].replacement)
                __atomic_store_n(slots[f][s], original(f), __ATOMIC_RELEASE);
}

// Sets the listener and the events to report; NULL removes the listener. A forward that has begun
// keeps its events, and one call to the previous listener may still be running.
void hook_listen(Listener listen, uint64_t blocks, int layers) {
    atomic_store_explicit(&wanted_blocks, blocks, memory_order_relaxed);
    atomic_store_explicit(&wanted_layers, layers, memory_order_relaxed);
    atomic_store_explicit(&listener, listen, memory_order_release);
}
