// Counts the characters of strings beside the grammar, for TurboMind: `follower.py` and `vocabulary.py` in
// C, and hooks on three functions of the xgrammar inside LMDeploy's module.
//
//   GrammarMatcher::GrammarMatcher        if its grammar has limits, a follower begins
//   GrammarMatcher::FillNextTokenBitmask  the mask is narrowed by the limits
//   GrammarMatcher::AcceptToken           the follower reads the token
//
// A matcher and a compiled grammar are told apart by the addresses of their implementations, the first
// word of each object. The end of a matcher cannot be seen: its follower stays until another matcher is
// made at the same address, or until `MOST_MATCHERS` newer ones are there, which is far more than an engine
// runs at a time. Needs libc, libdl and pthreads.
#include "call_slots.h"

#include <pthread.h>

// ---- limits of one schema -----------------------------------------------------------------------------------

// The table of `table.py`, which has checked its numbers.
struct State { int32_t minimum, maximum, text, reserve, name_maximum, names, other, first_item, items, rest; };
struct Node { int32_t first_edge, edges, end, distance; };
struct Edge { int32_t byte, node; };

enum { NONE = -1, HEADER = 7 };

// States of a string's escapes, as in `follower.py`.
enum Lex {
    PLAIN, ESCAPE, CODE, CODE_D, CODE_1, HIGH_2, CODE_2, HIGH_3, CODE_3, PAIR, PAIR_ESCAPE, PAIR_CODE, PAIR_1,
    PAIR_2, PAIR_3, CLOSED, STATES
};

// The state after a byte of a string. *begun: 1 where a character begins with the byte, else 0.
static inline int step(int lex, uint8_t byte, int *begun) {
    *begun = 0;
    switch (lex) {
        case ESCAPE: return byte == 'u' ? CODE : PLAIN;
        case CODE: return (byte | 0x20) == 'd' ? CODE_D : CODE_1;
        case CODE_D: {
            const uint8_t lower = byte | 0x20;
            return byte == '8' || byte == '9' || lower == 'a' || lower == 'b' ? HIGH_2 : CODE_2;
        }
        case CODE_1: return CODE_2;
        case HIGH_2: return HIGH_3;
        case CODE_2: return CODE_3;
        case HIGH_3: return PAIR;
        case CODE_3: return PLAIN;
        case PAIR_ESCAPE: return byte == 'u' ? PAIR_CODE : PLAIN;
        case PAIR_CODE: return PAIR_1;
        case PAIR_1: return PAIR_2;
        case PAIR_2: return PAIR_3;
        case PAIR_3: return PLAIN;
        case CLOSED: return CLOSED;
        default: break;  // PLAIN, and PAIR, in which only the other half of the pair can follow
    }
    if (byte == '\\') {
        *begun = lex == PLAIN;
        return lex == PAIR ? PAIR_ESCAPE : ESCAPE;
    }
    if (byte == '"') return CLOSED;
    *begun = (byte & 0xC0) != 0x80;
    return PLAIN;
}

// ---- tokens -------------------------------------------------------------------------------------------------

struct Vocabulary {
    atomic_int owners;
    int32_t size, words, longest, widest;
    uint8_t *bytes;
    int64_t *offsets;            // size + 1
    int16_t *widths[CLOSED];     // by state and token: the characters that begin before the string closes
    uint8_t *closes[CLOSED];     // and whether it closes
    int32_t *closers, closing;   // tokens that close a plain string, by width
    int32_t *several, touching;  // tokens with at least two quotes
    // By state before such a token: the most characters of a string that begins in it, and the least of one that
    // also ends in it. CLOSED: between strings.
    int32_t *longest_begun[STATES], *shortest_ended[STATES];
    // Tokens with one quote, by falling number of characters behind it: those that begin with it, and others.
    int32_t *leading, *behind_leading, leaders, *inner, *behind_inner, inners;
    uint32_t *fitting;           // by characters that are left, below `widest`: plain tokens that fit
    int32_t *falling, *wider;    // tokens by falling width in a plain string; by width: how many are wider
    uint32_t *not_closing;       // tokens that do not close a plain string
};

struct Limits {
    atomic_int owners;
    struct Vocabulary *vocabulary;
    int32_t *numbers, root, least_maximum, node_count;
    const struct State *states;
    const struct Node *nodes;
    const struct Edge *edges;
    const int32_t *items;
    int32_t *reopening[STATES], reopeners[STATES];  // tokens with several quotes that have to be followed
    // By node of a text, NULL or 0 where too large: row e, from 1 to `most`, has the tokens behind which the text
    // needs at least e characters more to come to an end.
    uint32_t **needing;
    int32_t *most, examined;    // examined: nodes for which all tokens were looked at
    int64_t bytes;              // of the table and the rows
};

static void *made(size_t size) {
    void *memory = calloc(1, size ? size : 1);
    if (!memory) abort();  // a mask without its limits would be a wrong answer
    return memory;
}

