/* Exact search of inverted lists: sparse vectors, and BM25.
 *
 * Documents are gone through in blocks whose sums stay in the nearest caches. Sparse vectors are not negative, so the lists of
 * the greatest bound (query weight times the list's largest weight) come first, and a block needs no more of them once what
 * the others could add lifts no document but a few to the k-th best score so far. Those few are candidates. Their scores are
 * summed anew from the documents' own rows, in float64 and in order of the terms, so that a score depends on nothing else.
 * Sums of a block are float32 and off by no more than ``slack``; candidates are chosen with that much room.
 *
 * BM25 scores are float32 sums in order of the query's terms, as bm25s makes them: all lists, and no candidates.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "coding.h"

#define EXPORT __attribute__((visibility("default")))
typedef int32_t __attribute__((may_alias)) Bits; /* floats that are not negative are ordered as their bits, which compilers compare faster */
#define BLOCK 16384
#define RUN 64
#define GROUPS 32768 /* whose bounds are added up at once */
#define ROW_COST 96 /* RESCORED, in a row of documents */
#define AHEAD 8 /* documents whose rows are fetched before they are needed */
#define GROUP 8 /* documents that have one bound; a constant of the files */
#define RESCORED 96 /* a document's score costs about as much as so many postings */
#define SCANNED 1024 /* going through a block's sums costs about as much as so many postings */

typedef struct {
    const int64_t *starts;    /* where each term's postings begin; one more than terms */
    const int32_t *documents; /* of each posting, ascending within a term */
    const void *weights;      /* float32, the bits of float16, or uint8 */
    const float *largest;     /* weight of each term, as stored */
    const float *units;       /* of each term: what its stored weights are times, a power of two */
    const int64_t *rows;      /* where each document's terms begin; one more than documents */
    const void *terms;        /* of each document, ascending: int32, or uint16 */
    const void *row_weights;  /* as ``weights`` */
    const int32_t *peak_rows; /* of each term: its row of ``peaks``, or -1 */
    const uint8_t *peaks;     /* (rows, groups): largest weight in each GROUP documents, in 1/255 of ``largest``, rounded up */
    const uint8_t *eligible;  /* of each document: 0 or 1 */
    const int64_t *chosen;    /* the eligible documents, ascending, where they are few; or NULL */
    int64_t count, first;     /* documents, and the number of the first one */
    int64_t chosen_count, chosen_cost; /* what scoring them costs, in postings */
    int32_t bytes, narrow;    /* of a weight: 4, 2 or 1; terms are uint16 */
} Postings;

typedef struct {
    const int32_t *terms; /* of the query, each once */
    const float *weights;
    float *dense;         /* one for every term that documents may have; zeros. In a segment: weights times its units */
    void *room;           /* openembed_postings_room bytes, on a boundary of 8 */
    int64_t count;
    int64_t k, capacity, filled;
    int64_t *positions; /* found: no fewer than the k best, ties among them */
    float *scores;
    float *best;        /* a heap, the least of the k best at its root */
    int64_t bests, touched, rescored;
    float floor;        /* what a document has to reach */
} Query;

typedef struct {
    const int32_t *documents, *counts;
    const float *ones; /* what a term that stands there once adds, for each length of ``tabled`` */
    int64_t size;
    double idf;
} List;

typedef struct {
    const List *lists;        /* of the query's terms, in their order */
    const int32_t *lengths;   /* of each document, in terms */
    const double *penalties;  /* of each length */
    const uint8_t *eligible;
    int64_t list_count, count, first, tabled;
} Words;

typedef struct {
    int64_t at, end, term;
    float weight, bound;
    double expected, rest;
} Cursor;

typedef struct {
    float sums[BLOCK], values[BLOCK];
    int32_t places[BLOCK];
} Block;

static void sink(float *heap, int64_t size, int64_t at) {
    for (;;) {
        int64_t least = at, left = 2 * at + 1;
        if (left < size && heap[left] < heap[least]) least = left;
        if (left + 1 < size && heap[left + 1] < heap[least]) least = left + 1;
        if (least == at) return;
        float kept = heap[at];
        heap[at] = heap[least], heap[least] = kept, at = least;
    }
}

