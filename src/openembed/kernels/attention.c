/* Attention inside each of the texts of a packed stream: softmax(q k^T scale) v, in float32 or with bfloat16 products.
 *
 * Keys and values of one head are laid out once a text; then six queries at a time see all of them, so that a panel of
 * scores never leaves the cache. bfloat16 sums in float32 and keeps the softmax in float32.
 *
 * A "word" is what one lane multiplies at a step: one float32, or a pair of bfloat16.
 */
#include "common.h"

typedef struct {
    const float *qkv; /* (T, stride): H query heads, then G key heads, then G value heads, each d wide */
    int64_t stride;
    float *out; /* (T, H d) */
    const int32_t *offsets; /* (texts + 1) */
    int32_t texts, heads, groups, width;
    float scale;
    int32_t causal, half; /* half: bfloat16 products */
    const float *cos, *sin; /* (T, rotary), or NULL: rotary positions of the first `rotary` of d, halves rotated */
    int32_t rotary;
    const float *query_norm, *key_norm; /* (d) gains of root-mean-square norms before the positions, or NULL */
    float epsilon;
} Attention;

/* sums[r][c] of `rows` broadcast rows `a` with `cols` vectors of `b`, over `steps` words. */
INLINE void products(int rows, int cols, int half, const float *a, int64_t a_stride, const float *b, int64_t b_step,
                     int64_t b_vector, int steps, f32x16 sums[ROWS][4]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) sums[r][c] = _mm512_setzero_ps();
    for (int s = 0; s < steps; s++, b += b_step) {
        f32x16 columns[4];
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) columns[c] = _mm512_load_ps(b + c * b_vector);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x16 word = _mm512_set1_ps(a[r * a_stride + s]);
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++)
                sums[r][c] = half ? dot_pairs(sums[r][c], _mm512_castps_si512(word), _mm512_castps_si512(columns[c]))
                                  : _mm512_fmadd_ps(word, columns[c], sums[r][c]);
        }
    }
}

INLINE void store(int rows, int cols, f32x16 sums[ROWS][4], const float *factors, int add, float *out, int64_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        f32x16 factor = factors ? _mm512_set1_ps(factors[r]) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) {
            f32x16 before = add ? _mm512_loadu_ps(out + r * stride + 16 * c) : _mm512_setzero_ps();
            _mm512_storeu_ps(out + r * stride + 16 * c, _mm512_fmadd_ps(sums[r][c], factor, before));
        }
    }
}

#define TILE(R, C, H)                                                             \
    do {                                                                          \
        f32x16 sums[ROWS][4];                                                     \
        products(R, C, H, a, a_stride, b, b_step, b_vector, steps, sums);         \
        store(R, C, sums, factors, add, out, stride);                             \
        return;                                                                   \
    } while (0)
#define TILES(R, H)             \
    if (cols == 4) TILE(R, 4, H); \
    if (cols == 2) TILE(R, 2, H); \
    TILE(R, 1, H);
#define ALL_ROWS(H)                      \
    switch (rows) {                      \
    case 6: TILES(6, H) case 5: TILES(5, H) case 4: TILES(4, H) \
    case 3: TILES(3, H) case 2: TILES(2, H) default: TILES(1, H) \
    }

static void tile_f32(int rows, int cols, const float *a, int64_t a_stride, const float *b, int64_t b_step, int64_t b_vector,
                     int steps, const float *factors, int add, float *out, int64_t stride) {
    ALL_ROWS(0)
}

static void tile_half(int rows, int cols, const float *a, int64_t a_stride, const float *b, int64_t b_step, int64_t b_vector,
                      int steps, const float *factors, int add, float *out, int64_t stride) {
    ALL_ROWS(1)
}

#define SUMMED 512 /* steps between two roundings into `out`: one long sum would lose digits on long texts */

/* `rows` rows times all `vectors` vectors of b, times `factors`. */
static void product_rows(int half, int rows, int vectors, const float *a, int64_t a_stride, const float *b, int64_t b_step,
                         int64_t b_vector, int steps, const float *factors, float *out, int64_t stride) {
    for (int s = 0; s < steps; s += SUMMED)
        for (int v = 0; v < vectors;) {
            int cols = vectors - v >= 4 ? 4 : vectors - v >= 2 ? 2 : 1;
            (half ? tile_half : tile_f32)(rows, cols, a + s, a_stride, b + s * b_step + v * b_vector, b_step, b_vector,
                                          MIN(SUMMED, steps - s), factors, s > 0, out + 16 * v, stride);
            v += cols;
        }
}