static void count_token(struct Vocabulary *v, int32_t token, int lex) {
    int state = lex, count = 0, begun;
    for (int64_t at = v->offsets[token]; at < v->offsets[token + 1] && state != CLOSED; ++at) {
        state = step(state, v->bytes[at], &begun);
        count += begun;
    }
    v->widths[lex][token] = (int16_t)(count < INT16_MAX ? count : INT16_MAX);
    v->closes[lex][token] = state == CLOSED;
}

static _Thread_local const struct Vocabulary *sorted;  // that the comparisons below look at

static int by_width(const void *left, const void *right) {
    const int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    const int difference = sorted->widths[PLAIN][a] - sorted->widths[PLAIN][b];
    return difference ? difference : (a > b) - (a < b);
}

static void sort_by_width(struct Vocabulary *v) {
    for (int32_t token = 0; token < v->size; ++token)
        for (int32_t width = v->widths[PLAIN][token]; width-- > 0;) ++v->wider[width];
    int32_t *next = made(sizeof(int32_t) * ((size_t)v->widest + 1));
    memcpy(next, v->wider, sizeof(int32_t) * ((size_t)v->widest + 1));
    for (int32_t token = 0; token < v->size; ++token) v->falling[next[v->widths[PLAIN][token]]++] = token;
    free(next);
}

static int32_t characters_behind_quote(const struct Vocabulary *v, int32_t token) {
    int state = PLAIN, count = 0, begun, is_behind = 0;
    for (int64_t at = v->offsets[token]; at < v->offsets[token + 1]; ++at) {
        if (is_behind) {
            state = step(state, v->bytes[at], &begun);
            count += begun;
        } else if (v->bytes[at] == '"') {
            is_behind = 1;
        }
    }
    return count;
}

static int by_behind(const void *left, const void *right) {
    const int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    const int32_t difference = characters_behind_quote(sorted, b) - characters_behind_quote(sorted, a);
    return difference ? difference : (a > b) - (a < b);
}

static void measure_strings_begun(struct Vocabulary *v, int32_t at_several, int lex) {
    const int32_t token = v->several[at_several];
    int state = lex, is_counted = 0, begun;
    int32_t count = 0, longest = 0, shortest = INT32_MAX;
    for (int64_t at = v->offsets[token]; at < v->offsets[token + 1]; ++at) {
        if (state == CLOSED) {
            if (v->bytes[at] != '"') continue;
            state = PLAIN;
            is_counted = 1;
            count = 0;
            continue;
        }
        state = step(state, v->bytes[at], &begun);
        if (!is_counted) continue;
        count += begun;
        if (count > longest) longest = count;
        if (state == CLOSED && count < shortest) shortest = count;
    }
    v->longest_begun[lex][at_several] = longest;
    v->shortest_ended[lex][at_several] = shortest;
}

static void sort_tokens(struct Vocabulary *v) {
    for (int32_t token = 0; token < v->size; ++token) {
        int quotes = 0;
        for (int64_t at = v->offsets[token]; at < v->offsets[token + 1]; ++at) quotes += v->bytes[at] == '"';
        if (quotes >= 2) v->several[v->touching++] = token;
        if (quotes == 1 && v->bytes[v->offsets[token]] == '"') v->leading[v->leaders++] = token;
        else if (quotes == 1) v->inner[v->inners++] = token;
        if (v->closes[PLAIN][token]) v->closers[v->closing++] = token;
    }
    sorted = v;
    qsort(v->closers, (size_t)v->closing, sizeof *v->closers, by_width);
    qsort(v->leading, (size_t)v->leaders, sizeof *v->leading, by_behind);
    qsort(v->inner, (size_t)v->inners, sizeof *v->inner, by_behind);
    for (int32_t i = 0; i < v->leaders; ++i) v->behind_leading[i] = characters_behind_quote(v, v->leading[i]);
    for (int32_t i = 0; i < v->inners; ++i) v->behind_inner[i] = characters_behind_quote(v, v->inner[i]);
}

