/* Candidates of an exact top-k search over int8 codes.
 *
 * A document d is coded as c with d = scale * c + r and |r| <= error, a query likewise. Then
 *     |q.d - scale_q scale_d (c_q.c_d)| <= inner_q * error_d + outer_q * norm_d,
 * where inner_q >= |scale_q c_q| and outer_q >= |r_q|, both with room for float32 rounding. A document stays a candidate
 * while its upper bound reaches the k-th greatest lower bound seen, so no document of the true top k is ever dropped.
 *
 * Codes lie in groups of 16 documents, four components at a time: (group, step, document, 4), stored as c + 128. One
 * instruction (VNNI) then multiplies four components of 16 documents, and no sum runs across lanes.
 */
#define EXPORT __attribute__((visibility("default")))

#include "coding.h"
#include <stdlib.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { WIDE = 6, GROUPS = 4, AHEAD = 16 };

typedef struct {
    const uint8_t *codes;     /* (groups, steps, 16, 4) */
    const float *scale;       /* (groups * 16) */
    const float *norm;
    const float *error;
    const uint16_t *eligible; /* (groups): one bit a document */
    const int64_t *ranges;    /* (ranges, 2): groups to scan, from and to */
    int64_t range_count;
    int64_t steps;
    int64_t first;            /* position of the first document of group 0 */
} Documents;

typedef struct {
    const int32_t *codes;     /* (tiles, steps, width): four int8 in each */
    const int32_t *offset;    /* (queries): 128 * sum of the query's codes */
    const float *scale;
    const float *inner;
    const float *outer;
    const float *limit;       /* documents at or above it are counted, not kept */
    int64_t count;
    int64_t width;            /* queries of a tile: WIDE or 1 */
    int64_t k;
    int64_t capacity;
    int32_t *positions;       /* (queries, capacity), in the order of the codes */
    float *lower;             /* (queries, capacity); -inf: may be at or above the limit */
    float *upper;
    int64_t *filled;
    int64_t *next;            /* where the next selection is due */
    float *floor;
    int64_t *above;
    uint8_t *overflow;        /* more candidates than there is room for: the query must be searched otherwise */
} Queries;

static const float TINY = 1e-37f; /* below it floats round to more than a share of themselves */

static void select_best(Queries *queries, int64_t query, float *scratch) {
    int64_t base = query * queries->capacity, filled = queries->filled[query], kept = 0;
    float *lower = queries->lower + base, *upper = queries->upper + base;
    int32_t *positions = queries->positions + base;
    if (filled >= queries->k) {
        memcpy(scratch, lower, filled * sizeof(float));
        float floor = kth_greatest(scratch, filled, queries->k);
        if (floor > queries->floor[query]) queries->floor[query] = floor;
    }
    for (int64_t i = 0; i < filled; i++)
        if (upper[i] >= queries->floor[query]) {
            lower[kept] = lower[i];
            upper[kept] = upper[i];
            positions[kept++] = positions[i];
        }
    queries->filled[query] = kept;
    int64_t last = queries->capacity - LANES;
    if (kept > last) queries->overflow[query] = 1;
    queries->next[query] = 2 * kept + 64 < last ? 2 * kept + 64 : last;
}

static void take(const Documents *documents, Queries *queries, int64_t query, int64_t group, const float *score,
                 const float *slack, float *scratch) {
    int64_t base = query * queries->capacity;
    uint16_t eligible = documents->eligible[group];
    float floor = queries->floor[query], limit = queries->limit[query];
    for (int lane = 0; lane < LANES; lane++) {
        float lower = score[lane] - slack[lane], upper = score[lane] + slack[lane];
        if (!(eligible >> lane & 1) || upper < floor) continue;
        if (lower >= limit) {
            queries->above[query]++;
            continue;
        }
        int64_t place = base + queries->filled[query]++;
        queries->positions[place] = (int32_t)(documents->first + group * LANES + lane);
        queries->lower[place] = upper >= limit ? -INFINITY : lower;
        queries->upper[place] = upper;
    }
    if (queries->filled[query] > queries->next[query]) select_best(queries, query, scratch);
}