/* d values times `factor` as words. */
INLINE void to_words(const float *restrict row, int d, float factor, int half, float *restrict words) {
    f32x16 factors = _mm512_set1_ps(factor);
    for (int k = 0; k < d; k += 16) {
        f32x16 x = _mm512_mul_ps(_mm512_loadu_ps(row + k), factors);
        if (half) store_half(words + k / 2, x);
        else _mm512_storeu_ps(words + k, x);
    }
}

/* One head's row of token t as words: normed, turned to its position, times `factor`. */
INLINE void prepare_row(const Attention *at, const float *restrict x, int64_t t, const float *restrict gain, float factor, float *restrict words) {
    int d = at->width, r = at->rotary, h = r / 2;
    float normed[d], turned[d];
    if (gain) {
        float squares = 0.0f;
        for (int k = 0; k < d; k++) squares += x[k] * x[k];
        float inverse = 1.0f / __builtin_sqrtf(squares / d + at->epsilon);
        for (int k = 0; k < d; k++) normed[k] = x[k] * inverse * gain[k];
        x = normed;
    }
    if (at->cos) {
        const float *restrict cosine = at->cos + t * r, *restrict sine = at->sin + t * r;
        for (int k = 0; k < h; k++) turned[k] = x[k] * cosine[k] - x[k + h] * sine[k];
        for (int k = 0; k < h; k++) turned[k + h] = x[k + h] * cosine[k + h] + x[k] * sine[k + h];
        for (int k = r; k < d; k++) turned[k] = x[k];
        x = turned;
    }
    to_words(x, d, factor, at->half, words);
}

/* Sixteen rows of up to sixteen words (row stride `stride`) to columns: out[word][row]. */
static void transpose(const float *rows, int64_t stride, int words, float *out) {
    __m512 a[16], b[16];
    __mmask16 mask = first_lanes(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_ps(mask, rows + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    /* a[4 g + j] holds column 4 q + j of rows 4 g .. 4 g + 3 in its quarter q */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
        __m512 low2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44), high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
        b[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
        b[4 + j] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        b[8 + j] = _mm512_shuffle_f32x4(high, high2, 0x88);
        b[12 + j] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < words; i++) _mm512_store_ps(out + 16 * i, b[i]);
}

/* Where the heads of one text lie, each ready for its products. */
typedef struct {
    float *queries; /* (H, padded, words) */
    float *keys;    /* (G, padded / 16, words, 16) */
    float *values;  /* (G, steps, d): a bfloat16 word holds two tokens; zeros past the last */
    int words, padded;
} Heads;

/* Values of one head and 16 tokens. */
INLINE void lay_values(const Attention *at, const float *x, int count, float *values) {
    int d = at->width, each = at->half ? 2 : 1;
    const i32x16 interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                               20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < 16; i += each, values += d)
        for (int k = 0; k < d; k += 16) {
            f32x16 one = i < count ? _mm512_loadu_ps(x + i * at->stride + k) : _mm512_setzero_ps();
            if (!at->half) {
                _mm512_store_ps(values + k, one);
                continue;
            }
            f32x16 two = i + 1 < count ? _mm512_loadu_ps(x + (i + 1) * at->stride + k) : _mm512_setzero_ps();
            _mm512_store_si512(values + k, _mm512_permutexvar_epi16(interleave, to_pairs(one, two)));
        }
}