// Tokens by their bytes, empty for tokens that are never text: token i is bytes[offsets[i]:offsets[i + 1]].
struct Vocabulary *lengths_vocabulary(const uint8_t *bytes, const int64_t *offsets, int32_t size) {
    struct Vocabulary *v = made(sizeof *v);
    atomic_store(&v->owners, 1);
    v->size = size;
    v->words = (size + 31) / 32;
    v->bytes = made((size_t)offsets[size]);
    if (offsets[size]) memcpy(v->bytes, bytes, (size_t)offsets[size]);
    v->offsets = made(sizeof(int64_t) * ((size_t)size + 1));
    memcpy(v->offsets, offsets, sizeof(int64_t) * ((size_t)size + 1));
    for (int32_t token = 0; token < size; ++token) {
        const int64_t length = offsets[token + 1] - offsets[token];
        if (length > v->longest) v->longest = (int32_t)length;
    }
    for (int lex = 0; lex < CLOSED; ++lex) {
        v->widths[lex] = made(sizeof(int16_t) * (size_t)size);
        v->closes[lex] = made((size_t)size);
        for (int32_t token = 0; token < size; ++token) count_token(v, token, lex);
    }
    for (int32_t token = 0; token < size; ++token)
        if (v->widths[PLAIN][token] > v->widest) v->widest = v->widths[PLAIN][token];
    v->falling = made(sizeof(int32_t) * (size_t)size);
    v->wider = made(sizeof(int32_t) * ((size_t)v->widest + 1));
    sort_by_width(v);
    v->closers = made(sizeof(int32_t) * (size_t)size);
    v->several = made(sizeof(int32_t) * (size_t)size);
    v->leading = made(sizeof(int32_t) * (size_t)size);
    v->behind_leading = made(sizeof(int32_t) * (size_t)size);
    v->inner = made(sizeof(int32_t) * (size_t)size);
    v->behind_inner = made(sizeof(int32_t) * (size_t)size);
    sort_tokens(v);
    for (int lex = 0; lex < STATES; ++lex) {
        v->longest_begun[lex] = made(sizeof(int32_t) * (size_t)v->touching);
        v->shortest_ended[lex] = made(sizeof(int32_t) * (size_t)v->touching);
        for (int32_t i = 0; i < v->touching; ++i) measure_strings_begun(v, i, lex);
    }
    v->not_closing = made(sizeof(uint32_t) * (size_t)v->words);
    memset(v->not_closing, 0xFF, sizeof(uint32_t) * (size_t)v->words);
    for (int32_t i = 0; i < v->closing; ++i) v->not_closing[v->closers[i] >> 5] &= ~(1u << (v->closers[i] & 31));
    v->fitting = made(sizeof(uint32_t) * (size_t)v->widest * (size_t)v->words);
    for (int32_t left = 0; left < v->widest; ++left) {
        uint32_t *row = v->fitting + (size_t)left * (size_t)v->words;
        for (int32_t token = 0; token < v->words * 32; ++token)  // bits behind the last token stay as they are
            if (token >= size || v->widths[PLAIN][token] <= left) row[token >> 5] |= 1u << (token & 31);
    }
    return v;
}

void lengths_release_vocabulary(struct Vocabulary *v) {
    if (!v || atomic_fetch_sub(&v->owners, 1) != 1) return;
    for (int lex = 0; lex < CLOSED; ++lex) {
        free(v->widths[lex]);
        free(v->closes[lex]);
    }
    for (int lex = 0; lex < STATES; ++lex) {
        free(v->longest_begun[lex]);
        free(v->shortest_ended[lex]);
    }
    free(v->bytes);
    free(v->offsets);
    free(v->closers);
    free(v->several);
    free(v->leading);
    free(v->behind_leading);
    free(v->inner);
    free(v->behind_inner);
    free(v->fitting);
    free(v->falling);
    free(v->wider);
    free(v->not_closing);
    free(v);
}

// A token that begins a string has to be followed if the string is longer than all may be, or also ends and is
// shorter than one has to be.
static void list_reopening(struct Limits *limits, int32_t states) {
    const struct Vocabulary *v = limits->vocabulary;
    int32_t greatest_minimum = 0;
    for (int32_t i = 0; i < states; ++i)
        if (limits->states[i].minimum > greatest_minimum) greatest_minimum = limits->states[i].minimum;
    for (int lex = 0; lex < STATES; ++lex) {
        int32_t *found = limits->reopening[lex] = made(sizeof(int32_t) * (size_t)v->touching);
        for (int32_t i = 0; i < v->touching; ++i)
            if (v->longest_begun[lex][i] > limits->least_maximum || v->shortest_ended[lex][i] < greatest_minimum)
                found[limits->reopeners[lex]++] = v->several[i];
    }
}

static int32_t next_node(const struct Limits *limits, int32_t node, uint8_t byte) {
    const struct Edge *edges = &limits->edges[limits->nodes[node].first_edge];
    int32_t below = 0, above = limits->nodes[node].edges;  // the last edge that does not begin behind the byte
    while (below < above) {
        const int32_t half = (below + above) / 2;
        if (edges[half].byte <= byte) below = half + 1;
        else above = half;
    }
    return below ? edges[below - 1].node : NONE;
}

// A node of a text, and by byte the index of the next one in the list of all of them, or NONE.
struct Fan { int32_t node, next[256]; };

// A node takes one or two milliseconds over 150,000 tokens; masks of nodes without rows take as long near a maximum.
enum { MOST_FANS = 128, MOST_NEEDED = 255, MOST_ROW_BYTES = 1 << 21, MOST_EXAMINED = 128 };

// The nodes that a text can reach; returns how many, or 0 where they are too many or need too much.
static int32_t list_fans(const struct Limits *limits, int32_t text, struct Fan *fans) {
    int32_t count = 1;
    fans[0].node = text;
    for (int32_t at = 0; at < count; ++at) {
        if (limits->nodes[fans[at].node].distance > MOST_NEEDED) return 0;
        for (int byte = 0; byte < 256; ++byte) {
            const int32_t node = next_node(limits, fans[at].node, (uint8_t)byte);
            int32_t found = node == NONE ? NONE : 0;
            while (found != NONE && found < count && fans[found].node != node) ++found;
            if (found == count && count == MOST_FANS) return 0;
            if (found == count) fans[count++].node = node;
            fans[at].next[byte] = found;
        }
    }
    return count;
}