static inline void settle(const Documents *documents, Queries *queries, int64_t query, int64_t group,
                          const int32_t *products, float *scratch) {
    const float *scale = documents->scale + group * LANES, *norm = documents->norm + group * LANES;
    const float *error = documents->error + group * LANES;
    float scale_q = queries->scale[query], inner = queries->inner[query], outer = queries->outer[query];
    float floor = queries->floor[query];
    int32_t offset = queries->offset[query];
    float score[LANES], slack[LANES];
#ifdef __AVX512F__ /* compilers leave the loop below scalar, since a comparison of floats might trap */
    __m512i whole = _mm512_sub_epi32(_mm512_loadu_si512(products), _mm512_set1_epi32(offset));
    __m512 scales = _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(scale_q));
    __m512 scores = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scales);
    __m512 slacks = _mm512_fmadd_ps(_mm512_set1_ps(outer), _mm512_loadu_ps(norm), _mm512_set1_ps(TINY));
    slacks = _mm512_fmadd_ps(_mm512_set1_ps(inner), _mm512_loadu_ps(error), slacks);
    int hit = _mm512_cmp_ps_mask(_mm512_add_ps(scores, slacks), _mm512_set1_ps(floor), _CMP_GE_OQ);
    if (!hit) return;
    _mm512_storeu_ps(score, scores);
    _mm512_storeu_ps(slack, slacks);
#else
    int hit = 0;
    for (int lane = 0; lane < LANES; lane++) {
        score[lane] = (float)(products[lane] - offset) * (scale[lane] * scale_q);
        slack[lane] = inner * error[lane] + outer * norm[lane] + TINY;
        hit |= score[lane] + slack[lane] >= floor;
    }
#endif
    if (hit) take(documents, queries, query, group, score, slack, scratch);
}

#define UNROLLED _Pragma("GCC unroll 32")
#define DOTS(NAME, COUNT, WIDTH)                                                                                         \
    static void NAME(const uint8_t *codes, const int32_t *query, int64_t steps, int32_t out[][LANES]) {                  \
        VECTOR sums[COUNT][WIDTH];                                                                                       \
        UNROLLED for (int g = 0; g < COUNT; g++)                                                                         \
            UNROLLED for (int w = 0; w < WIDTH; w++) sums[g][w] = ZERO;                                                  \
        for (int64_t step = 0; step < steps; step++) {                                                                   \
            FOUR part[COUNT];                                                                                            \
            UNROLLED for (int g = 0; g < COUNT; g++) part[g] = LOAD(codes + (g * steps + step) * 64);                    \
            UNROLLED for (int w = 0; w < WIDTH; w++)                                                                     \
                UNROLLED for (int g = 0; g < COUNT; g++) sums[g][w] = ADD(sums[g][w], part[g], query[step * WIDTH + w]); \
        }                                                                                                                \
        UNROLLED for (int g = 0; g < COUNT; g++)                                                                         \
            UNROLLED for (int w = 0; w < WIDTH; w++) STORE(out[g * WIDTH + w], sums[g][w]);                              \
    }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define VECTOR __m512i
#define FOUR __m512i
#define ZERO _mm512_setzero_si512()
#define LOAD(at) _mm512_loadu_si512((const void *)(at))
#define ADD(sum, part, query) _mm512_dpbusd_epi32(sum, part, _mm512_set1_epi32(query))
#define STORE(at, sum) _mm512_storeu_si512((void *)(at), sum)
#else
typedef struct { int32_t lane[LANES]; } Sums;
static inline Sums add_four(Sums sums, const uint8_t *part, int32_t query) {
    int8_t q[4];
    memcpy(q, &query, 4);
    for (int lane = 0; lane < LANES; lane++) {
        const uint8_t *d = part + 4 * lane;
        sums.lane[lane] += (int16_t)d[0] * q[0] + (int16_t)d[1] * q[1] + (int16_t)d[2] * q[2] + (int16_t)d[3] * q[3];
    }
    return sums;
}
#define VECTOR Sums
#define FOUR const uint8_t *
#define ZERO (Sums){{0}}
#define LOAD(at) (at)
#define ADD(sum, part, query) add_four(sum, part, query)
#define STORE(at, sum) memcpy(at, (sum).lane, sizeof(sum))
#endif