/* Takes in a document that is not below the floor; returns 1 where there is no room for it. */
static int push(Query *query, int64_t position, float score) {
    if (query->filled == query->capacity) {
        int64_t kept = 0;
        for (int64_t i = 0; i < query->filled; i++)
            if (query->scores[i] >= query->floor) {
                query->positions[kept] = query->positions[i];
                query->scores[kept++] = query->scores[i];
            }
        query->filled = kept;
        if (kept == query->capacity) return 1;
    }
    query->positions[query->filled] = position;
    query->scores[query->filled++] = score;
    if (query->bests < query->k) {
        int64_t at = query->bests++;
        for (; at && query->best[(at - 1) / 2] > score; at = (at - 1) / 2) query->best[at] = query->best[(at - 1) / 2];
        query->best[at] = score;
    } else if (score > query->best[0]) {
        query->best[0] = score;
        sink(query->best, query->k, 0);
    }
    if (query->bests == query->k && query->best[0] > query->floor) query->floor = query->best[0];
    return 0;
}

static int64_t count_from(const float *sums, int64_t size, float least) {
    const Bits *bits = (const Bits *)sums, wanted = *(const Bits *)&least;
    int32_t found = 0;
    for (int64_t i = 0; i < size; i++) found += bits[i] >= wanted;
    return found;
}

/* Lists the eligible documents of a block whose sums reach ``least`` (more than 0). */
static int64_t gather(Block *block, int64_t size, const uint8_t *eligible, float least) {
    const Bits *bits = (const Bits *)block->sums, wanted = *(const Bits *)&least;
    int64_t found = 0;
    for (int64_t i = 0; i < size; i += RUN) {
        int any = 0;
        for (int j = 0; j < RUN; j++) any |= bits[i + j] >= wanted;
        for (int64_t j = i; any && j < i + RUN; j++)
            if (bits[j] >= wanted && eligible[j]) block->places[found++] = (int32_t)j;
    }
    return found;
}

/* The least that a sum must be for its document to reach the floor, where ``rest`` may still be added. */
static float least_sum(float floor, double rest, double slack) {
    double least = (floor - rest) * (1 - slack);
    return least > 1e-37 ? (float)(least * (1 - 1e-7)) : 1e-37f;
}

/* Raises the floor by the sums of the candidates, which their scores do not fall below but by ``slack``. */
static void raise_floor(Query *query, Block *block, int64_t found, double slack) {
    if (found < query->k) return;
    for (int64_t i = 0; i < found; i++) block->values[i] = block->sums[block->places[i]];
    float reached = (float)(kth_greatest(block->values, found, query->k) * (1 - slack) * (1 - 1e-7));
    if (reached > query->floor) query->floor = reached;
}

/* ``NAME``: a document's score. ``NAME_rough``: the same in float32, in another order, several times as fast. */
#define ROW_SCORE(NAME, TERM, WEIGHT, VALUE)                                                                            \
    static float NAME(const Postings *postings, const Query *query, int64_t document) {                                \
        const TERM *terms = postings->terms;                                                                            \
        const WEIGHT *weights = postings->row_weights;                                                                  \
        double sum = 0;                                                                                                 \
        for (int64_t i = postings->rows[document]; i < postings->rows[document + 1]; i++) {                             \
            float weight = query->dense[terms[i]];                                                                      \
            if (weight != 0) sum += (double)weight * (double)VALUE(weights[i]);                                         \
        }                                                                                                               \
        return (float)sum;                                                                                              \
    }                                                                                                                   \
    static float NAME##_rough(const Postings *postings, const Query *query, int64_t document) {                         \
        int64_t i = postings->rows[document], end = postings->rows[document + 1];                                       \
        const TERM *terms = postings->terms;                                                                            \
        const WEIGHT *weights = postings->row_weights;                                                                  \
        float sums[4] = {0, 0, 0, 0};                                                                                   \
        for (; i + 4 <= end; i += 4)                                                                                    \
            for (int part = 0; part < 4; part++) sums[part] += query->dense[terms[i + part]] * VALUE(weights[i + part]); \
        for (; i < end; i++) sums[0] += query->dense[terms[i]] * VALUE(weights[i]);                                     \
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);                                                               \
    }
ROW_SCORE(score_narrow, uint16_t, float, )
ROW_SCORE(score_wide, int32_t, float, )
ROW_SCORE(score_narrow_half, uint16_t, uint16_t, from_half)
ROW_SCORE(score_wide_half, int32_t, uint16_t, from_half)
ROW_SCORE(score_narrow_byte, uint16_t, uint8_t, (float))
ROW_SCORE(score_wide_byte, int32_t, uint8_t, (float))

typedef float (*RowScore)(const Postings *, const Query *, int64_t);

