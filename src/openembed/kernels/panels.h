/* What the kernels of token vectors share: the tokens of queries stand in the lanes, those of documents come row by row.
 *
 * A panel holds query tokens in tiles of 16 lanes. A block multiplies ROWS rows with two tiles (or one) at once, so the running
 * maximum of a document is a maximum of vectors and nothing is ever summed across lanes. Needs nothing; AVX-512 with VNNI makes
 * it fast.
 */
#pragma once

#include "coding.h"
#include <stdlib.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define UNROLLED _Pragma("GCC unroll 32")

enum { ROWS = 12 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
/* As assembler: through the intrinsic, gcc 12 copies and spills the accumulators. */
#define DOT(sum, row, query) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(query))
#define SIXTEEN __m512i, _mm512_loadu_si512, _mm512_storeu_si512,
#define EIGHT __m256i, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_castsi512_si256
/* WIDE whole tiles (0 or 1), then one of which LAST says how many lanes count: eight take half the time of sixteen, and the others
 * are left as they are. */
#define BYTES(NAME, WIDE, LAST) BYTES_OF(NAME, WIDE, LAST)
#define BYTES_OF(NAME, WIDE, VECTOR, LOAD, STORE, LOW)                                                                         \
    static void NAME(const uint8_t *rows, int64_t stride, const int32_t *panel, int64_t next, const int32_t *start,           \
                     int64_t steps, int32_t out[ROWS][2][LANES]) {                                                             \
        __m512i sums[ROWS];                                                                                                    \
        VECTOR last[ROWS];                                                                                                     \
        UNROLLED for (int r = 0; r < ROWS; r++) {                                                                              \
            if (WIDE) sums[r] = _mm512_loadu_si512(start);                                                                     \
            last[r] = LOAD((const void *)(start + WIDE * LANES));                                                              \
        }                                                                                                                      \
        const uint8_t *first = rows, *second = rows + 4 * stride, *third = rows + 8 * stride;                                  \
        int64_t thrice = 3 * stride;                                                                                           \
        for (int64_t step = 0; step < steps; step++, first += 4, second += 4, third += 4, panel += LANES) {                    \
            __m512i query;                                                                                                     \
            if (WIDE) query = _mm512_loadu_si512(panel);                                                                       \
            VECTOR end = LOAD((const void *)(panel + WIDE * next));                                                            \
            UNROLLED for (int r = 0; r < ROWS; r++) {                                                                          \
                const uint8_t *at = r < 4 ? first : r < 8 ? second : third;                                                    \
                at += r % 4 == 3 ? thrice : r % 4 * stride;                                                                    \
                __m512i row = _mm512_set1_epi32(*(const int32_t *)at);                                                         \
                if (WIDE) DOT(sums[r], row, query);                                                                            \
                VECTOR part = LOW(row);                                                                                        \
                DOT(last[r], part, end);                                                                                       \
            }                                                                                                                  \
        }                                                                                                                      \
        UNROLLED for (int r = 0; r < ROWS; r++) {                                                                              \
            if (WIDE) _mm512_storeu_si512(out[r][0], sums[r]);                                                                 \
            STORE((void *)out[r][WIDE], last[r]);                                                                              \
        }                                                                                                                      \
    }
#else
#define SIXTEEN 16
#define EIGHT 8
#define BYTES(NAME, WIDE, LAST)                                                                                                \
    static void NAME(const uint8_t *rows, int64_t stride, const int32_t *panel, int64_t next, const int32_t *start,           \
                     int64_t steps, int32_t out[ROWS][2][LANES]) {                                                             \
        for (int w = 0; w <= WIDE; w++)                                                                                        \
            for (int r = 0; r < ROWS; r++) {                                                                                   \
                int32_t *sums = out[r][w];                                                                                     \
                memcpy(sums, start + w * LANES, LANES * sizeof(int32_t));                                                      \
                for (int64_t step = 0; step < steps; step++) {                                                                 \
                    const uint8_t *d = rows + r * stride + step * 4;                                                           \
                    const int8_t *q = (const int8_t *)(panel + w * next + step * LANES);                                       \
                    for (int lane = 0; lane < (w == WIDE ? LAST : LANES); lane++, q += 4)                                      \
                        sums[lane] += d[0] * q[0] + d[1] * q[1] + d[2] * q[2] + d[3] * q[3];                                   \
                }                                                                                                              \
            }                                                                                                                  \
    }
#endif

#if defined(__AVX512F__)
#define FLOATS(NAME, WIDE)                                                                                                     \
    static void NAME(const float *rows, int64_t stride, const float *panel, int64_t next, int64_t width,                      \
                     float out[ROWS][2][LANES]) {                                                                              \
        __m512 sums[ROWS][WIDE];                                                                                               \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                                                \
            UNROLLED for (int w = 0; w < WIDE; w++) sums[r][w] = _mm512_setzero_ps();                                          \
        for (int64_t i = 0; i < width; i++, panel += LANES) {                                                                  \
            __m512 query[WIDE];                                                                                                \
            UNROLLED for (int w = 0; w < WIDE; w++) query[w] = _mm512_loadu_ps(panel + w * next);                              \
            UNROLLED for (int r = 0; r < ROWS; r++) {                                                                          \
                __m512 row = _mm512_set1_ps(rows[r * stride + i]);                                                             \
                UNROLLED for (int w = 0; w < WIDE; w++) sums[r][w] = _mm512_fmadd_ps(row, query[w], sums[r][w]);               \
            }                                                                                                                  \
        }                                                                                                                      \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                                                \
            UNROLLED for (int w = 0; w < WIDE; w++) _mm512_storeu_ps(out[r][w], sums[r][w]);                                   \
    }
#else
#define FLOATS(NAME, WIDE)                                                                                                     \
    static void NAME(const float *rows, int64_t stride, const float *panel, int64_t next, int64_t width,                      \
                     float out[ROWS][2][LANES]) {                                                                              \
        for (int w = 0; w < WIDE; w++)                                                                                         \
            for (int r = 0; r < ROWS; r++) {                                                                                   \
                memset(out[r][w], 0, LANES * sizeof(float));                                                                   \
                for (int64_t i = 0; i < width; i++)                                                                            \
                    for (int lane = 0; lane < LANES; lane++)                                                                   \
                        out[r][w][lane] += rows[r * stride + i] * panel[w * next + i * LANES + lane];                          \
            }                                                                                                                  \
    }
#endif

/* best = max(best, scale * value), lane by lane. */
static inline void raise_scaled(float best[LANES], const int32_t value[LANES], float scale) {
#if defined(__AVX512F__)
    __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(value)), _mm512_set1_ps(scale));
    _mm512_storeu_ps(best, _mm512_max_ps(_mm512_loadu_ps(best), scaled));
#else
    for (int lane = 0; lane < LANES; lane++) best[lane] = fmaxf(best[lane], scale * (float)value[lane]);
#endif
}

static inline void raise_to(float best[LANES], const float value[LANES]) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(best, _mm512_max_ps(_mm512_loadu_ps(best), _mm512_loadu_ps(value)));
#else
    for (int lane = 0; lane < LANES; lane++) best[lane] = fmaxf(best[lane], value[lane]);
#endif
}

static inline void raise_times(float best[LANES], const float value[LANES], float scale) {
#if defined(__AVX512F__)
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(scale));
    _mm512_storeu_ps(best, _mm512_max_ps(_mm512_loadu_ps(best), scaled));
#else
    for (int lane = 0; lane < LANES; lane++) best[lane] = fmaxf(best[lane], scale * value[lane]);
#endif
}

/* The lanes whose value is at least the threshold, one bit each. */
static inline int reaching(const float value[LANES], const float threshold[LANES]) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(value), _mm512_loadu_ps(threshold), _CMP_GE_OQ);
#else
    int mask = 0;
    for (int lane = 0; lane < LANES; lane++) mask |= (value[lane] >= threshold[lane]) << lane;
    return mask;
#endif
}