// How many characters a text at a node needs behind a token to come to an end, or needed inside it, beyond those
// of the token.
static int32_t needed_beyond(const struct Limits *limits, const struct Fan *fans, int32_t at, int32_t token) {
    const struct Vocabulary *v = limits->vocabulary;
    int state = PLAIN, begun;
    int32_t count = 0, needed = 0;
    for (int64_t i = v->offsets[token]; i < v->offsets[token + 1]; ++i) {
        state = step(state, v->bytes[i], &begun);
        if (state == CLOSED) break;
        count += begun;
        at = fans[at].next[v->bytes[i]];
        if (at == NONE) break;
        const int32_t here = count + limits->nodes[fans[at].node].distance;
        if (here > needed) needed = here;
    }
    const int32_t width = v->widths[PLAIN][token];
    return needed > width ? needed - width : 0;
}

// Whether a character can begin at a node: inside a character, few tokens go on.
static int begins_characters(const struct Fan *fan) {
    for (int byte = 0; byte < 256; ++byte)
        if (fan->next[byte] != NONE && (byte & 0xC0) != 0x80) return 1;
    return 0;
}

// Makes the rows of the nodes of a text, as long as there is room. *room: in bytes.
static void make_rows(struct Limits *limits, int32_t text, struct Fan *fans, uint8_t *needed, size_t *room) {
    const struct Vocabulary *v = limits->vocabulary;
    const int32_t count = list_fans(limits, text, fans);
    for (int32_t at = 0; at < count; ++at) {
        const int32_t node = fans[at].node;
        if (limits->needing[node] || !begins_characters(&fans[at])) continue;
        if (limits->examined == MOST_EXAMINED) return;
        ++limits->examined;
        int32_t most = 0;
        for (int32_t token = 0; token < v->size; ++token) {
            const int32_t found = needed_beyond(limits, fans, at, token);
            needed[token] = (uint8_t)found;  // at most MOST_NEEDED
            if (found > most) most = found;
        }
        const size_t bytes = sizeof(uint32_t) * (size_t)v->words * (size_t)most;
        if (bytes > *room) continue;
        *room -= bytes;
        limits->most[node] = most;
        limits->needing[node] = made(bytes);
        for (int32_t token = 0; token < v->size; ++token)
            for (int32_t e = 0; e < needed[token]; ++e)
                limits->needing[node][e * v->words + (token >> 5)] |= 1u << (token & 31);
    }
}

static void make_all_rows(struct Limits *limits, int32_t states, int32_t nodes) {
    limits->needing = made(sizeof *limits->needing * (size_t)nodes);
    limits->most = made(sizeof *limits->most * (size_t)nodes);
    struct Fan *fans = NULL;
    uint8_t *needed = NULL;
    size_t room = MOST_ROW_BYTES;
    for (int32_t i = 0; i < states; ++i) {
        const int32_t text = limits->states[i].text;
        if (text == NONE || limits->needing[text]) continue;
        if (limits->examined == MOST_EXAMINED) break;
        if (!fans) fans = made(sizeof *fans * MOST_FANS);
        if (!needed) needed = made((size_t)limits->vocabulary->size);
        make_rows(limits, text, fans, needed, &room);
    }
    free(fans);
    free(needed);
    limits->bytes += (int64_t)(MOST_ROW_BYTES - room);
}

// The limits of a schema over a vocabulary. numbers: of a checked table.
struct Limits *lengths_limits(struct Vocabulary *vocabulary, const int32_t *numbers, int64_t count) {
    struct Limits *limits = made(sizeof *limits);
    atomic_store(&limits->owners, 1);
    atomic_fetch_add(&vocabulary->owners, 1);
    limits->vocabulary = vocabulary;
    limits->numbers = made(sizeof(int32_t) * (size_t)count);
    memcpy(limits->numbers, numbers, sizeof(int32_t) * (size_t)count);
    limits->root = numbers[5];
    limits->least_maximum = numbers[6];
    const int32_t *at = limits->numbers + HEADER;
    limits->states = (const struct State *)at;
    limits->nodes = (const struct Node *)(at += sizeof(struct State) / sizeof *at * (size_t)numbers[1]);
    limits->edges = (const struct Edge *)(at += sizeof(struct Node) / sizeof *at * (size_t)numbers[2]);
    limits->items = at + sizeof(struct Edge) / sizeof *at * (size_t)numbers[3];
    limits->bytes = (int64_t)sizeof(int32_t) * count;
    list_reopening(limits, numbers[1]);
    make_all_rows(limits, numbers[1], numbers[2]);
    limits->node_count = numbers[2];
    return limits;
}

void lengths_release_limits(struct Limits *limits) {
    if (!limits || atomic_fetch_sub(&limits->owners, 1) != 1) return;
    lengths_release_vocabulary(limits->vocabulary);
    for (int lex = 0; lex < STATES; ++lex) free(limits->reopening[lex]);
    for (int32_t node = 0; node < limits->node_count; ++node) free(limits->needing[node]);
    free(limits->needing);
    free(limits->most);
    free(limits->numbers);
    free(limits);
}

// ---- following one answer -----------------------------------------------------------------------------------

enum Mode { OUTSIDE, NAME, STRING };

// An open object (item NONE) or array with the index of its item, and its state.
struct Frame { int32_t state, item; };