/* All heads of a text, 16 tokens at a time: their rows of qkv are read once, one after another. */
static void lay_heads(const Attention *at, int64_t first, int n, Heads *to) {
    int d = at->width, words = to->words, steps = at->half ? to->padded / 2 : to->padded, some = at->half ? 8 : 16;
    float factor = at->scale * 1.44269504f, rows[16 * words];
    memset(rows, 0, sizeof rows);
    for (int t = 0; t < n; t += 16) {
        const float *x = at->qkv + (first + t) * at->stride;
        int count = MIN(16, n - t);
        for (int h = 0; h < at->heads; h++)
            for (int i = 0; i < count; i++)
                prepare_row(at, x + i * at->stride + h * d, first + t + i, at->query_norm, factor,
                            to->queries + ((int64_t)h * to->padded + t + i) * words);
        for (int g = 0; g < at->groups; g++) {
            float *keys = to->keys + ((int64_t)g * to->padded + t) * words;
            for (int i = 0; i < count; i++)
                prepare_row(at, x + i * at->stride + (at->heads + g) * d, first + t + i, at->key_norm, 1.0f, rows + i * words);
            for (int w = 0; w < words; w += 16) transpose(rows + w, words, MIN(16, words - w), keys + 16 * w);
            lay_values(at, x + (at->heads + at->groups + g) * d, count, to->values + ((int64_t)g * steps + t / 16 * some) * d);
        }
    }
}

/* exp2(scores - their maximum) over the first `visible` of `padded` scores, as words; returns one over their sum. */
INLINE float softmax_row(const float *scores, int visible, int padded, int half, float *words) {
    f32x16 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int k = 0; k < visible; k += 16)
        top = _mm512_mask_max_ps(top, first_lanes(visible - k), top, _mm512_loadu_ps(scores + k));
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int k = 0; k < padded; k += 16) {
        f32x16 value = _mm512_setzero_ps();
        if (k < visible) value = _mm512_maskz_mov_ps(first_lanes(visible - k), exp2_f32(_mm512_sub_ps(_mm512_loadu_ps(scores + k), top), half));
        sum = _mm512_add_ps(sum, value);
        if (half) store_half(words + k / 2, value);
        else _mm512_storeu_ps(words + k, value);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* One text; returns -1 without memory. */
static int one_text(const Attention *at, int64_t first, int n) {
    if (n <= 0) return 0;
    int d = at->width, half = at->half, words = half ? d / 2 : d, padded = (n + 15) / 16 * 16, steps = half ? padded / 2 : padded;
    Heads of = {.words = words, .padded = padded};
    of.queries = scratch(SCRATCH_QUERIES, sizeof(float) * at->heads * padded * words);
    of.keys = scratch(SCRATCH_KEYS, sizeof(float) * at->groups * padded * words);
    of.values = scratch(SCRATCH_VALUES, sizeof(float) * at->groups * steps * d);
    float *scores = scratch(SCRATCH_SCORES, sizeof(float) * 2 * ROWS * padded);
    if (!of.queries || !of.keys || !of.values || !scores) return -1;
    float *weights = scores + ROWS * padded, inverse[ROWS];
    int64_t out_stride = (int64_t)at->heads * d;
    lay_heads(at, first, n, &of);
    for (int h = 0; h < at->heads; h++) {
        int64_t g = h / (at->heads / at->groups);
        for (int q = 0; q < n; q += ROWS) {
            int rows = MIN(ROWS, n - q), last = at->causal ? q + rows : n, seen = (last + 15) / 16 * 16;
            product_rows(half, rows, seen / 16, of.queries + ((int64_t)h * padded + q) * words, words,
                         of.keys + g * padded * words, 16, 16 * words, words, NULL, scores, padded);
            for (int r = 0; r < rows; r++)
                inverse[r] = softmax_row(scores + r * padded, at->causal ? q + r + 1 : n, seen, half, weights + r * padded);
            product_rows(half, rows, d / 16, weights, padded, of.values + g * steps * d, d, 16, half ? seen / 2 : seen, inverse,
                         at->out + (first + q) * out_stride + h * d, out_stride);
        }
    }
    return 0;
}

/* Writes the attention of every text to at->out; d must be a multiple of 16. Returns 0, or -1 without memory. */
EXPORT int oe_attention(const Attention *at, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(|:failed) if (at->texts > 1)
    for (int i = 0; i < at->texts; i++) failed |= one_text(at, at->offsets[i], at->offsets[i + 1] - at->offsets[i]);
    return failed;
}

/* 1 where bfloat16 products were compiled in. */
EXPORT int oe_has_half(void) {
    return HAS_HALF;
}
