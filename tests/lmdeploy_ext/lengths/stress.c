// Runs lengths.c under sanitizers: random texts and tokens through followers and masks, then many threads
// that make, fill and advance matchers whose grammars come and go. Arguments: a file of tables, each a count
// and so many numbers, and the number of rounds.
#include "lengths.c"

#include <time.h>

static const char *TOKENS[] = {
    "{", "}", "[", "]", ", ", ": ", "\"", "\"a\"", "\"ab\": \"", "\"name\": \"", "\"below\": [", "1.5", "null", "x", "\xC3\xA9",
    "\xC3", "\xA9", "\\", "\\n", "\\u", "\\ud83d", "d8", "3", "\\ude00", "\\\"", "\", \"", "\"\"", "\"}", "abc", "", "\", \"b\": \"xy",
};
enum { TOKEN_COUNT = sizeof TOKENS / sizeof *TOKENS, MATCHERS = 64, GRAMMARS = 8, THREADS = 4 };

static struct Vocabulary *vocabulary(void) {
    uint8_t bytes[1024];
    int64_t offsets[TOKEN_COUNT + 1] = {0};
    for (int i = 0; i < TOKEN_COUNT; ++i) {
        const size_t size = strlen(TOKENS[i]);
        memcpy(bytes + offsets[i], TOKENS[i], size);
        offsets[i + 1] = offsets[i] + (int64_t)size;
    }
    return lengths_vocabulary(bytes, offsets, TOKEN_COUNT);
}

static uint32_t draw(uint32_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

static int64_t walk(struct Limits *limits, uint32_t seed, int rounds) {
    int64_t kept = 0;
    for (int round = 0; round < rounds; ++round) {
        struct Follower *follower = lengths_follower(limits);
        for (int i = 0; i < 200; ++i) {
            uint32_t mask = draw(&seed) | draw(&seed);
            lengths_narrow(follower, &mask);
            const int32_t token = (int32_t)(draw(&seed) % TOKEN_COUNT);
            if (mask >> token & 1 && !lengths_accept(follower, token)) exit(3);  // the mask lets it through
            else if (!(mask >> token & 1)) continue;
            ++kept;
        }
        int32_t place[6];
        lengths_place(follower, place);
        lengths_release_follower(follower);
    }
    return kept;
}

// What TurboMind's functions do, on objects that are one word.
static void *cells[MATCHERS];
static int ends[MATCHERS], grammar_cells[GRAMMARS];

static void fake_construct(void *self, const void *grammar, void *stops, bool without, int rollback) {
    (void)grammar, (void)stops, (void)without, (void)rollback;
    *(void **)self = &ends[(void **)self - cells];
}
static bool fake_fill(void *self, struct Tensor *mask, int row, bool debug) {
    (void)self, (void)debug;
    ((uint32_t *)mask->data)[row] = ~0u;
    return false;
}
static bool fake_accept(void *self, int token, bool debug) {
    (void)self, (void)token, (void)debug;
    return true;
}

static struct Limits *all[GRAMMARS];
static int rounds;

static void *work(void *argument) {
    const int thread = (int)(intptr_t)argument;
    uint32_t seed = 77u + (uint32_t)thread;
    for (int round = 0; round < rounds; ++round) {
        const int matcher = thread * (MATCHERS / THREADS) + (int)(draw(&seed) % (MATCHERS / THREADS));
        const int number = (int)(draw(&seed) % GRAMMARS);
        void *grammar = &grammar_cells[number];
        hook_limit(grammar, draw(&seed) % 4 ? all[number] : NULL);
        construct(&cells[matcher], &grammar, NULL, false, 0);
        uint32_t masks[3];
        const int64_t shape[2] = {3, 1};
        struct Tensor tensor = {.data = masks, .dimensions = 2, .shape = shape};
        for (int step = 0; step < 40; ++step) {
            const int row = (int)(draw(&seed) % 3);
            fill(&cells[matcher], &tensor, row, false);
            const int token = (int)(draw(&seed) % TOKEN_COUNT);
            if (masks[row] >> token & 1) accept_token(&cells[matcher], token, false);
        }
    }
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    rounds = atoi(arguments[2]);
    struct Vocabulary *v = vocabulary();
    FILE *file = fopen(arguments[1], "rb");
    int32_t size;
    int64_t kept = 0;
    int tables = 0;
    while (file && fread(&size, sizeof size, 1, file) == 1) {
        int32_t *numbers = malloc(sizeof *numbers * (size_t)size);
        if (fread(numbers, sizeof *numbers, (size_t)size, file) != (size_t)size) return 2;
        struct Limits *limits = lengths_limits(v, numbers, size);
        free(numbers);
        kept += walk(limits, 1u + (uint32_t)tables, rounds / 10 + 1);
        all[tables++ % GRAMMARS] = limits;
    }
    fclose(file);
    for (int i = tables; i < GRAMMARS; ++i) {
        all[i] = all[i % tables];
        atomic_fetch_add(&all[i]->owners, 1);
    }
    atomic_store(&functions[CONSTRUCT].original, (Function *)fake_construct);
    atomic_store(&functions[FILL].original, (Function *)fake_fill);
    atomic_store(&functions[ACCEPT].original, (Function *)fake_accept);
    pthread_t threads[THREADS];
    for (intptr_t i = 0; i < THREADS; ++i) pthread_create(&threads[i], NULL, work, (void *)i);
    for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
    int64_t found[COUNTERS + 2];
    hook_counters(found);
    hook_forget();
    for (int i = 0; i < GRAMMARS; ++i) {
        hook_limit(&grammar_cells[i], NULL);
        lengths_release_limits(all[i]);
    }
    lengths_release_vocabulary(v);
    printf("kept %d constructed %d joined %d broken %d\n", kept > 1000, found[CONSTRUCTED] == (int64_t)THREADS * rounds,
           found[JOINED] > 0 && found[JOINED] < found[CONSTRUCTED], (int)found[BROKEN]);
    return 0;
}