struct Place {
    int32_t mode, lex, here, left, need, reserve, is_naming, node;
};

struct Follower {
    struct Limits *limits;
    struct Place place;
    struct Frame *stack;
    int32_t depth, capacity;
};

enum { MOST_OWN = 256 };

// A follower that goes on without changing the one it comes from: frames that it opens are its own.
struct Cursor {
    const struct Limits *limits;
    struct Place place;
    const struct Frame *below;
    int32_t kept, own;
    struct Frame frames[MOST_OWN];
};

static struct Follower *follower_on(struct Limits *limits) {
    struct Follower *follower = made(sizeof *follower);
    atomic_fetch_add(&limits->owners, 1);
    follower->limits = limits;
    follower->place = (struct Place){.mode = OUTSIDE, .here = limits->root, .node = NONE};
    return follower;
}

struct Follower *lengths_follower(struct Limits *limits) { return follower_on(limits); }

void lengths_release_follower(struct Follower *follower) {
    if (!follower) return;
    lengths_release_limits(follower->limits);
    free(follower->stack);
    free(follower);
}

static inline void begin(struct Cursor *cursor, const struct Follower *follower) {
    cursor->limits = follower->limits;
    cursor->place = follower->place;
    cursor->below = follower->stack;
    cursor->kept = follower->depth;
    cursor->own = 0;
}

static inline const struct Frame *top(const struct Cursor *cursor) {
    if (cursor->own) return &cursor->frames[cursor->own - 1];
    return cursor->kept ? &cursor->below[cursor->kept - 1] : NULL;
}

static inline void pop(struct Cursor *cursor) {
    if (cursor->own) --cursor->own;
    else if (cursor->kept) --cursor->kept;
}

static inline int push(struct Cursor *cursor, struct Frame frame) {
    if (cursor->own == MOST_OWN) return 0;
    cursor->frames[cursor->own++] = frame;
    return 1;
}

static int32_t item_state(const struct Limits *limits, struct Frame frame) {
    const struct State *state = &limits->states[frame.state];
    return frame.item < state->items ? limits->items[state->first_item + frame.item] : state->rest;
}

static int in_string(struct Cursor *cursor, uint8_t byte) {
    struct Place *place = &cursor->place;
    int begun;
    place->lex = step(place->lex, byte, &begun);
    place->left -= begun;
    place->need -= begun;
    if (place->lex == CLOSED) {
        place->mode = OUTSIDE;
        return place->need <= 0;
    }
    if (place->node != NONE) place->node = next_node(cursor->limits, place->node, byte);
    return place->left >= (place->node == NONE ? 0 : cursor->limits->nodes[place->node].distance);
}

static int in_name(struct Cursor *cursor, uint8_t byte) {
    struct Place *place = &cursor->place;
    int begun;
    place->lex = step(place->lex, byte, &begun);
    place->left -= begun;
    if (place->lex == CLOSED) {
        const int32_t end = place->node == NONE ? NONE : cursor->limits->nodes[place->node].end;
        place->here = end == NONE ? cursor->limits->states[top(cursor)->state].other : end;
        place->mode = OUTSIDE;
        place->is_naming = 0;
        return 1;
    }
    if (place->node != NONE) place->node = next_node(cursor->limits, place->node, byte);
    return place->left >= 0;
}

static int outside(struct Cursor *cursor, uint8_t byte) {
    struct Place *place = &cursor->place;
    const struct Frame *frame = top(cursor);
    if (byte == '"') {
        place->lex = PLAIN;
        if (place->is_naming && frame) {
            const struct State *state = &cursor->limits->states[frame->state];
            place->mode = NAME;
            place->node = state->names;
            place->left = state->name_maximum;
            place->need = place->reserve = 0;
        } else {
            const struct State *state = &cursor->limits->states[place->here];
            place->mode = STRING;
            place->node = state->text;
            place->left = state->maximum;
            place->need = state->minimum;
            place->reserve = state->reserve;
        }
    } else if (byte == '{' || byte == '[') {
        const struct Frame opened = {place->here, byte == '{' ? NONE : 0};
        if (!push(cursor, opened)) return 0;
        place->is_naming = byte == '{';
        if (byte == '[') place->here = item_state(cursor->limits, opened);
    } else if (byte == '}' || byte == ']') {
        pop(cursor);
        place->is_naming = 0;
    } else if (byte == ',' && frame) {
        place->is_naming = frame->item == NONE;
        if (frame->item != NONE) {
            const struct Frame next = {frame->state, frame->item + 1};
            pop(cursor);
            if (!push(cursor, next)) return 0;
            place->here = item_state(cursor->limits, next);
        }
    }
    return 1;
}

// Goes on with bytes; returns 0 where a string is too long or too short.
static int go_on(struct Cursor *cursor, const uint8_t *bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (cursor->place.mode == STRING) {
            if (!in_string(cursor, bytes[i])) return 0;
        } else if (cursor->place.mode == NAME) {
            if (!in_name(cursor, bytes[i])) return 0;
        } else if (!outside(cursor, bytes[i])) {
            return 0;
        }
    }
    return 1;
}

