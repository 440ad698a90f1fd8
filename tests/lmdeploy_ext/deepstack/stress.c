// Drives the hook library as TurboMind's threads do, for `test_sanitizers`. With -DMODULE it is the module whose calls
// are taken over, else the program: stress HOOK MODULE ROUNDS [fault].
//
// Threads: one sets batches up, two run forwards with images, two decode, one has listeners come and go, one takes the
// calls over again and again. Memory that an event shows is on the heap and exactly as large as the event says.
#include <stdbool.h>
#include <stdint.h>

enum { BLOCKS = 5, LAYERS = 4, PATCHES = 8, WIDTH = 6, ROWS = 3 };

#ifdef MODULE

#include <stdatomic.h>

atomic_long calls[4];

void MROPE(int *ids, const void *segments, int count, int longest, void *stream) { calls[0]++; }
void MERGE(void *hidden, const void *embeds, const void *weights, const int *mapped, const void *bias, int rows, int dim,
           int dtype, void *stream) { calls[1]++; }
void LAYER_NORM(void *hidden, void *residual, const void *weight, const void *bias, const void *residual_bias, int dtype,
                int dim, int rows, float epsilon, void *stream) { calls[2]++; ((int *)residual)[dim * rows - 1]++; }
void RMS_NORM(void *hidden, void *residual, const void *weight, const void *bias, int dtype, int dim, int rows,
              float epsilon, bool zero_centered, void *stream) { calls[3]++; ((int *)residual)[dim * rows - 1]++; }

void set_up(const int *segments, int count) { MROPE(0, segments, count, 9, 0); }

void forward(int *patches, int *residual, int blocks, int layers) {
    if (blocks) MERGE(patches, 0, 0, 0, 0, PATCHES, WIDTH, 7, 0);
    for (int i = 0; i < 2 * blocks; ++i) LAYER_NORM(0, patches, 0, 0, 0, 7, WIDTH, PATCHES, 0.5f, 0);
    for (int i = 0; i < 2 * layers; ++i) RMS_NORM(0, residual, 0, 0, 7, WIDTH, ROWS, 0.5f, false, 0);
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAUSE_US = 50 };  // most of the time the hook is at work

struct Event {
    void *data, *stream;
    int32_t kind, index, count, width, dtype;
};
typedef void Listener(const struct Event *);

static const char *(*hook_attach)(const char *);
static int (*hook_bound)(void);
static void (*hook_detach)(void);
static void (*hook_listen)(Listener *, uint64_t, int);
static void (*set_up)(const int *, int);
static void (*forward)(int *, int *, int, int);

static const char *module_path;
static long rounds;
static atomic_long told[4];
static atomic_bool over;
static long unguarded;  // of the fault "race"
static atomic_long set_ups, prefilled, decoded;

static bool heard(void) { return told[0] && told[1] && told[2] && told[3]; }

// On a busy machine the others may be kept waiting while nobody listens: then there are more rounds.
static bool goes_on(long round) { return round < rounds || (!over && !heard()); }

// Reads what it is shown to the last number, and changes what may be changed.
static void listen(const struct Event *event) {
    told[event->kind]++;
    int *data = event->data;
    long sum = 0;
    for (int i = 0; i < event->count * event->width; ++i) sum += data[i];
    if (event->kind != 0) data[event->count * event->width - 1] += sum == -1;
}

static void *prefills(void *fault) {
    for (long i = 0; goes_on(i); ++i, ++prefilled) {
        const int patches = PATCHES - (fault && !strcmp(fault, "overrun"));
        int *tower = calloc((size_t)patches * WIDTH, sizeof *tower);
        int *residual = calloc(ROWS * WIDTH, sizeof *residual);
        forward(tower, residual, BLOCKS, LAYERS);
        free(tower);
        free(residual);
        if (fault && !strcmp(fault, "race")) unguarded++;
    }
    return NULL;
}

static void *decodes(void *unused) {
    (void)unused;
    int *residual = calloc(ROWS * WIDTH, sizeof *residual);
    for (long i = 0; goes_on(i / 4); ++i, ++decoded) forward(NULL, residual, 0, LAYERS);
    free(residual);
    return NULL;
}

static void *schedules(void *unused) {
    (void)unused;
    for (long i = 0; goes_on(i); ++i, ++set_ups) {
        const int count = 1 + i % 3;
        int *segments = calloc((size_t)count * 6, sizeof *segments);
        set_up(segments, count);
        free(segments);
    }
    return NULL;
}

static void *registers(void *unused) {
    (void)unused;
    while (!over) {
        hook_listen(listen, 0x15, 3);
        usleep(PAUSE_US);
        hook_listen(NULL, 0, 0);
    }
    return NULL;
}

static void *attaches(void *unused) {
    (void)unused;
    while (!over) {
        const char *wrong = hook_attach(module_path);
        if (wrong) printf("attach: %s\n", wrong), exit(3);
        if (hook_bound() != 4) printf("%d calls lead to the hook\n", hook_bound()), exit(3);
        usleep(PAUSE_US);
        hook_detach();
    }
    return NULL;
}

#define LOOK(library, name) *(void **)&name = dlsym(library, #name)

int main(int count, char **words) {
    void *hook = dlopen(words[1], RTLD_NOW), *module = dlopen(words[2], RTLD_NOW);
    if (!hook || !module) return printf("%s\n", dlerror()), 3;
    LOOK(hook, hook_attach), LOOK(hook, hook_bound), LOOK(hook, hook_detach), LOOK(hook, hook_listen);
    LOOK(module, set_up), LOOK(module, forward);
    module_path = words[2];
    rounds = atol(words[3]);
    char *fault = count > 4 ? words[4] : NULL;

    void *(*const work[])(void *) = {prefills, prefills, decodes, decodes, schedules};
    void *(*const meddling[])(void *) = {registers, attaches};
    enum { WORK = 5, MEDDLING = 2 };
    pthread_t working[WORK], others[MEDDLING];
    if (hook_attach(module_path)) return 3;
    hook_listen(listen, 0x15, 3);
    for (int i = 0; i < MEDDLING; ++i) pthread_create(&others[i], NULL, meddling[i], NULL);
    for (int i = 0; i < WORK; ++i) pthread_create(&working[i], NULL, work[i], fault);
    for (int i = 0; i < WORK; ++i) pthread_join(working[i], NULL);
    over = true;
    for (int i = 0; i < MEDDLING; ++i) pthread_join(others[i], NULL);

    // TurboMind got every call, and the hook is none the worse: one forward is told as it should be.
    const atomic_long *calls = dlsym(module, "calls");
    printf("enough %d\n", set_ups >= rounds && prefilled >= 2 * rounds && decoded >= 8 * rounds);
    printf("lost %ld %ld %ld %ld\n", set_ups - calls[0], prefilled - calls[1], 2 * BLOCKS * prefilled - calls[2],
           2 * LAYERS * (prefilled + decoded) - calls[3]);
    printf("told among others %d\n", heard());
    if (hook_attach(module_path)) return 3;
    hook_listen(listen, 0x15, 3);
    memset((void *)told, 0, sizeof told);
    rounds = 1;
    prefills(NULL), schedules(NULL), decodes(NULL);
    printf("told %ld %ld %ld %ld\n", told[0], told[1], told[2], told[3]);
    hook_listen(NULL, 0, 0);
    hook_detach();
    return 0;
}

#endif
