/* What all kernels share: vectors of 16 float32, elementary functions on them, scratch memory a thread keeps.
 *
 * Names: T tokens (rows), K inputs, N outputs of a linear layer, D width, d head width. Needs AVX-512 with VNNI; BF16 is
 * optional.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#define LANES 16
#define BLOCK 64 /* outputs a weight block holds: four vectors */
#define ROWS 6   /* rows a micro-kernel computes at once: 24 accumulators of the 32 registers */

typedef __m512 f32x16;
typedef __m512i i32x16;

/* sums += the products of four unsigned and four signed bytes a lane. As assembler: through the intrinsic, gcc 12 copies and
 * spills the accumulators at every step. */
INLINE i32x16 dot_bytes(i32x16 sums, i32x16 unsigned_bytes, i32x16 signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sums;
}

/* sums += the products of two bfloat16 pairs a lane. */
#ifdef __AVX512BF16__
#define HAS_HALF 1
INLINE f32x16 dot_pairs(f32x16 sums, i32x16 a, i32x16 b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}

INLINE i32x16 to_pairs(f32x16 low, f32x16 high) {
    return (i32x16)_mm512_cvtne2ps_pbh(high, low);
}
#else
#define HAS_HALF 0 /* then `half` is never asked for */
INLINE f32x16 dot_pairs(f32x16 sums, i32x16 a, i32x16 b) {
    (void)a, (void)b;
    return sums;
}

INLINE i32x16 to_pairs(f32x16 low, f32x16 high) {
    (void)low, (void)high;
    return _mm512_setzero_si512();
}
#endif

/* 16 float32 as bfloat16, 32 bytes. */
INLINE void store_half(float *words, f32x16 x) {
    _mm256_storeu_si256((__m256i *)words, _mm512_castsi512_si256(to_pairs(x, x)));
}

INLINE __mmask16 first_lanes(int count) {
    return (__mmask16)(count >= LANES ? 0xffff : (1u << count) - 1);
}

/* 2^x for x <= 127; relative error below 2e-7, `rough` below 5e-5. Taylor coefficients ln(2)^n / n!. */
INLINE f32x16 exp2_f32(f32x16 x, int rough) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* in this order NaN stays */
    f32x16 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32x16 part = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(9.6181291e-3f);
    if (!rough) {
        sum = _mm512_fmadd_ps(_mm512_set1_ps(1.5403530e-4f), part, _mm512_set1_ps(1.3333558e-3f));
        sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
    }
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

INLINE f32x16 exp_f32(f32x16 x, int rough) {
    return exp2_f32(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), rough);
}

/* 1 / x; `rough` to 14 bits. */
INLINE f32x16 inverse_f32(f32x16 x, int rough) {
    return rough ? _mm512_rcp14_ps(x) : _mm512_div_ps(_mm512_set1_ps(1.0f), x);
}

/* x * sigmoid(y) */
INLINE f32x16 times_sigmoid(f32x16 x, f32x16 y, int rough) {
    f32x16 minus = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), y), _mm512_set1_ps(80.0f));
    return _mm512_mul_ps(x, inverse_f32(_mm512_add_ps(_mm512_set1_ps(1.0f), exp_f32(minus, rough)), rough));
}

/* x * (1 + erf(x / sqrt 2)) / 2, erf after Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7), `rough` 7.1.25 (2.5e-5). */
INLINE f32x16 gelu_f32(f32x16 x, int rough) {
    f32x16 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), t, sum;
    if (rough) {
        t = inverse_f32(_mm512_fmadd_ps(size, _mm512_set1_ps(0.47047f), one), 1);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(0.7478556f), t, _mm512_set1_ps(-0.0958798f));
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.3480242f));
    } else {
        t = inverse_f32(_mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one), 0);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(1.061405429f), t, _mm512_set1_ps(-1.453152027f));
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    }
    f32x16 tail = exp_f32(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(size, size)), rough);
    f32x16 erf_size = _mm512_fnmadd_ps(_mm512_mul_ps(sum, t), tail, one), half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(_mm512_abs_ps(half), erf_size, half); /* half + |half| erf|x| = half (1 + erf x) */
}

/* x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 = x * sigmoid(2 * ...) */
INLINE f32x16 gelu_tanh_f32(f32x16 x, int rough) {
    f32x16 cube = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(0.044715f), _mm512_mul_ps(x, x)), x, x);
    return times_sigmoid(x, _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), cube), rough);
}

enum activation { ACT_NONE = 0, ACT_GELU = 1, ACT_GELU_TANH = 2, ACT_SILU = 3, ACT_RELU = 4 };

/* `rough` where the result becomes an 8-bit code. */
INLINE f32x16 activate(f32x16 x, int activation, int rough) {
    switch (activation) {
    case ACT_GELU: return gelu_f32(x, rough);
    case ACT_GELU_TANH: return gelu_tanh_f32(x, rough);
    case ACT_SILU: return times_sigmoid(x, x, rough);
    case ACT_RELU: return _mm512_max_ps(_mm512_setzero_ps(), x);
    default: return x;
    }
}

/* At least `bytes` of memory, 64-byte aligned, kept by this thread under `slot`; NULL when there is none. */
void *scratch(int slot, size_t bytes);
enum scratch_slot { SCRATCH_ROWS, SCRATCH_KEYS, SCRATCH_VALUES, SCRATCH_QUERIES, SCRATCH_SCORES, SCRATCH_SLOTS };