static void keep(struct Follower *follower, const struct Cursor *cursor) {
    const int32_t depth = cursor->kept + cursor->own;
    if (depth > follower->capacity) {
        const int32_t capacity = 2 * depth;
        struct Frame *stack = realloc(follower->stack, sizeof *stack * (size_t)capacity);
        if (!stack) abort();
        follower->stack = stack;
        follower->capacity = capacity;
    }
    if (cursor->own)
        memcpy(follower->stack + cursor->kept, cursor->frames, sizeof *cursor->frames * (size_t)cursor->own);
    follower->depth = depth;
    follower->place = cursor->place;
}

int lengths_feed(struct Follower *follower, const uint8_t *bytes, int64_t count) {
    struct Cursor cursor;
    for (int64_t done = 0; done < count; done += MOST_OWN) {
        const int64_t part = count - done < MOST_OWN ? count - done : MOST_OWN;
        begin(&cursor, follower);
        if (!go_on(&cursor, bytes + done, part)) return 0;
        keep(follower, &cursor);
    }
    return 1;
}

int lengths_accept(struct Follower *follower, int32_t token) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    if (token < 0 || token >= v->size) return 0;
    return lengths_feed(follower, v->bytes + v->offsets[token], v->offsets[token + 1] - v->offsets[token]);
}

// Whether the answer can go on with a token.
static int fits(const struct Follower *follower, int32_t token) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    struct Cursor cursor;
    begin(&cursor, follower);
    return go_on(&cursor, v->bytes + v->offsets[token], v->offsets[token + 1] - v->offsets[token]);
}

// ---- masks --------------------------------------------------------------------------------------------------

static inline int is_set(const uint32_t *mask, int32_t token) { return mask[token >> 5] >> (token & 31) & 1; }

static inline void clear(uint32_t *mask, int32_t token) { mask[token >> 5] &= ~(1u << (token & 31)); }

// Calls `is_wrong` for each token whose bit is set in the mask and not in `known`, and clears the bit if it says so.
static inline void clear_where(const struct Follower *follower, uint32_t *mask, const uint32_t *known,
                               int (*is_wrong)(const struct Follower *, int32_t token)) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    for (int32_t word = 0; word < v->words; ++word) {
        for (uint32_t bits = known ? mask[word] & ~known[word] : mask[word]; bits; bits &= bits - 1) {
            const int32_t token = 32 * word + __builtin_ctz(bits);
            if (token >= v->size) return;
            if (is_wrong(follower, token)) clear(mask, token);
        }
    }
}

static int breaks_limit(const struct Follower *follower, int32_t token) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    const struct Place *place = &follower->place;
    const int32_t width = v->widths[place->lex][token];
    return width > place->left || (v->closes[place->lex][token] && width < place->need);
}

static int comes_to_no_end(const struct Follower *follower, int32_t token) {
    const struct Place *place = &follower->place;
    const int32_t width = follower->limits->vocabulary->widths[place->lex][token];
    return width > place->left - place->reserve && !fits(follower, token);
}

// Clears the tokens behind which the text could not come to an end in time: those wider than what is left without
// the characters that the text needs behind them. All others that are too wide are gone.
static void narrow_by_rows(const struct Follower *follower, const uint32_t *rows, int32_t most, uint32_t *mask) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    const int32_t left = follower->place.left, spare = left > most ? left - most : 0;
    const int32_t count = spare < v->widest ? v->wider[spare] : 0;
    if (left >= most && count < v->words / 4) {  // one by one is faster then
        for (int32_t i = 0; i < count; ++i) {
            const int32_t token = v->falling[i], more = left - v->widths[PLAIN][token];
            if (more >= 0 && is_set(mask, token) && is_set(rows + (size_t)more * (size_t)v->words, token))
                clear(mask, token);
        }
        return;
    }
    for (int32_t needed = 1; needed <= most; ++needed) {
        const uint32_t *row = rows + (size_t)(needed - 1) * (size_t)v->words;
        if (left - needed >= v->widest) continue;
        if (left < needed) {
            for (int32_t word = 0; word < v->words; ++word) mask[word] &= ~row[word];
        } else {
            const uint32_t *fitting = v->fitting + (size_t)(left - needed) * (size_t)v->words;
            for (int32_t word = 0; word < v->words; ++word) mask[word] &= fitting[word] | ~row[word];
        }
    }
}

static void narrow_string(const struct Follower *follower, uint32_t *mask) {
    const struct Vocabulary *v = follower->limits->vocabulary;
    const struct Place *place = &follower->place;
    const int32_t left = place->left, need = place->need;
    if (place->lex != PLAIN) {
        if (left < v->longest || need > 0) clear_where(follower, mask, NULL, breaks_limit);
    } else {
        if (left < v->widest) {
            const uint32_t *row = v->fitting + (size_t)left * (size_t)v->words;
            for (int32_t word = 0; word < v->words; ++word) mask[word] &= row[word];
        }
        if (need > v->widest)
            for (int32_t word = 0; word < v->words; ++word) mask[word] &= v->not_closing[word];
        else if (need > 0)
            for (int32_t i = 0; i < v->closing && v->widths[PLAIN][v->closers[i]] < need; ++i) clear(mask, v->closers[i]);
    }
    const int32_t spare = left - place->reserve;
    if (place->node != NONE && spare < (place->lex == PLAIN ? v->widest : v->longest)) {
        const uint32_t *rows = place->lex == PLAIN ? follower->limits->needing[place->node] : NULL;
        if (rows) {
            narrow_by_rows(follower, rows, follower->limits->most[place->node], mask);
            return;
        }
        const int has_row = place->lex == PLAIN && spare >= 0;
        clear_where(follower, mask, has_row ? v->fitting + (size_t)spare * (size_t)v->words : NULL, comes_to_no_end);
    }
}