static RowScore row_score(const Postings *postings) {
    if (postings->bytes == 1) return postings->narrow ? score_narrow_byte : score_wide_byte;
    if (postings->bytes == 2) return postings->narrow ? score_narrow_half : score_wide_half;
    return postings->narrow ? score_narrow : score_wide;
}

static RowScore rough_row_score(const Postings *postings) {
    if (postings->bytes == 1) return postings->narrow ? score_narrow_byte_rough : score_wide_byte_rough;
    if (postings->bytes == 2) return postings->narrow ? score_narrow_half_rough : score_wide_half_rough;
    return postings->narrow ? score_narrow_rough : score_wide_rough;
}

/* Where the documents from ``wanted`` on begin among ``documents[low]`` to ``documents[high]``. */
static int64_t seek(const int32_t *documents, int64_t low, int64_t high, int64_t wanted) {
    int64_t step = 1;
    while (low + step < high && documents[low + step] < wanted) low += step, step *= 2;
    if (low + step < high) high = low + step + 1;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (documents[middle] < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Adds a list's part in the block that begins with document ``base``; returns its number of postings. */
static int64_t accumulate(const Postings *postings, Cursor *cursor, float *sums, int64_t base) {
    const int32_t *documents = postings->documents;
    int64_t at = cursor->at, end;
    if (at < cursor->end && documents[at] < base) at = seek(documents, at, cursor->end, base);
    end = seek(documents, at, cursor->end, base + BLOCK);
    float weight = cursor->weight;
    if (postings->bytes == 1) {
        const uint8_t *weights = postings->weights;
        for (int64_t i = at; i < end; i++) sums[documents[i] - base] += weight * (float)weights[i];
    } else if (postings->bytes == 2) {
        const uint16_t *weights = postings->weights;
        for (int64_t i = at; i < end; i++) sums[documents[i] - base] += weight * from_half(weights[i]);
    } else {
        const float *weights = postings->weights;
        for (int64_t i = at; i < end; i++) sums[documents[i] - base] += weight * weights[i];
    }
    cursor->at = end;
    return end - at;
}

static int by_bound(const void *left, const void *right) {
    const Cursor *a = left, *b = right;
    return a->bound != b->bound ? (a->bound < b->bound ? 1 : -1) : (a->term > b->term) - (a->term < b->term);
}

/* Fills in the lists that the query has here, those of greatest bound first; returns how many. */
static int64_t place_cursors(const Postings *postings, const Query *query, Cursor *cursors) {
    int64_t found = 0;
    for (int64_t i = 0; i < query->count; i++) {
        int64_t term = query->terms[i], at = postings->starts[term], end = postings->starts[term + 1];
        if (at == end) continue;
        float weight = query->weights[i] * postings->units[term], bound = weight * postings->largest[term];
        double expected = (double)(end - at) * BLOCK / (double)postings->count;
        cursors[found++] = (Cursor){at, end, term, weight, bound, expected, 0};
    }
    qsort(cursors, found, sizeof(Cursor), by_bound);
    double rest = 0;
    for (int64_t i = found - 1; i >= 0; i--) cursors[i].rest = rest += cursors[i].bound * (1 + 1e-6);
    return found;
}

/* Adds up a block, list after list, until few documents can still reach the floor; returns what the other lists may add. */
static double add_up(const Postings *postings, Query *query, Cursor *cursors, int64_t lists, Block *block, int64_t base,
                    int64_t size, double slack) {
    for (int64_t i = 0; i < lists; i++) {
        if (cursors[i].rest < query->floor && cursors[i].expected > SCANNED) {
            float least = least_sum(query->floor, cursors[i].rest, slack);
            if (count_from(block->sums, size, least) * RESCORED < cursors[i].expected) return cursors[i].rest;
        }
        query->touched += accumulate(postings, &cursors[i], block->sums, base);
    }
    return 0;
}

/* Goes through the documents block by block. */
static int search_segment(const Postings *postings, Query *query, Cursor *cursors, Block *block) {
    int64_t lists = place_cursors(postings, query, cursors);
    double slack = (double)(lists + 4) * 0x1p-23;
    RowScore score_of = row_score(postings);
    for (int64_t base = 0; base < postings->count && lists && cursors[0].rest >= query->floor; base += BLOCK) {
        int64_t size = postings->count - base < BLOCK ? postings->count - base : BLOCK;
        memset(block->sums, 0, (size + RUN - 1) / RUN * RUN * sizeof(float));
        double rest = add_up(postings, query, cursors, lists, block, base, size, slack);
        int64_t found = gather(block, size, postings->eligible + base, least_sum(query->floor, rest, slack));
        raise_floor(query, block, found, slack);
        for (int64_t i = 0; i < found; i++) {
            int64_t place = block->places[i];
            if (block->sums[place] < least_sum(query->floor, rest, slack)) continue;
            float score = score_of(postings, query, base + place);
            query->rescored++;
            if (score > 0 && score >= query->floor && push(query, postings->first + base + place, score)) return 1;
        }
    }
    return 0;
}

/* Asks for a document's row, and what follows it, before it is needed. */
static void fetch_row(const Postings *postings, int64_t document) {
    int64_t from = postings->rows[document];
    const char *terms = (const char *)postings->terms + from * (postings->narrow ? 2 : 4);
    const char *weights = (const char *)postings->row_weights + from * postings->bytes;
    for (int line = 0; line < 8; line++) {
        __builtin_prefetch(terms + line * 64);
        __builtin_prefetch(weights + line * 64);
    }
}

/* Takes in a document unless its rough score says that it reaches no ``needed``. */
static int consider(const Postings *postings, Query *query, int64_t document, RowScore rough_of, RowScore score_of, float needed) {
    query->rescored++;
    if (rough_of(postings, query, document) < needed) return 0;
    float score = score_of(postings, query, document);
    return score > 0 && score >= query->floor && push(query, postings->first + document, score);
}

/* Scores the few that are eligible by their own rows. */
static int search_rows(const Postings *postings, Query *query) {
    RowScore score_of = row_score(postings), rough_of = rough_row_score(postings);
    double slack = (double)(query->count + 4) * 0x1p-23;
    for (int64_t i = 0; i < postings->chosen_count; i++) {
        if (i + 2 * AHEAD < postings->chosen_count) __builtin_prefetch(postings->rows + postings->chosen[i + 2 * AHEAD]);
        if (i + AHEAD < postings->chosen_count) fetch_row(postings, postings->chosen[i + AHEAD]);
        float needed = least_sum(query->floor, 0, slack);
        if (consider(postings, query, postings->chosen[i], rough_of, score_of, needed)) return 1;
    }
    return 0;
}

/* Whether the rows of the few that are eligible cost less than the query's lists, of which bounds leave a part unread, and than
 * going through all documents' sums or bounds. */
static int rows_are_cheaper(const Postings *postings, const Query *query) {
    if (!postings->chosen) return 0;
    int64_t lists = 0;
    for (int64_t i = 0; i < query->count; i++) lists += postings->starts[query->terms[i] + 1] - postings->starts[query->terms[i]];
    return postings->chosen_cost < lists / (postings->peaks ? 2 : 1) + postings->count * 3 / 2;
}

typedef struct {
    float *bounds;          /* of each group: no document of it scores more, but for ``slack`` */
    float *runs, *scratch;  /* the largest of each RUN bounds */
    int64_t groups, run_count;
} Bounds;

static float weight_at(const Postings *postings, int64_t at) {
    if (postings->bytes == 1) return (float)((const uint8_t *)postings->weights)[at];
    return postings->bytes == 2 ? from_half(((const uint16_t *)postings->weights)[at]) : ((const float *)postings->weights)[at];
}

/* Adds a list's postings in the groups ``low`` to ``high`` to their bounds. */
static void bound_by_postings(const Postings *postings, Cursor *cursor, float *bounds, int64_t high) {
    int64_t at = cursor->at, end = seek(postings->documents, at, cursor->end, high * GROUP);
    const int32_t *documents = postings->documents;
    float weight = cursor->weight;
    for (; at < end; at++) bounds[documents[at] / GROUP] += weight * weight_at(postings, at);
    cursor->at = end;
}

static void bound_groups(const Postings *postings, Cursor *cursors, int64_t lists, Bounds *bounds) {
    memset(bounds->bounds, 0, bounds->run_count * RUN * sizeof(float));
    for (int64_t low = 0; low < bounds->groups; low += GROUPS) {
        int64_t high = low + GROUPS < bounds->groups ? low + GROUPS : bounds->groups;
        for (int64_t i = 0; i < lists; i++) {
            int32_t row = postings->peak_rows[cursors[i].term];
            if (row < 0) {
                bound_by_postings(postings, &cursors[i], bounds->bounds, high);
                continue;
            }
            const uint8_t *peaks = postings->peaks + row * bounds->groups;
            float unit = cursors[i].bound * (float)(1.000001 / 255), *sums = bounds->bounds;
            for (int64_t group = low; group < high; group++) sums[group] += unit * (float)peaks[group];
        }
    }
    for (int64_t run = 0; run < bounds->run_count; run++) {
        const Bits *bits = (const Bits *)(bounds->bounds + run * RUN);
        Bits most = 0;
        for (int i = 0; i < RUN; i++) most = bits[i] > most ? bits[i] : most;
        ((Bits *)bounds->runs)[run] = most;
    }
}

/* Scores the documents of the groups with bounds from ``least`` (or the floor) to below ``below``. */
static int visit(const Postings *postings, Query *query, const Bounds *bounds, float least, float below, double slack) {
    RowScore score_of = row_score(postings), rough_of = rough_row_score(postings);
    for (int64_t run = 0; run < bounds->run_count; run++) {
        float wanted = fmaxf(least, least_sum(query->floor, 0, slack));
        if (bounds->runs[run] < wanted) continue;
        int64_t groups[RUN], found = 0;
        for (int64_t group = run * RUN; group < (run + 1) * RUN; group++)
            if (bounds->bounds[group] >= wanted && bounds->bounds[group] < below) groups[found++] = group;
        for (int64_t i = 0; i < found; i++) {
            if (i + 2 < found) fetch_row(postings, groups[i + 2] * GROUP);
            float needed = least_sum(query->floor, 0, slack);
            int64_t document = groups[i] * GROUP, end = document + GROUP < postings->count ? document + GROUP : postings->count;
            if (bounds->bounds[groups[i]] < needed) continue;
            for (; document < end; document++) {
                if (!postings->eligible[document]) continue;
                if (consider(postings, query, document, rough_of, score_of, needed)) return 1;
            }
        }
    }
    return 0;
}

/* Goes through the groups of greatest bound first. Where too many are left with a chance, all lists are added up instead. */
static int search_groups(const Postings *postings, Query *query, Cursor *cursors, Bounds *bounds, Block *block) {
    int64_t lists = place_cursors(postings, query, cursors), left = 0;
    double slack = (double)(lists + 4) * 0x1p-23, all = 0;
    if (!lists || cursors[0].rest < query->floor) return 0;
    bounds->groups = (postings->count + GROUP - 1) / GROUP;
    bounds->run_count = (bounds->groups + RUN - 1) / RUN;
    bound_groups(postings, cursors, lists, bounds);
    float below = INFINITY;
    for (int64_t most = 16 + query->k / 4; most < bounds->run_count / 4 && most < 2048; most *= 8) {
        memcpy(bounds->scratch, bounds->runs, bounds->run_count * sizeof(float));
        float least = kth_greatest(bounds->scratch, bounds->run_count, most);
        if (least >= below || least < 1e-37f) break;
        if (visit(postings, query, bounds, least, below, slack)) return 1;
        below = least;
    }
    float least = least_sum(query->floor, 0, slack);
    for (int64_t i = 0; i < lists; i++) all += (double)(cursors[i].end - postings->starts[cursors[i].term]);
    left = count_from(bounds->bounds, bounds->groups, least);
    if (left * GROUP * ROW_COST < all) return visit(postings, query, bounds, least, below, slack);
    /* what was found here is found again: earlier segments' documents stay, and the heap begins anew (the floor holds) */
    int64_t kept = 0;
    for (int64_t i = 0; i < query->filled; i++)
        if (query->positions[i] < postings->first) {
            query->positions[kept] = query->positions[i];
            query->scores[kept++] = query->scores[i];
        }
    query->filled = kept, query->bests = 0;
    return search_segment(postings, query, cursors, block);
}

static int64_t runs_of(int64_t documents) { return (documents / GROUP + 1) / RUN + 1; }

/* Bytes that a search needs beside what it finds: of segments of no more documents, for a query of so many terms. */
EXPORT int64_t openembed_postings_room(int64_t documents, int64_t terms) {
    return sizeof(Block) + terms * sizeof(Cursor) + runs_of(documents) * (RUN + 2) * sizeof(float);
}

/* Finds the k best documents of all segments, and ties of the last of them. Returns 0, or 1 where the capacity is too small:
 * then the search is to be repeated with more. */
EXPORT int openembed_postings_search(const Postings *segments, int64_t count, Query *query) {
    int failed = 0;
    Block *block = query->room;
    Cursor *cursors = (Cursor *)(block + 1);
    for (int64_t i = 0; i < count && !failed; i++) {
        for (int64_t j = 0; j < query->count; j++)
            query->dense[query->terms[j]] = query->weights[j] * segments[i].units[query->terms[j]];
        int64_t runs = runs_of(segments[i].count);
        float *bounds = (float *)(cursors + query->count);
        Bounds room = {bounds, bounds + runs * RUN, bounds + runs * (RUN + 1), 0, 0};
        if (rows_are_cheaper(&segments[i], query)) failed = search_rows(&segments[i], query);
        else if (segments[i].peaks) failed = search_groups(&segments[i], query, cursors, &room, block);
        else failed = search_segment(&segments[i], query, cursors, block);
    }
    for (int64_t i = 0; i < query->count; i++) query->dense[query->terms[i]] = 0;
    return failed;
}

#define INVERT(NAME, TERM, WEIGHT)                                                                                      \
    static void NAME(const int64_t *rows, int64_t count, const TERM *terms, const WEIGHT *weights, int64_t *ends,       \
                     int32_t *documents, WEIGHT *impacts) {                                                             \
        for (int64_t document = 0; document < count; document++)                                                        \
            for (int64_t i = rows[document]; i < rows[document + 1]; i++) {                                             \
                int64_t place = ends[terms[i]]++;                                                                       \
                documents[place] = (int32_t)document;                                                                   \
                impacts[place] = weights[i];                                                                            \
            }                                                                                                           \
    }
INVERT(invert_narrow, uint16_t, float)
INVERT(invert_wide, int32_t, float)
INVERT(invert_narrow_half, uint16_t, uint16_t)
INVERT(invert_wide_half, int32_t, uint16_t)
INVERT(invert_narrow_byte, uint16_t, uint8_t)
INVERT(invert_wide_byte, int32_t, uint8_t)

/* Writes documents and weights in order of terms. ``ends``: where each term's postings begin; on return, where they end. */
EXPORT void openembed_postings_invert(const int64_t *rows, int64_t count, const void *terms, const void *weights, int32_t narrow,
                                      int32_t bytes, int64_t *ends, int32_t *documents, void *impacts) {
    if (bytes == 1 && narrow) invert_narrow_byte(rows, count, terms, weights, ends, documents, impacts);
    else if (bytes == 1) invert_wide_byte(rows, count, terms, weights, ends, documents, impacts);
    else if (bytes == 2 && narrow) invert_narrow_half(rows, count, terms, weights, ends, documents, impacts);
    else if (bytes == 2) invert_wide_half(rows, count, terms, weights, ends, documents, impacts);
    else if (narrow) invert_narrow(rows, count, terms, weights, ends, documents, impacts);
    else invert_wide(rows, count, terms, weights, ends, documents, impacts);
}

static float bm25_part(const Words *words, const List *list, int32_t length, double count) {
    return (float)(list->idf * (count / (words->penalties[length] + count)));
}

/* BM25 of one segment. */
static int bm25_segment(const Words *words, Query *query, int64_t *ats, Block *block) {
    for (int64_t i = 0; i < words->list_count; i++) ats[i] = 0;
    for (int64_t base = 0; base < words->count; base += BLOCK) {
        int64_t size = words->count - base < BLOCK ? words->count - base : BLOCK, most = 0;
        memset(block->sums, 0, (size + RUN - 1) / RUN * RUN * sizeof(float));
        for (int64_t i = 0; i < words->list_count; i++) {
            const List *list = &words->lists[i];
            int64_t end = seek(list->documents, ats[i], list->size, base + BLOCK);
            const int32_t *lengths = words->lengths;
            most += end - ats[i];
            for (int64_t at = ats[i]; at < end; at++) {
                int32_t document = list->documents[at], count = list->counts[at], length = lengths[document];
                int tabled = count == 1 && length < words->tabled;
                block->sums[document - base] += tabled ? list->ones[length] : bm25_part(words, list, length, count);
            }
            ats[i] = end;
        }
        if (!most) continue;
        query->touched += most;
        int64_t found = gather(block, size, words->eligible + base, fmaxf(query->floor, 1e-45f));
        raise_floor(query, block, found, 0);
        for (int64_t i = 0; i < found; i++) {
            float score = block->sums[block->places[i]];
            if (score >= query->floor && push(query, words->first + base + block->places[i], score)) return 1;
        }
    }
    return 0;
}

/* As ``openembed_postings_search``, by BM25. */
EXPORT int openembed_bm25_search(const Words *segments, int64_t count, Query *query) {
    int failed = 0;
    Block *block = query->room;
    for (int64_t i = 0; i < count && !failed; i++) failed = bm25_segment(&segments[i], query, (int64_t *)(block + 1), block);
    return failed;
}