DOTS(dots_wide_four, GROUPS, WIDE)
DOTS(dots_wide_one, 1, WIDE)

/* One query and groups one after the other: what bounds it is reading memory, which is twice as fast in one line as in four. */
static void dots_narrow(const uint8_t *codes, const int32_t *query, int64_t steps, int64_t groups, int32_t out[][LANES]) {
    for (int64_t g = 0; g < groups; g++, codes += steps * 64) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        __m512i sums[4];
        UNROLLED for (int i = 0; i < 4; i++) sums[i] = ZERO;
        int64_t step = 0;
        for (; step + 4 <= steps; step += 4)
            UNROLLED for (int i = 0; i < 4; i++) sums[i] = ADD(sums[i], LOAD(codes + (step + i) * 64), query[step + i]);
        for (; step < steps; step++) sums[0] = ADD(sums[0], LOAD(codes + step * 64), query[step]);
        STORE(out[g], _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
#else
        Sums sums = ZERO;
        for (int64_t step = 0; step < steps; step++) sums = ADD(sums, LOAD(codes + step * 64), query[step]);
        STORE(out[g], sums);
#endif
    }
}

static void scan_groups(const Documents *documents, Queries *queries, int64_t group, int64_t groups, float *scratch) {
    int32_t products[GROUPS * WIDE][LANES];
    int64_t steps = documents->steps, width = queries->width;
    const uint8_t *codes = documents->codes + group * steps * 64;
    for (int64_t first = 0; first < queries->count; first += width) {
        const int32_t *query = queries->codes + first * steps;
        if (width != WIDE) dots_narrow(codes, query, steps, groups, products);
        else if (groups == GROUPS) dots_wide_four(codes, query, steps, products);
        else dots_wide_one(codes, query, steps, products);
        int64_t last = first + width < queries->count ? first + width : queries->count;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t number = first; number < last; number++)
                if (!queries->overflow[number])
                    settle(documents, queries, number, group + g, products[g * width + number - first], scratch);
    }
}

/* Scores sketches: four bits for each part of the components, a table of 16 products for each part. 64 bytes hold 16 documents
 * times 4 parts in their low halves, and 4 other parts in their high halves. ``tables``: (steps, 2, 4, 16) bytes. */
static inline void look_up(const uint8_t *codes, const uint8_t *tables, int64_t steps, int32_t out[LANES]) {
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    const __m512i low = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1), which = _mm512_set1_epi32(0x30201000);
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t step = 0; step < steps; step++) {
        __m512i both = _mm512_loadu_si512(codes + step * 64), high = _mm512_srli_epi16(both, 4);
        both = _mm512_ternarylogic_epi32(both, low, which, 0xea); /* (a & b) | c */
        high = _mm512_ternarylogic_epi32(high, low, which, 0xea);
        both = _mm512_permutexvar_epi8(both, _mm512_loadu_si512(tables + step * 128));
        high = _mm512_permutexvar_epi8(high, _mm512_loadu_si512(tables + step * 128 + 64));
        sums[0] = _mm512_dpbusd_epi32(sums[0], both, ones);
        sums[1] = _mm512_dpbusd_epi32(sums[1], high, ones);
    }
    _mm512_storeu_si512(out, _mm512_add_epi32(sums[0], sums[1]));
