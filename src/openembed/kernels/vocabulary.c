/* Largest product of each text's states with each row of a vocabulary matrix, and its gradients; products are never stored.
 *
 * S (T, K) states of all texts end to end, W (V, K) the vocabulary, offsets (B + 1) of the texts, best and winner (B, V).
 */
#include "common.h"

#define TILE 16 /* vocabulary entries a vector holds */

/* 64 rows of W as (K, 64), zeros past `count`. */
static void pack_rows(const float *W, int64_t K, int count, float *packed) {
    for (int r = 0; r < BLOCK; r += TILE)
        for (int64_t k = 0; k < K; k++)
            for (int i = 0; i < TILE; i++) packed[k * BLOCK + r + i] = r + i < count ? W[(r + i) * K + k] : 0.0f;
}

typedef struct {
    f32x16 best[4];
    i32x16 winner[4];
} Running;

/* Takes products into the running maximum; the first of equal ones stays, and NaN stays for good. */
INLINE void keep_largest(int rows, f32x16 sums[ROWS][4], int token, Running *running) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            f32x16 old = running->best[c];
            __mmask16 more = _mm512_cmp_ps_mask(sums[r][c], old, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(old, old, _CMP_ORD_Q);
            running->best[c] = _mm512_mask_mov_ps(old, more, sums[r][c]);
            running->winner[c] = _mm512_mask_mov_epi32(running->winner[c], more, _mm512_set1_epi32(token + r));
        }
}

/* Takes the products of `rows` <= 6 states. */
INLINE void take(int rows, const float *S, int64_t K, const float *packed, int token, Running *running) {
    f32x16 sums[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k++, packed += BLOCK) {
        f32x16 w0 = _mm512_load_ps(packed), w1 = _mm512_load_ps(packed + 16);
        f32x16 w2 = _mm512_load_ps(packed + 32), w3 = _mm512_load_ps(packed + 48);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x16 broadcast = _mm512_set1_ps(S[r * K + k]);
            sums[r][0] = _mm512_fmadd_ps(broadcast, w0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(broadcast, w1, sums[r][1]);
            sums[r][2] = _mm512_fmadd_ps(broadcast, w2, sums[r][2]);
            sums[r][3] = _mm512_fmadd_ps(broadcast, w3, sums[r][3]);
        }
    }
    keep_largest(rows, sums, token, running);
}

/* The same of bfloat16: a word of S and of `packed` is the pair of entries 2k and 2k + 1. */
INLINE void take_pairs(int rows, const int32_t *S, int64_t K, const int32_t *packed, int token, Running *running) {
    f32x16 sums[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k++, packed += BLOCK) {
        i32x16 w0 = _mm512_load_si512(packed), w1 = _mm512_load_si512(packed + 16);
        i32x16 w2 = _mm512_load_si512(packed + 32), w3 = _mm512_load_si512(packed + 48);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            i32x16 broadcast = _mm512_set1_epi32(S[r * K + k]);
            sums[r][0] = dot_pairs(sums[r][0], broadcast, w0);
            sums[r][1] = dot_pairs(sums[r][1], broadcast, w1);
            sums[r][2] = dot_pairs(sums[r][2], broadcast, w2);
            sums[r][3] = dot_pairs(sums[r][3], broadcast, w3);
        }
    }
    keep_largest(rows, sums, token, running);
}

#define CASE(n) case n: half ? take_pairs(n, S, K, packed, token, running) : take(n, S, K, packed, token, running); break

static void take_rows(int half, int rows, const void *S, int64_t K, const void *packed, int token, Running *running) {
    switch (rows) { CASE(6); CASE(5); CASE(4); CASE(3); CASE(2); CASE(1); }
}

/* K float32 as words of bfloat16 pairs; an odd last one is paired with 0. */
INLINE void pair_row(const float *x, int64_t K, int32_t *words) {
    for (int64_t k = 0; k < K; k += 2 * LANES) {
        f32x16 low = _mm512_maskz_loadu_ps(first_lanes((int)MIN(LANES, K - k)), x + k), high = _mm512_setzero_ps();
        if (K - k > LANES) high = _mm512_maskz_loadu_ps(first_lanes((int)MIN(LANES, K - k - LANES)), x + k + LANES);
        _mm512_mask_storeu_epi32(words + k / 2, first_lanes((int)MIN(LANES, (K - k + 1) / 2)), to_pairs(low, high));
    }
}

/* 64 rows of W as (pairs, 64), zeros past `count`; `row`: space for the pairs of one. */
static void pack_pairs(const float *W, int64_t K, int count, int32_t *row, int32_t *packed) {
    int64_t pairs = (K + 1) / 2;
    for (int r = 0; r < BLOCK; r++) {
        if (r < count) pair_row(W + r * K, K, row);
        for (int64_t k = 0; k < pairs; k++) packed[k * BLOCK + r] = r < count ? row[k] : 0;
    }
}

