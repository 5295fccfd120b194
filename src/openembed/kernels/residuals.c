/* Token vectors as a centroid and a few bits a component: coding them, and scoring without or with their reconstruction.
 *
 * A token is c + w[bucket], one of 2^bits weights a component. Rows of buckets lie in the order of the centroids. With
 * F = 8 / bits fields a byte, byte j of a row holds components j, j + bytes, j + 2 bytes, ..., so 16 bytes give 16 neighbouring
 * components of each field and a shift is all that unpacking takes. ``weights`` has 16 entries, repeated for fewer bits: then
 * the neighbouring fields' bits do no harm.
 */
#include "panels.h"

FLOATS(floats_two, 2)
FLOATS(floats_one, 1)

typedef struct {
    const uint8_t *packed;    /* (tokens, bytes), in the order of the centroids */
    const int32_t *places;    /* (tokens): where in that order a token of the documents' order is */
    const int32_t *codes;     /* (tokens), in the order of the documents: its centroid */
    const int32_t *owners;    /* (tokens), in the order of the centroids: its document */
    const float *centroids;   /* (centroids, padded) */
    const float *weights;     /* (16) */
    const int64_t *offsets;   /* (documents + 1) */
    int64_t width;
    int64_t padded;           /* a multiple of 16 * fields */
    int64_t bits;
    int64_t unit;             /* reconstructed tokens are brought to length 1 */
} Residuals;

/* Buckets of rows (count, width) minus their centroids. */
EXPORT void openembed_residuals_pack(const float *values, const int32_t *codes, int64_t count, const Residuals *residuals,
                                     const float *cutoffs, uint8_t *packed) {
    int64_t width = residuals->width, padded = residuals->padded, bits = residuals->bits, bytes = padded * bits / 8;
    int cuts = (1 << bits) - 1;
    memset(packed, 0, count * bytes);
    for (int64_t row = 0; row < count; row++) {
        const float *value = values + row * width, *centroid = residuals->centroids + codes[row] * padded;
        uint8_t *to = packed + row * bytes;
        for (int64_t field = 0; field < 8 / bits; field++)
            for (int64_t j = 0; j < least(bytes, width - field * bytes); j++) {
                float rest = value[field * bytes + j] - centroid[field * bytes + j];
                int bucket = 0;
                for (int cut = 0; cut < cuts; cut++) bucket += cutoffs[cut] < rest;
                to[j] |= (uint8_t)(bucket << (field * bits));
            }
    }
}

#if defined(__AVX512F__)
static inline __m512 weights_of(const uint8_t *bytes, int shift, __m512 weights) {
    __m512i fields = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)bytes));
    return _mm512_permutexvar_ps(_mm512_srl_epi32(fields, _mm_cvtsi32_si128(shift)), weights);
}
#endif

/* What brings a vector to length 1. */
static float to_unit(const float *value, int64_t padded) {
#if defined(__AVX512F__)
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < padded; i += LANES) {
        __m512 part = _mm512_loadu_ps(value + i);
        sums[i / LANES & 1] = _mm512_fmadd_ps(part, part, sums[i / LANES & 1]);
    }
    float total = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
#else
    float total = 0;
    for (int64_t i = 0; i < padded; i++) total += value[i] * value[i];
#endif
    return 1 / sqrtf(total > 1e-24f ? total : 1e-24f);
}

/* Reconstructs one token, ``value`` having ``padded`` components; returns the factor by which these are still to be multiplied. */
static float reconstruct(const Residuals *residuals, int64_t place, int32_t code, float *value) {
    int64_t padded = residuals->padded, bits = residuals->bits, bytes = padded * bits / 8;
    const uint8_t *packed = residuals->packed + place * bytes;
    const float *centroid = residuals->centroids + code * padded;
#if defined(__AVX512F__)
    __m512 weights = _mm512_loadu_ps(residuals->weights);
    for (int64_t field = 0; field < 8 / bits; field++)
        for (int64_t j = 0; j < bytes; j += LANES) {
            __m512 sum = _mm512_add_ps(_mm512_loadu_ps(centroid + field * bytes + j),
                                       weights_of(packed + j, (int)(field * bits), weights));
            _mm512_storeu_ps(value + field * bytes + j, sum);
        }
#else
    for (int64_t field = 0; field < 8 / bits; field++)
        for (int64_t j = 0; j < bytes; j++)
            value[field * bytes + j] = centroid[field * bytes + j] + residuals->weights[packed[j] >> (field * bits) & 15];
#endif
    for (int64_t i = residuals->width; i < padded; i++) value[i] = 0;
    return residuals->unit ? to_unit(value, padded) : 1;
}