static void narrow_one_by_one(const struct Follower *follower, const int32_t *tokens, int32_t count, uint32_t *mask) {
    for (int32_t i = 0; i < count; ++i)
        if (is_set(mask, tokens[i]) && !fits(follower, tokens[i])) clear(mask, tokens[i]);
}

static void narrow_outside(const struct Follower *follower, uint32_t *mask) {
    const struct Limits *limits = follower->limits;
    const struct Vocabulary *v = limits->vocabulary;
    const struct Place *place = &follower->place;
    const struct State *state = &limits->states[place->here];
    int32_t most = state->maximum - state->reserve, count = 0;
    if (place->is_naming && follower->depth) most = limits->states[follower->stack[follower->depth - 1].state].name_maximum;
    while (count < v->leaders && v->behind_leading[count] > most) ++count;
    if (state->reserve && !place->is_naming) narrow_one_by_one(follower, v->leading, count, mask);
    else for (int32_t i = 0; i < count; ++i) clear(mask, v->leading[i]);
    count = 0;
    while (count < v->inners && v->behind_inner[count] > limits->least_maximum) ++count;
    narrow_one_by_one(follower, v->inner, count, mask);
}

// Clears the bits of tokens with which a string or a name would become too long, or a string be closed too short.
// mask: one bit for each token of the vocabulary, in words of 32.
void lengths_narrow(const struct Follower *follower, uint32_t *mask) {
    const struct Limits *limits = follower->limits;
    const int lex = follower->place.mode == OUTSIDE ? CLOSED : follower->place.lex;
    if (follower->place.mode == OUTSIDE) narrow_outside(follower, mask);
    else narrow_string(follower, mask);
    narrow_one_by_one(follower, limits->reopening[lex], limits->reopeners[lex], mask);
}

// Approximate memory.
int64_t lengths_bytes(const struct Limits *limits) { return limits->bytes; }

// For tests: for how many nodes of texts all tokens were looked at.
int32_t lengths_examined(const struct Limits *limits) { return limits->examined; }

// For tests: mode, lex, here, left, need, and how many objects and arrays are open.
void lengths_place(const struct Follower *follower, int32_t place[6]) {
    const struct Place *at = &follower->place;
    const int32_t found[6] = {at->mode, at->lex, at->here, at->left, at->need, follower->depth};
    memcpy(place, found, sizeof found);
}

// ---- grammars and matchers of TurboMind ---------------------------------------------------------------------

struct Entry {
    struct Entry *next, *older, *newer;
    const void *key;
    struct Limits *limits;      // of a grammar
    struct Follower *follower;  // of a matcher
};

enum { BUCKETS = 4096, MOST_MATCHERS = 65536 };

