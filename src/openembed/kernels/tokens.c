/* MaxSim of queries with documents of many vectors each, and retrieval of single token vectors, over int8 codes with bounds.
 *
 * A token d is coded as scale * c + r, |r| <= error; a query token likewise. As in scan.c
 *     |q.d - scale_q scale_d (c_q.c_d)| <= inner_q * error_d + outer_q * norm_d,
 * here with the greatest error and norm of the document's tokens. A maximum is off by no more than its terms, and a sum of
 * maxima by no more than the sum of that, so a document whose upper bound does not reach the k-th best exact score is none of
 * the k best; and of one document only tokens within twice the bound of the maximum can be the true maximum. Those few are
 * multiplied in float64.
 */
#include "panels.h"

BYTES(bytes_two, 1, SIXTEEN)
BYTES(bytes_half_more, 1, EIGHT)
BYTES(bytes_one, 0, SIXTEEN)
BYTES(bytes_half, 0, EIGHT)

typedef struct {
    const uint8_t *codes;   /* (tokens, stride): component + 128, padded with 128 to a multiple of four */
    const float *scale;     /* (tokens) */
    const float *bounds;    /* (documents, 2): greatest error, greatest norm */
    const void *values;     /* (tokens, width): float16 or float32 */
    const int64_t *offsets; /* (documents + 1) */
    int64_t stride;
    int64_t width;
    int64_t half;
} Tokens;

typedef struct {
    const int32_t *panel;  /* (tiles, stride / 4, 16): four int8 of a query token a lane */
    const int32_t *start;  /* (tiles * 16): -128 * the sum of the codes */
    const float *scale;
    const float *inner;
    const float *outer;
    const double *values;  /* (lanes, width padded to a multiple of 16) */
    const int64_t *bounds; /* (queries + 1): the lanes of each query */
    int64_t queries;
    int64_t lanes;
    int64_t tiles;
} Panel;

typedef struct {
    int64_t *positions; /* (lanes, capacity): tokens, ascending */
    float *lower;
    float *upper;
    int64_t *filled;
    int64_t *next; /* where the next selection is due */
    float *floor;
    int64_t k;
    int64_t capacity;
} Hits;

enum { CHUNK = 2048, DOCUMENTS = 256 };
static const float TINY = 1e-30f;

/* Documents next to each other, as many as fit a cache: scanned as one stream of tokens. */
static int64_t chunk_end(const Tokens *tokens, const int64_t *documents, int64_t first, int64_t count) {
    int64_t last = first + 1, start = tokens->offsets[documents[first]];
    while (last < count && last - first < DOCUMENTS && documents[last] == documents[last - 1] + 1 &&
           tokens->offsets[documents[last] + 1] - start <= CHUNK)
        last++;
    return last;
}

/* The products of up to ROWS tokens from ``at`` on with one or two tiles. */
static void block(const Tokens *tokens, const Panel *panel, int64_t at, int64_t rows, int64_t tile, uint8_t *tail,
                  int32_t out[ROWS][2][LANES]) {
    int64_t steps = tokens->stride / 4, next = steps * LANES;
    const uint8_t *codes = tokens->codes + at * tokens->stride;
    if (rows < ROWS) codes = memcpy(tail, codes, rows * tokens->stride);
    const int32_t *from = panel->panel + tile * next, *start = panel->start + tile * LANES;
    int64_t lanes = panel->lanes - tile * LANES;
    if (lanes > LANES + 8) bytes_two(codes, tokens->stride, from, next, start, steps, out);
    else if (lanes > LANES) bytes_half_more(codes, tokens->stride, from, next, start, steps, out);
    else if (lanes > 8) bytes_one(codes, tokens->stride, from, next, start, steps, out);
    else bytes_half(codes, tokens->stride, from, next, start, steps, out);
}