/* Reconstructs tokens of the documents' order, (count, padded). */
EXPORT void openembed_residuals_values(const Residuals *residuals, const int64_t *tokens, int64_t count, float *values) {
    for (int64_t i = 0; i < count; i++) {
        float *value = values + i * residuals->padded;
        float factor = reconstruct(residuals, residuals->places[tokens[i]], residuals->codes[tokens[i]], value);
        for (int64_t j = 0; j < residuals->padded; j++) value[j] *= factor;
    }
}

/* MaxSim of reconstructed documents with one query, ``panel`` (tiles, padded, 16) of ``lanes`` tokens. Returns 0, or 1 when there
 * is no memory. */
EXPORT int openembed_residuals_maxsim(const Residuals *residuals, const float *panel, int64_t lanes, const int64_t *documents,
                                      int64_t count, float *scores) {
    int64_t padded = residuals->padded, tiles = (lanes + LANES - 1) / LANES;
    float *rows = calloc(ROWS * padded + 1, sizeof(float)), *best = malloc((tiles + 1) * LANES * sizeof(float));
    float out[ROWS][2][LANES], factors[ROWS];
    int failed = !rows || !best;
    for (int64_t i = 0; i < count && !failed; i++) {
        int64_t start = residuals->offsets[documents[i]], end = residuals->offsets[documents[i] + 1];
        double total = 0;
        for (int64_t lane = 0; lane < tiles * LANES; lane++) best[lane] = -INFINITY;
        for (int64_t at = start; at < end; at += ROWS) {
            int64_t found = least(ROWS, end - at);
            for (int64_t r = 0; r < found; r++)
                factors[r] = reconstruct(residuals, residuals->places[at + r], residuals->codes[at + r], rows + r * padded);
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const float *from = panel + tile * padded * LANES;
                int64_t wide = tile + 1 < tiles ? 2 : 1;
                if (wide == 2) floats_two(rows, padded, from, padded * LANES, padded, out);
                else floats_one(rows, padded, from, padded * LANES, padded, out);
                for (int64_t r = 0; r < found; r++)
                    for (int64_t w = 0; w < wide; w++) raise_times(best + (tile + w) * LANES, out[r][w], factors[r]);
            }
        }
        for (int64_t lane = 0; lane < lanes; lane++) total += best[lane];
        scores[i] = (float)total;
    }
    free(rows);
    free(best);
    return failed;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define NEAR(NAME, WIDTH, VECTOR, LOAD, STORE, MAX, ZERO)                                                                     \
    static int32_t NAME(const int32_t *codes, int64_t count, const uint8_t *table, int64_t stride) {                          \
        VECTOR best[4] = {ZERO, ZERO, ZERO, ZERO};                                                                             \
        uint8_t lanes[WIDTH];                                                                                                  \
        int32_t total = 0;                                                                                                     \
        int64_t i = 0;                                                                                                         \
        for (; i + 4 <= count; i += 4)                                                                                         \
            UNROLLED for (int j = 0; j < 4; j++)                                                                               \
                best[j] = MAX(best[j], LOAD((const void *)(table + (int64_t)codes[i + j] * stride)));                          \
        for (; i < count; i++) best[0] = MAX(best[0], LOAD((const void *)(table + (int64_t)codes[i] * stride)));               \
        STORE((void *)lanes, MAX(MAX(best[0], best[1]), MAX(best[2], best[3])));                                               \
        for (int lane = 0; lane < WIDTH; lane++) total += lanes[lane];                                                         \
        return total;                                                                                                          \
    }
NEAR(near_16, 16, __m128i, _mm_loadu_si128, _mm_storeu_si128, _mm_max_epu8, _mm_setzero_si128())
NEAR(near_32, 32, __m256i, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_max_epu8, _mm256_setzero_si256())
NEAR(near_64, 64, __m512i, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_max_epu8, _mm512_setzero_si512())
#else
#define NEAR(NAME, WIDTH)                                                                                                      \
    static int32_t NAME(const int32_t *codes, int64_t count, const uint8_t *table, int64_t stride) {                          \
        uint8_t best[WIDTH] = {0};                                                                                             \
        int32_t total = 0;                                                                                                     \
        for (int64_t i = 0; i < count; i++) {                                                                                  \
            const uint8_t *row = table + codes[i] * stride;                                                                    \
            for (int lane = 0; lane < WIDTH; lane++) best[lane] = row[lane] > best[lane] ? row[lane] : best[lane];             \
        }                                                                                                                      \
        for (int lane = 0; lane < WIDTH; lane++) total += best[lane];                                                          \
        return total;                                                                                                          \
    }