#else
    memset(out, 0, LANES * sizeof(int32_t));
    for (int64_t step = 0; step < steps; step++)
        for (int lane = 0; lane < LANES; lane++)
            for (int part = 0; part < 4; part++) {
                uint8_t code = codes[step * 64 + lane * 4 + part];
                out[lane] += tables[step * 128 + part * 16 + (code & 15)] + tables[step * 128 + 64 + part * 16 + (code >> 4)];
            }
#endif
}

/* Gives the sum of table entries for each of the codes (groups, steps, 16, 4). */
EXPORT void openembed_sketch_scores(const uint8_t *codes, const uint8_t *tables, int64_t groups, int64_t steps, int32_t *sums) {
    for (int64_t group = 0; group < groups; group++) look_up(codes + group * steps * 64, tables, steps, sums + group * LANES);
}

/* Returns one bit for each of the sums that reaches the floor. */
static inline unsigned reaching(const int32_t sums[LANES], int32_t floor) {
#ifdef __AVX512F__
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(sums), _mm512_set1_epi32(floor));
#else
    unsigned found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= (unsigned)(sums[lane] >= floor) << lane;
    return found;
#endif
}

typedef struct {
    const uint8_t *codes;    /* (groups, steps, 16, 4) */
    int64_t steps;
    const int64_t *ranges;   /* (ranges, 2): groups to scan, from and to */
    int64_t range_count;
    const int32_t *order;    /* (groups * 16): which document each is; none where that is not below ``count`` */
    const uint8_t *eligible; /* (count), by document; NULL: all are */
    int64_t count;
} Sketch;

typedef struct { int64_t range, group; } Place;

/* Has a group fetched into the second cache, and goes on to the next. The processor foresees what it is to read up to the end
 * of a page of 4 KB, and nothing of the next range: asked for sixteen groups ahead, it reads 2.6 times as fast. */
static inline void fetch(const Sketch *sketch, Place *place) {
    int64_t size = sketch->steps * 64;
    while (place->range < sketch->range_count && place->group >= sketch->ranges[2 * place->range + 1])
        if (++place->range < sketch->range_count) place->group = sketch->ranges[2 * place->range];
    if (place->range == sketch->range_count) return;
    const uint8_t *codes = sketch->codes + place->group * size;
    for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(codes + line, 0, 2);
    __builtin_prefetch(sketch->order + place->group++ * LANES, 0, 2);
}

/* Leaves k of the best sums and their documents, and returns what another must reach to be better than the worst of them. */
static int32_t keep_best(int32_t *documents, float *sums, int64_t *filled, int64_t k, float *scratch) {
    int64_t kept = 0, ties = k;
    if (*filled < k) return 0;
    memcpy(scratch, sums, *filled * sizeof(float));
    float worst = kth_greatest(scratch, *filled, k);
    for (int64_t i = 0; i < *filled; i++) ties -= sums[i] > worst;
    for (int64_t i = 0; i < *filled; i++)
        if (sums[i] > worst || (sums[i] == worst && ties-- > 0)) {
            sums[kept] = sums[i];
            documents[kept++] = documents[i];
        }
    *filled = kept;
    return (int32_t)worst + 1;
}

/* Finds the k eligible documents of the ranges whose sketches score best; of equal ones the first. ``documents`` and ``sums``
 * have room for 2 k + 16. Returns how many were found, or -1 when there is no memory. */