static void scan_chunk(const Tokens *tokens, const Panel *panel, int64_t document, int64_t count, int64_t tile, float *best,
                       uint8_t *tail) {
    const int64_t *ends = tokens->offsets + document + 1;
    int64_t width = panel->tiles * LANES, end = ends[count - 1], place = 0, wide = tile + 1 < panel->tiles ? 2 : 1;
    int32_t out[ROWS][2][LANES] = {0};
    for (int64_t at = tokens->offsets[document]; at < end; at += ROWS) {
        int64_t rows = least(ROWS, end - at);
        block(tokens, panel, at, rows, tile, tail, out);
        for (int64_t r = 0; r < rows; r++) {
            while (at + r >= ends[place]) place++;
            float *to = best + place * width + tile * LANES, scale = tokens->scale[at + r];
            for (int64_t w = 0; w < wide; w++) raise_scaled(to + w * LANES, out[r][w], scale);
        }
    }
}

static void lowest(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = -INFINITY;
}

/* Scores (queries, count) of the documents, ascending, off by no more than the bounds; -inf for a document of no tokens.
 * Returns 0, or 1 when there is no memory. */
EXPORT int openembed_tokens_scan(const Tokens *tokens, const Panel *panel, const int64_t *documents, int64_t count,
                                 float *scores) {
    int64_t width = panel->tiles * LANES;
    float *best = malloc(DOCUMENTS * width * sizeof(float) + 1);
    uint8_t *tail = calloc(ROWS, tokens->stride + 1);
    if (!best || !tail) {
        free(best);
        free(tail);
        return 1;
    }
    for (int64_t first = 0, last; first < count; first = last) {
        last = chunk_end(tokens, documents, first, count);
        lowest(best, (last - first) * width);
        for (int64_t tile = 0; tile < panel->tiles; tile += 2)
            scan_chunk(tokens, panel, documents[first], last - first, tile, best, tail);
        for (int64_t query = 0; query < panel->queries; query++)
            for (int64_t i = first; i < last; i++) {
                float sum = 0, *from = best + (i - first) * width;
                for (int64_t lane = panel->bounds[query]; lane < panel->bounds[query + 1]; lane++)
                    sum += panel->scale[lane] * from[lane];
                scores[query * count + i] = sum;
            }
    }
    free(best);
    free(tail);
    return 0;
}

/* A token as float32, padded with zeros to a multiple of 16. */
static void token_floats(const Tokens *tokens, int64_t at, float *value) {
    int64_t i = 0, width = tokens->width;
    if (!tokens->half) {
        memcpy(value, (const float *)tokens->values + at * width, width * sizeof(float));
        return;
    }
    const uint16_t *half = (const uint16_t *)tokens->values + at * width;
#if defined(__AVX512F__)
    for (; i + LANES <= width; i += LANES)
        _mm512_storeu_ps(value + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(half + i))));
#endif
    for (; i < width; i++) value[i] = from_half(half[i]);
}