NEAR(near_16, 16)
NEAR(near_32, 32)
NEAR(near_64, 64)
#endif

/* MaxSim of documents as if their tokens were their centroids: ``table`` (centroids, stride) has the products as bytes; stride is
 * 16, 32 or a multiple of 64. -1 for a document of no tokens. */
EXPORT void openembed_residuals_near(const Residuals *residuals, const uint8_t *table, int64_t stride, const int64_t *documents,
                                     int64_t count, int32_t *scores) {
    for (int64_t i = 0; i < count; i++) {
        int64_t start = residuals->offsets[documents[i]], length = residuals->offsets[documents[i] + 1] - start;
        const int32_t *codes = residuals->codes + start;
        scores[i] = length ? 0 : -1;
        if (!length) continue;
        if (stride == 16) scores[i] = near_16(codes, length, table, stride);
        else if (stride == 32) scores[i] = near_32(codes, length, table, stride);
        else
            for (int64_t first = 0; first < stride; first += 64) scores[i] += near_64(codes, length, table + first, stride);
    }
}

/* The product of a query token with the residual at a place. */
static float residual_dot(const Residuals *residuals, int64_t place, const float *query) {
    int64_t bits = residuals->bits, bytes = residuals->padded * bits / 8;
    const uint8_t *packed = residuals->packed + place * bytes;
#if defined(__AVX512F__)
    __m512 weights = _mm512_loadu_ps(residuals->weights), sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < bytes; j += LANES)
        for (int64_t field = 0; field < 8 / bits; field++) {
            __m512 values = weights_of(packed + j, (int)(field * bits), weights);
            sums[field & 1] = _mm512_fmadd_ps(_mm512_loadu_ps(query + field * bytes + j), values, sums[field & 1]);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
#else
    float total = 0;
    for (int64_t field = 0; field < 8 / bits; field++)
        for (int64_t j = 0; j < bytes; j++)
            total += query[field * bytes + j] * residuals->weights[packed[j] >> (field * bits) & 15];
    return total;
#endif
}

/* Products of one query token with the eligible tokens of probed runs (probes, 2); ``near`` has the centroids'. Returns how many;
 * ``places`` and ``scores`` have room for all. */
EXPORT int64_t openembed_residuals_dots(const Residuals *residuals, const float *query, const int64_t *runs, const float *near,
                                        int64_t probes, const uint8_t *eligible, int64_t *places, float *scores) {
    int64_t found = 0;
    for (int64_t probe = 0; probe < probes; probe++)
        for (int64_t place = runs[2 * probe]; place < runs[2 * probe + 1]; place++) {
            if (!eligible[residuals->owners[place]]) continue;
            places[found] = place;
            scores[found++] = near[probe] + residual_dot(residuals, place, query);
        }
    return found;
}

typedef struct {
    const float *values;  /* (tokens, padded), padding 0 */
    const int64_t *runs;  /* (tokens, probes, 2): places from and to of a probed centroid */
    const float *near;    /* (tokens, probes): its product */
    const float *missing; /* (tokens): what a document none of whose tokens was found counts as */
    int64_t tokens;
    int64_t probes;
} Probes;

typedef struct {
    const uint8_t *eligible; /* (documents) */
    float *total;            /* (documents), 0 at first: the sum over query tokens of what is found above ``missing`` */
    float *best;             /* (documents) */
    int32_t *stamp;          /* (documents), 0 at first */
    int32_t *found;          /* (documents): this query token's documents */
    int32_t *touched;        /* (documents): those of any query token */
} Tally;

/* Takes in a product of query token ``token`` with a token of document ``owner``. */
static inline void note(Tally *tally, int64_t token, int64_t owner, float score, int64_t *found, int64_t *touched) {
    if (tally->stamp[owner] == token + 1) {
        if (score > tally->best[owner]) tally->best[owner] = score;
        return;
    }
    if (!tally->stamp[owner]) tally->touched[(*touched)++] = (int32_t)owner;
    tally->stamp[owner] = (int32_t)token + 1;
    tally->best[owner] = score;
    tally->found[(*found)++] = (int32_t)owner;
}