EXPORT int64_t openembed_sketch_scan(const Sketch *sketch, const uint8_t *tables, int64_t k, int32_t *documents, float *sums) {
    float *scratch = malloc((2 * k + LANES) * sizeof(float));
    int32_t products[LANES], floor = 0;
    int64_t filled = 0;
    Place ahead = {0, sketch->range_count ? sketch->ranges[0] : 0};
    if (!scratch) return -1;
    for (int group = 0; group < AHEAD; group++) fetch(sketch, &ahead);
    for (int64_t range = 0; range < sketch->range_count; range++) {
        int64_t group = sketch->ranges[2 * range], end = sketch->ranges[2 * range + 1];
        for (; group < end; group++) {
            fetch(sketch, &ahead);
            look_up(sketch->codes + group * sketch->steps * 64, tables, sketch->steps, products);
            for (unsigned left = reaching(products, floor); left; left &= left - 1) {
                int lane = __builtin_ctz(left);
                int32_t document = sketch->order[group * LANES + lane];
                if ((uint32_t)document >= sketch->count || (sketch->eligible && !sketch->eligible[document])) continue;
                documents[filled] = document;
                sums[filled++] = (float)products[lane];
            }
            if (filled > 2 * k) floor = keep_best(documents, sums, &filled, k, scratch);
        }
    }
    keep_best(documents, sums, &filled, k, scratch);
    free(scratch);
    return filled;
}

/* Codes documents (count, width): bytes of whole groups, and their bounds. Padding is of scale, norm and error 0. ``room`` is
 * the relative room for rounding in norm and error. Returns 0, or 1 when there is no memory. */
EXPORT int openembed_quantize(const float *values, int64_t count, int64_t width, int64_t steps, double room, uint8_t *codes,
                       float *scale, float *norm, float *error) {
    int64_t padded = (width + LANES - 1) / LANES * LANES;
    float *value = calloc(padded, sizeof(float));
    int8_t *whole = malloc(padded);
    if (!value || !whole) {
        free(value);
        free(whole);
        return 1;
    }
    memset(codes, 128, (size_t)((count + LANES - 1) / LANES * steps * 64));
    for (int64_t number = 0; number < count; number++) {
        uint8_t *code = codes + number / LANES * steps * 64 + number % LANES * 4;
        double squares = 0, lost = 0;
        memcpy(value, values + number * width, width * sizeof(float));
        scale[number] = code_one(value, padded, whole, &squares, &lost);
        norm[number] = (float)(sqrt(squares) * (1 + room));
        error[number] = (float)(sqrt(lost) * (1 + room));
        for (int64_t step = 0; step < steps; step++)
            for (int part = 0; part < 4; part++) code[step * 64 + part] = (uint8_t)(whole[step * 4 + part] + 128);
    }
    free(value);
    free(whole);
    return 0;
}

/* Dot products of pairs (queries[i], documents[i]), summed in float64 in one fixed order, rounded to float32. */
EXPORT void openembed_products(const float *queries, const float *documents, int64_t width, const int64_t *rows,
                        const int64_t *positions, int64_t count, float *scores) {
    for (int64_t pair = 0; pair < count; pair++) {
        const float *query = queries + rows[pair] * width, *document = documents + positions[pair] * width;
        const float *soon = documents + positions[pair + 2 < count ? pair + 2 : pair] * width;
        for (int64_t i = 0; i < width; i += LANES) __builtin_prefetch(soon + i);
        double sums[LANES] = {0}, total = 0;
        int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += (double)query[i + lane] * document[i + lane];
        for (int64_t i = whole; i < width; i++) sums[i - whole] += (double)query[i] * document[i];
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        scores[pair] = (float)total;
    }
}

/* Scans the ranges for every query; returns 0, or 1 when there is no memory. */
EXPORT int openembed_scan(const Documents *documents, Queries *queries) {
    float *scratch = malloc(queries->capacity * sizeof(float));
    if (!scratch) return 1;
    for (int64_t range = 0; range < documents->range_count; range++) {
        int64_t group = documents->ranges[2 * range], end = documents->ranges[2 * range + 1];
        while (group < end) {
            if (!documents->eligible[group]) {
                group++;
                continue;
            }
            int64_t groups = end - group >= GROUPS ? GROUPS : 1;
            scan_groups(documents, queries, group, groups, scratch);
            group += groups;
        }
    }
    for (int64_t query = 0; query < queries->count; query++)
        if (!queries->overflow[query]) select_best(queries, query, scratch);
    free(scratch);
    return 0;
}