static void pack(const float *W, int64_t K, int count, int half, int32_t *row, int32_t *packed) {
    if (half) pack_pairs(W, K, count, row, packed);
    else pack_rows(W, K, count, (float *)packed);
}

/* W as oe_largest_products reads it: ceil(V / 64) blocks of 64 x words, aligned to 64 bytes. Returns 0, or -1 without memory. */
EXPORT int oe_pack_vocabulary(const float *W, int64_t V, int64_t K, int half, int32_t *packed, int threads) {
    int failed = 0;
    int64_t words = half ? (K + 1) / 2 : K;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|:failed)
    for (int64_t v = 0; v < V; v += BLOCK) {
        int32_t *row = scratch(SCRATCH_ROWS, sizeof(int32_t) * words);
        if (row) pack(W + v * K, K, (int)MIN(BLOCK, V - v), half, row, packed + v * words);
        else failed = 1;
    }
    return -failed;
}

/* best = the largest product, -infinity for a text without tokens; winner = its token, 0 there; NULL leaves it out.
 * half: products of S and W rounded to bfloat16, summed in float32. ready: W packed with the same half, or NULL; then W is packed
 * on the way. Returns 0, or -1 without memory. */
EXPORT int oe_largest_products(const float *S, const float *W, const int64_t *offsets, int64_t B, int64_t V, int64_t K, float *best, int32_t *winner, int half, const int32_t *ready, int threads) {
    int failed = 0;
    int64_t words = half ? (K + 1) / 2 : K; /* of a row, 4 bytes each */
    int32_t *paired = half ? malloc(sizeof(int32_t) * MAX(1, offsets[B] * words)) : NULL;
    if (half && !paired) return -1;
    if (half)
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < offsets[B]; t++) pair_row(S + t * K, K, paired + t * words);
    const char *states = half ? (const char *)paired : (const char *)S;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) reduction(|:failed)
    for (int64_t v = 0; v < V; v += BLOCK) {
        int32_t *space = ready ? NULL : scratch(SCRATCH_ROWS, sizeof(int32_t) * (BLOCK + 1) * words);
        if (!ready && !space) {
            failed = 1;
            continue;
        }
        int count = (int)MIN(BLOCK, V - v);
        if (space) pack(W + v * K, K, count, half, space + BLOCK * words, space);
        const int32_t *packed = ready ? ready + v * words : space;
        for (int64_t b = 0; b < B; b++) {
            Running running;
            for (int c = 0; c < 4; c++) running.best[c] = _mm512_set1_ps(-__builtin_inff()), running.winner[c] = _mm512_setzero_si512();
            for (int64_t t = offsets[b]; t < offsets[b + 1]; t += ROWS)
                take_rows(half, (int)MIN(ROWS, offsets[b + 1] - t), states + 4 * t * words, words, packed, (int)t, &running);
            for (int c = 0; c < 4 && 16 * c < count; c++) {
                __mmask16 mask = first_lanes(count - 16 * c);
                _mm512_mask_storeu_ps(best + b * V + v + 16 * c, mask, running.best[c]);
                if (winner) _mm512_mask_storeu_epi32(winner + b * V + v + 16 * c, mask, running.winner[c]);
            }
        }
    }
    free(paired);
    return -failed;
}

/* y += a x */
INLINE void add_scaled(float a, const float *x, int64_t K, float *y) {
    f32x16 factor = _mm512_set1_ps(a);
    for (int64_t k = 0; k < K; k += LANES) {
        __mmask16 mask = first_lanes((int)MIN(LANES, K - k));
        _mm512_mask_storeu_ps(y + k, mask, _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask, x + k), _mm512_maskz_loadu_ps(mask, y + k)));
    }
}

/* Gradients of S and W, either may be NULL, both given as zeros, from that of best (B, V). Each text owns its states and each
 * entry its row of W, so that sums do not depend on the number of threads. */
EXPORT void oe_largest_products_backward(const float *grad, const int32_t *winner, const float *S, const float *W, const int64_t *offsets, int64_t B, int64_t V, int64_t K, float *for_S, float *for_W, int threads) {
    if (for_W)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
        for (int64_t v = 0; v < V; v += TILE)
            for (int64_t b = 0; b < B; b++)
                for (int64_t i = offsets[b + 1] > offsets[b] ? b * V + v : INT64_MAX; i < b * V + MIN(V, v + TILE); i++)
                    if (grad[i] != 0.0f) add_scaled(grad[i], S + winner[i] * K, K, for_W + (i - b * V) * K);
    if (for_S)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t b = 0; b < B; b++)
            if (offsets[b + 1] > offsets[b])
                for (int64_t i = b * V; i < (b + 1) * V; i++)
                    if (grad[i] != 0.0f) add_scaled(grad[i], W + (i - b * V) * K, K, for_S + winner[i] * K);
}