static inline void settle(Tally *tally, int64_t found, float missing) {
    for (int64_t i = 0; i < found; i++) tally->total[tally->found[i]] += tally->best[tally->found[i]] - missing;
}

/* Sums, over the tokens of one query, the greatest product of each document found in the probed runs. Returns how many documents
 * were found. */
EXPORT int64_t openembed_residuals_runs(const Residuals *residuals, const Probes *probes, Tally *tally) {
    int64_t touched = 0;
    for (int64_t token = 0; token < probes->tokens; token++) {
        const float *query = probes->values + token * residuals->padded;
        int64_t found = 0;
        for (int64_t probe = token * probes->probes; probe < (token + 1) * probes->probes; probe++)
            for (int64_t place = probes->runs[2 * probe]; place < probes->runs[2 * probe + 1]; place++) {
                int32_t owner = residuals->owners[place];
                if (!tally->eligible[owner]) continue;
                note(tally, token, owner, probes->near[probe] + residual_dot(residuals, place, query), &found, &touched);
            }
        settle(tally, found, probes->missing[token]);
    }
    return touched;
}

/* As openembed_residuals_runs, of products at hand: those of query token i are ``starts[i]`` to ``starts[i + 1]``. */
EXPORT int64_t openembed_products_tally(const int64_t *documents, const float *products, const int64_t *starts, int64_t tokens,
                                        const float *missing, Tally *tally) {
    int64_t touched = 0;
    for (int64_t token = 0; token < tokens; token++) {
        int64_t found = 0;
        for (int64_t i = starts[token]; i < starts[token + 1]; i++)
            note(tally, token, documents[i], products[i], &found, &touched);
        settle(tally, found, missing[token]);
    }
    return touched;
}

typedef struct {
    int64_t repetitions;
    int64_t planes;
    int64_t inner; /* components of a cell */
    int64_t document; /* means, and empty cells take the nearest token; otherwise sums, and they stay empty */
} Cells;

/* One text's encoding from its projected tokens, (count, repetitions, planes + inner). ``cell``: room for count ids. */
static void encode_text(const float *projected, int64_t count, const Cells *cells, int32_t *cell, float *out) {
    int64_t row = cells->planes + cells->inner, stride = cells->repetitions * row, places = 1 << cells->planes;
    for (int64_t repetition = 0; repetition < cells->repetitions; repetition++) {
        const float *from = projected + repetition * row;
        float *to = out + repetition * places * cells->inner;
        for (int64_t i = 0; i < count; i++) {
            cell[i] = 0;
            for (int64_t plane = 0; plane < cells->planes; plane++) cell[i] |= (from[i * stride + plane] > 0) << plane;
            float *at = to + cell[i] * cells->inner;
            for (int64_t j = 0; j < cells->inner; j++) at[j] += from[i * stride + cells->planes + j];
        }
        for (int64_t place = 0; place < places && cells->document && count; place++) {
            int64_t inside = 0, nearest = 0;
            int closest = 64;
            for (int64_t i = 0; i < count; i++) {
                int apart = __builtin_popcount((unsigned)(cell[i] ^ place));
                inside += !apart;
                if (apart < closest) closest = apart, nearest = i;
            }
            float *at = to + place * cells->inner;
            const float *point = from + nearest * stride + cells->planes;
            for (int64_t j = 0; j < cells->inner; j++) at[j] = inside ? at[j] / (float)inside : point[j];
        }
    }
}

/* Fixed-dimensional encodings (texts, repetitions * 2^planes * inner), zero at first. Returns 0, or 1 when there is no memory. */
EXPORT int openembed_fixed_encodings(const float *projected, const int64_t *offsets, int64_t texts, const Cells *cells,
                                     float *out) {
    int64_t longest = 0, stride = cells->repetitions * (cells->planes + cells->inner);
    int64_t width = (cells->repetitions << cells->planes) * cells->inner;
    for (int64_t i = 0; i < texts; i++)
        if (offsets[i + 1] - offsets[i] > longest) longest = offsets[i + 1] - offsets[i];
    int32_t *cell = malloc((longest + 1) * sizeof(int32_t));
    if (!cell) return 1;
    for (int64_t i = 0; i < texts; i++)
        encode_text(projected + (offsets[i] - offsets[0]) * stride, offsets[i + 1] - offsets[i], cells, cell, out + i * width);
    free(cell);
    return 0;
}