struct Map {
    struct Entry *buckets[BUCKETS];
    struct Entry *oldest, *newest;
    int count;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct Map grammars, matchers;
enum { CONSTRUCTED, JOINED, NARROWED, ACCEPTED, BROKEN, EVICTED, COUNTERS };
static int64_t counters[COUNTERS];

static struct Entry **place_of(struct Map *map, const void *key) {
    const uintptr_t number = (uintptr_t)key >> 4;
    struct Entry **at = &map->buckets[(number ^ number >> 12) % BUCKETS];
    while (*at && (*at)->key != key) at = &(*at)->next;
    return at;
}

static void drop(struct Map *map, const void *key) {
    struct Entry **at = place_of(map, key), *entry = *at;
    if (!entry) return;
    *at = entry->next;
    if (entry->older) entry->older->newer = entry->newer;
    else map->oldest = entry->newer;
    if (entry->newer) entry->newer->older = entry->older;
    else map->newest = entry->older;
    --map->count;
    lengths_release_limits(entry->limits);
    lengths_release_follower(entry->follower);
    free(entry);
}

static struct Entry *add(struct Map *map, const void *key) {
    drop(map, key);
    struct Entry *entry = made(sizeof *entry);
    entry->key = key;
    *place_of(map, key) = entry;
    entry->older = map->newest;
    if (map->newest) map->newest->newer = entry;
    else map->oldest = entry;
    map->newest = entry;
    ++map->count;
    return entry;
}

// The matchers of limits that nobody needs any more: a request keeps its grammar until it has ended.
static void drop_followers(const struct Limits *limits) {
    for (struct Entry *one = matchers.oldest, *next; one; one = next) {
        next = one->newer;
        if (one->follower->limits == limits) drop(&matchers, one->key);
    }
}

// Sets the limits of a compiled grammar, given the address of its implementation; NULL removes them.
void hook_limit(const void *grammar, struct Limits *limits) {
    pthread_mutex_lock(&lock);
    if (limits) {
        add(&grammars, grammar)->limits = limits;
        atomic_fetch_add(&limits->owners, 1);
    } else {
        const struct Entry *found = *place_of(&grammars, grammar);
        if (found) drop_followers(found->limits);
        drop(&grammars, grammar);
    }
    pthread_mutex_unlock(&lock);
}

// Forgets all matchers: for an engine that is closed, when no other runs.
void hook_forget(void) {
    pthread_mutex_lock(&lock);
    while (matchers.oldest) drop(&matchers, matchers.oldest->key);
    pthread_mutex_unlock(&lock);
}

// What has been seen so far: matchers made, matchers with limits, masks narrowed, tokens read, tokens that
// broke a limit, matchers forgotten because there were too many; and the grammars and matchers that are known.
void hook_counters(int64_t found[COUNTERS + 2]) {
    pthread_mutex_lock(&lock);
    memcpy(found, counters, sizeof counters);
    found[COUNTERS] = grammars.count;
    found[COUNTERS + 1] = matchers.count;
    pthread_mutex_unlock(&lock);
}

// ---- the functions of TurboMind -----------------------------------------------------------------------------

// dlpack.h
struct Tensor {
    void *data;
    int32_t device_type, device_id, dimensions;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

typedef void Construct(void *self, const void *grammar, void *stop_tokens, bool without_stop, int rollback);
typedef bool Fill(void *self, struct Tensor *mask, int row, bool debug);
typedef bool Accept(void *self, int token, bool debug);

enum { CONSTRUCT, FILL, ACCEPT, FUNCTIONS };
static struct Hooked functions[FUNCTIONS];

static const void *implementation(const void *object) { return *(const void *const *)object; }

static void construct(void *self, const void *grammar, void *stop_tokens, bool without_stop, int rollback) {
    ((Construct *)original_of(&functions[CONSTRUCT]))(self, grammar, stop_tokens, without_stop, rollback);
    pthread_mutex_lock(&lock);
    ++counters[CONSTRUCTED];
    struct Entry *found = *place_of(&grammars, implementation(grammar));
    if (found) {
        ++counters[JOINED];
        struct Follower *follower = follower_on(found->limits);
        add(&matchers, implementation(self))->follower = follower;
        if (matchers.count > MOST_MATCHERS) {
            drop(&matchers, matchers.oldest->key);
            ++counters[EVICTED];
        }
    } else {
        drop(&matchers, implementation(self));
    }
    pthread_mutex_unlock(&lock);
}

static uint32_t *row_of(const struct Tensor *mask, int row, int64_t *words) {
    const int64_t width = mask->dimensions < 1 ? 0 : mask->shape[mask->dimensions - 1];
    const int64_t stride = mask->dimensions < 2 ? 0 : mask->strides ? mask->strides[0] : width;
    *words = width;
    return (uint32_t *)((char *)mask->data + mask->byte_offset) + stride * row;
}

static bool fill(void *self, struct Tensor *mask, int row, bool debug) {
    bool is_needed = ((Fill *)original_of(&functions[FILL]))(self, mask, row, debug);
    pthread_mutex_lock(&lock);
    struct Entry *found = *place_of(&matchers, implementation(self));
    if (found) {
        int64_t words;
        uint32_t *bits = row_of(mask, row, &words);
        if (words < found->follower->limits->vocabulary->words) {
            ++counters[BROKEN];
        } else {
            ++counters[NARROWED];
            lengths_narrow(found->follower, bits);
            is_needed = true;  // false would mean that the mask allows everything
        }
    }
    pthread_mutex_unlock(&lock);
    return is_needed;
}

static bool accept_token(void *self, int token, bool debug) {
    const bool is_accepted = ((Accept *)original_of(&functions[ACCEPT]))(self, token, debug);
    pthread_mutex_lock(&lock);
    struct Entry *found = *place_of(&matchers, implementation(self));
    if (found && is_accepted) {
        ++counters[ACCEPTED];
        if (!lengths_accept(found->follower, token)) ++counters[BROKEN];
    }
    pthread_mutex_unlock(&lock);
    return is_accepted;
}

static struct Hooked functions[FUNCTIONS] = {
    [CONSTRUCT] = {"_ZN8xgrammar14GrammarMatcherC1ERKNS_15CompiledGrammarESt8optionalISt6vectorIiSaIiEEEbi",
                   (Function *)construct},
    [FILL] = {"_ZN8xgrammar14GrammarMatcher20FillNextTokenBitmaskEP8DLTensorib", (Function *)fill},
    [ACCEPT] = {"_ZN8xgrammar14GrammarMatcher11AcceptTokenEib", (Function *)accept_token},
};

// As in `hook.c` of DeepStack.
const char *hook_check(const char *path) { return check_calls(path, functions, FUNCTIONS); }
const char *hook_attach(const char *path) { return take_calls(path, functions, FUNCTIONS); }
int hook_bound(void) { return bound_calls(functions, FUNCTIONS); }
void hook_detach(void) { restore_calls(functions, FUNCTIONS); }
