/* Operations on whole rows that linear layers end with: norms, and quantisation to 8 bits.
 *
 * A row x is stored as u8 codes with one scale and one zero point: x ~ scale * (code - zero). The range always holds 0, so
 * zero is exact and is an integer in 0..255.
 */
#pragma once

#include "common.h"

typedef struct {
    uint8_t *codes; /* (T, stride) */
    float *scale;   /* (T) */
    int32_t *zero;  /* (T) */
    int64_t stride;
    const float *factors; /* (K): x is multiplied by these first, and the weights were divided by them; or NULL */
} Codes;

/* 16 values of a row, each times its factor where there are factors. */
INLINE f32x16 scaled(const float *x, const float *factors, int k, __mmask16 mask) {
    f32x16 values = _mm512_maskz_loadu_ps(mask, x + k);
    return factors ? _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, factors + k)) : values;
}

INLINE void quantize_row(const float *x, const float *factors, int K, uint8_t *codes, float *scale, int32_t *zero) {
    f32x16 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    __mmask16 broken = 0;
    int k;
    for (k = 0; k < K; k += LANES) {
        f32x16 values = scaled(x, factors, k, first_lanes(K - k));
        broken |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        low = _mm512_min_ps(low, values);
        high = _mm512_max_ps(high, values);
    }
    float lowest = _mm512_reduce_min_ps(low), highest = _mm512_reduce_max_ps(high);
    float step = (highest - lowest) / 255.0f;
    if (broken || !(step < __builtin_inff())) { /* NaN or infinity must not become a number */
        memset(codes, 0, K);
        *scale = __builtin_nanf(""), *zero = 0;
        return;
    }
    if (!(step > 1e-30f)) step = 1.0f;
    f32x16 inverse = _mm512_set1_ps(1.0f / step);
    int32_t origin = (int32_t)(-lowest / step + 0.5f);
    i32x16 shift = _mm512_set1_epi32(origin);
    i32x16 floor = _mm512_setzero_si512();
    for (k = 0; k < K; k += LANES) {
        __mmask16 mask = first_lanes(K - k);
        i32x16 code = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(scaled(x, factors, k, mask), inverse)), shift);
        _mm_mask_storeu_epi8(codes + k, mask, _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, floor)));
    }
    *scale = step;
    *zero = origin;
}

/* out = (x - mean) / sqrt(variance + epsilon) * gain + bias; bias NULL and centred 0: the root-mean-square norm. */
INLINE void norm_row(const float *x, int D, const float *gain, const float *bias, float epsilon, int centred, float *out) {
    f32x16 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    float mean = 0.0f;
    if (centred) {
        for (int k = 0; k < D; k += LANES) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(D - k), x + k));
        mean = _mm512_reduce_add_ps(sum) / D;
    }
    f32x16 middle = _mm512_set1_ps(mean);
    for (int k = 0; k < D; k += LANES) {
        __mmask16 mask = first_lanes(D - k);
        f32x16 away = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + k), middle);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    float deviation = _mm512_reduce_add_ps(squares) / D + epsilon;
    f32x16 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(deviation));
    for (int k = 0; k < D; k += LANES) {
        __mmask16 mask = first_lanes(D - k);
        f32x16 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + k), middle), inverse);
        value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, gain + k));
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + k));
        _mm512_mask_storeu_ps(out + k, mask, value);
    }
}