/* Summed in float64 in one fixed order. */
static double exact_dot(const double *query, const float *value, int64_t padded) {
    double sums[LANES] = {0}, total = 0;
    for (int64_t i = 0; i < padded; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += query[i + lane] * (double)value[i + lane];
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

typedef struct {
    float *products; /* (tokens of a document, width) */
    float *best;     /* (width): greatest product, then the least that may be the greatest */
    double *exact;   /* (width) */
    float *value;
    uint8_t *tail;
    int64_t room;
} Work;

static int make_room(Work *work, int64_t length, int64_t width) {
    if (length <= work->room) return 0;
    free(work->products);
    work->room = 2 * length;
    work->products = malloc(work->room * width * sizeof(float));
    return work->products ? 0 : (work->room = 0, 1);
}

static void document_products(const Tokens *tokens, const Panel *panel, int64_t document, Work *work) {
    int64_t width = panel->tiles * LANES, start = tokens->offsets[document], end = tokens->offsets[document + 1];
    int32_t out[ROWS][2][LANES] = {0};
    lowest(work->best, width);
    for (int64_t tile = 0; tile < panel->tiles; tile += 2)
        for (int64_t at = start; at < end; at += ROWS) {
            int64_t rows = least(ROWS, end - at), wide = tile + 1 < panel->tiles ? 2 : 1;
            block(tokens, panel, at, rows, tile, work->tail, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t w = 0; w < wide; w++) {
                    float *to = work->products + (at + r - start) * width + (tile + w) * LANES, scale = tokens->scale[at + r];
                    for (int lane = 0; lane < LANES; lane++) to[lane] = (float)out[r][w][lane] * scale;
                    raise_to(work->best + (tile + w) * LANES, to);
                }
        }
}

static double document_score(const Tokens *tokens, const Panel *panel, int64_t document, Work *work) {
    int64_t width = panel->tiles * LANES, padded = (tokens->width + LANES - 1) / LANES * LANES;
    int64_t start = tokens->offsets[document], length = tokens->offsets[document + 1] - start;
    const float *bounds = tokens->bounds + 2 * document;
    double total = 0;
    document_products(tokens, panel, document, work);
    for (int64_t lane = 0; lane < width; lane++) {
        float slack = lane < panel->lanes ? panel->inner[lane] * bounds[0] + panel->outer[lane] * bounds[1] + TINY : 0;
        work->best[lane] = lane < panel->lanes ? work->best[lane] - 2 * slack / panel->scale[lane] : INFINITY;
        work->exact[lane] = -INFINITY;
    }
    for (int64_t row = 0; row < length; row++) {
        int loaded = 0;
        for (int64_t tile = 0; tile < panel->tiles; tile++) {
            int mask = reaching(work->products + row * width + tile * LANES, work->best + tile * LANES);
            for (; mask; mask &= mask - 1) {
                int64_t lane = tile * LANES + __builtin_ctz(mask);
                if (!loaded++) token_floats(tokens, start + row, work->value);
                double product = exact_dot(panel->values + lane * padded, work->value, padded);
                if (product > work->exact[lane]) work->exact[lane] = product;
            }
        }
    }
    for (int64_t lane = 0; lane < panel->lanes; lane++) total += work->exact[lane];
    return total;
}

/* Exact scores (count) of the documents for the one query of the panel: maxima and sum in float64, rounded to float32.
 * Returns 0, or 1 when there is no memory. */
EXPORT int openembed_tokens_exact(const Tokens *tokens, const Panel *panel, const int64_t *documents, int64_t count,
                                  float *scores) {
    int64_t width = panel->tiles * LANES, padded = (tokens->width + LANES - 1) / LANES * LANES;
    Work work = {0};
    work.best = malloc(width * sizeof(float) + 1);
    work.exact = malloc(width * sizeof(double) + 1);
    work.value = calloc(padded + 1, sizeof(float));
    work.tail = calloc(ROWS, tokens->stride + 1);
    int failed = !work.best || !work.exact || !work.value || !work.tail;
    for (int64_t i = 0; i < count && !failed; i++) {
        int64_t length = tokens->offsets[documents[i] + 1] - tokens->offsets[documents[i]];
        failed = make_room(&work, length, width);
        if (!failed) scores[i] = (float)document_score(tokens, panel, documents[i], &work);
    }
    free(work.products);
    free(work.best);
    free(work.exact);
    free(work.value);
    free(work.tail);
    return failed;
}

static int select_hits(Hits *hits, int64_t lane, float *scratch) {
    int64_t base = lane * hits->capacity, filled = hits->filled[lane], kept = 0;
    float *lower = hits->lower + base, *upper = hits->upper + base;
    int64_t *positions = hits->positions + base;
    if (filled >= hits->k) {
        memcpy(scratch, lower, filled * sizeof(float));
        float floor = kth_greatest(scratch, filled, hits->k);
        if (floor > hits->floor[lane]) hits->floor[lane] = floor;
    }
    for (int64_t i = 0; i < filled; i++)
        if (upper[i] >= hits->floor[lane]) {
            lower[kept] = lower[i];
            upper[kept] = upper[i];
            positions[kept++] = positions[i];
        }
    hits->filled[lane] = kept;
    hits->next[lane] = least(2 * kept + 64, hits->capacity);
    return kept > hits->capacity - hits->capacity / 8;
}

/* The least product, before it is scaled, whose upper bound may reach the floor. */
static float least_reaching(const Hits *hits, const Panel *panel, int64_t lane, float slack) {
    float floor = hits->floor[lane];
    return (floor - slack - 1e-6f * (fabsf(floor) + slack)) / panel->scale[lane];
}

static int retrieve_block(const Tokens *tokens, const Panel *panel, int64_t at, int64_t rows, int64_t tile,
                          int32_t out[ROWS][2][LANES], const float *slack, float *least_product, Hits *hits, float *scratch) {
    float scaled[LANES];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t w = 0; w < 2 && tile + w < panel->tiles; w++) {
            int64_t first = (tile + w) * LANES;
            for (int lane = 0; lane < LANES; lane++) scaled[lane] = (float)out[r][w][lane] * tokens->scale[at + r];
            int mask = reaching(scaled, least_product + first);
            for (; mask; mask &= mask - 1) {
                int64_t offset = __builtin_ctz(mask), lane = first + offset;
                int64_t place = lane * hits->capacity + hits->filled[lane]++;
                float score = scaled[offset] * panel->scale[lane];
                hits->positions[place] = at + r;
                hits->lower[place] = score - slack[lane];
                hits->upper[place] = score + slack[lane];
                if (hits->filled[lane] < hits->next[lane]) continue;
                if (select_hits(hits, lane, scratch)) return 2;
                least_product[lane] = least_reaching(hits, panel, lane, slack[lane]);
            }
        }
    return 0;
}

static int retrieve_document(const Tokens *tokens, const Panel *panel, int64_t document, Hits *hits, float *slack,
                             float *least_product, uint8_t *tail, float *scratch) {
    int64_t width = panel->tiles * LANES, end = tokens->offsets[document + 1];
    const float *bounds = tokens->bounds + 2 * document;
    int32_t out[ROWS][2][LANES] = {0};
    for (int64_t lane = 0; lane < width; lane++) {
        slack[lane] = lane < panel->lanes ? panel->inner[lane] * bounds[0] + panel->outer[lane] * bounds[1] + TINY : 0;
        least_product[lane] = lane < panel->lanes ? least_reaching(hits, panel, lane, slack[lane]) : INFINITY;
    }
    for (int64_t tile = 0; tile < panel->tiles; tile += 2)
        for (int64_t at = tokens->offsets[document]; at < end; at += ROWS) {
            int64_t rows = least(ROWS, end - at);
            block(tokens, panel, at, rows, tile, tail, out);
            if (retrieve_block(tokens, panel, at, rows, tile, out, slack, least_product, hits, scratch)) return 2;
        }
    return 0;
}

/* For each lane a superset of the k tokens of greatest product among those of the documents (ascending). Returns 0, 1 when there
 * is no memory, 2 when a lane has more candidates than there is room for. */
EXPORT int openembed_tokens_retrieve(const Tokens *tokens, const Panel *panel, const int64_t *documents, int64_t count,
                                     Hits *hits) {
    int64_t width = panel->tiles * LANES;
    float *scratch = malloc(hits->capacity * sizeof(float) + 1), *slack = calloc(2 * width + 1, sizeof(float));
    uint8_t *tail = calloc(ROWS, tokens->stride + 1);
    int failed = !scratch || !slack || !tail;
    for (int64_t i = 0; i < count && !failed; i++)
        failed = retrieve_document(tokens, panel, documents[i], hits, slack, slack + width, tail, scratch);
    for (int64_t lane = 0; lane < panel->lanes && !failed; lane++) select_hits(hits, lane, scratch);
    free(scratch);
    free(slack);
    free(tail);
    return failed;
}

/* Dot products of lane ``lanes[i]`` with token ``positions[i]``, summed in float64, rounded to float32. Returns 0, or 1. */
EXPORT int openembed_tokens_products(const Tokens *tokens, const Panel *panel, const int64_t *lanes, const int64_t *positions,
                                     int64_t count, float *scores) {
    int64_t padded = (tokens->width + LANES - 1) / LANES * LANES;
    float *value = calloc(padded + 1, sizeof(float));
    if (!value) return 1;
    for (int64_t i = 0; i < count; i++) {
        token_floats(tokens, positions[i], value);
        scores[i] = (float)exact_dot(panel->values + lanes[i] * padded, value, padded);
    }
    free(value);
    return 0;
}

/* Codes rows (count, width) of float32: bytes (count, stride), scales, and float64 error and norm of each. Returns 0, or 1. */
EXPORT int openembed_tokens_code(const float *values, int64_t count, int64_t width, int64_t stride, uint8_t *codes, float *scale,
                                 double *error, double *norm) {
    int64_t padded = (width + LANES - 1) / LANES * LANES;
    float *value = calloc(padded + 1, sizeof(float));
    int8_t *whole = malloc(padded + 1);
    for (int64_t row = 0; row < count && value && whole; row++) {
        double squares = 0, lost = 0;
        memcpy(value, values + row * width, width * sizeof(float));
        scale[row] = code_one(value, padded, whole, &squares, &lost);
        error[row] = sqrt(lost);
        norm[row] = sqrt(squares);
        for (int64_t i = 0; i < stride; i++) codes[row * stride + i] = (uint8_t)((i < width ? whole[i] : 0) + 128);
    }
    int failed = !value || !whole;
    free(value);
    free(whole);
    return failed;
}

/* The centroid of greatest product plus bias for each of count rows (the lanes of the panel). Nearly the nearest one: products of
 * codes. */
EXPORT int openembed_tokens_assign(const Tokens *centroids, const float *bias, int64_t count, const Panel *panel,
                                   int32_t *nearest) {
    int64_t width = panel->tiles * LANES;
    float *best = malloc(width * sizeof(float) + 1);
    uint8_t *tail = calloc(ROWS, centroids->stride + 1);
    int32_t out[ROWS][2][LANES] = {0};
    if (!best || !tail) {
        free(best);
        free(tail);
        return 1;
    }
    lowest(best, width);
    for (int64_t tile = 0; tile < panel->tiles; tile += 2)
        for (int64_t at = 0; at < count; at += ROWS) {
            int64_t rows = least(ROWS, count - at);
            block(centroids, panel, at, rows, tile, tail, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t w = 0; w < 2 && tile + w < panel->tiles; w++) {
                    int64_t first = (tile + w) * LANES;
                    float scale = centroids->scale[at + r], shift = bias[at + r];
#if defined(__AVX512F__)
                    __m512 lanes = _mm512_mul_ps(_mm512_loadu_ps(panel->scale + first), _mm512_set1_ps(scale));
                    __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(out[r][w])), lanes, _mm512_set1_ps(shift));
                    __mmask16 more = _mm512_cmp_ps_mask(score, _mm512_loadu_ps(best + first), _CMP_GT_OQ);
                    _mm512_mask_storeu_ps(best + first, more, score);
                    _mm512_mask_storeu_epi32(nearest + first, more, _mm512_set1_epi32((int32_t)(at + r)));
#else
                    for (int lane = 0; lane < LANES; lane++) {
                        float score = (float)out[r][w][lane] * (scale * panel->scale[first + lane]) + shift;
                        if (score > best[first + lane]) best[first + lane] = score, nearest[first + lane] = (int32_t)(at + r);
                    }
#endif
                }
        }
    free(best);
    free(tail);
    return 0;
}
