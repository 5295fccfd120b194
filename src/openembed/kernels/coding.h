/* What scans share: float16 as float32, the k-th greatest of some values, and, of int8 codes, the coding of a vector. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

/* A finite float16, exactly; without a branch, so that loops over it become vectors. */
static inline float from_half(uint16_t half) {
    union { uint32_t bits; float value; } wide = {(uint32_t)(half & 0x7fff) << 13};
    wide.value *= 0x1p112f;
    wide.bits |= (uint32_t)(half & 0x8000) << 16;
    return wide.value;
}

/* The k-th greatest of ``count`` values, which are put in another order. */
static inline float kth_greatest(float *values, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1;
    k -= 1;
    while (low < high) {
        float pivot = values[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i <= j) {
                float swap = values[i];
                values[i++] = values[j];
                values[j--] = swap;
            }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return values[k];
}

/* Codes one vector of ``padded`` components (a multiple of 16); returns its scale and the squares of norm and rest. */
static inline float code_one(const float *value, int64_t padded, int8_t *whole, double *squares, double *lost) {
    float most[LANES] = {0}, unit = 0;
    double square[LANES] = {0}, rest[LANES] = {0};
    for (int64_t i = 0; i < padded; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            most[lane] = fabsf(value[i + lane]) > most[lane] ? fabsf(value[i + lane]) : most[lane];
    for (int lane = 0; lane < LANES; lane++) unit = most[lane] > unit ? most[lane] : unit;
    unit /= 127;
    if (unit < 1.17549435e-38f) unit = 1;
    for (int64_t i = 0; i < padded; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float rounded = nearbyintf(value[i + lane] / unit);
            double off = (double)value[i + lane] - (double)rounded * unit;
            square[lane] += (double)value[i + lane] * value[i + lane];
            rest[lane] += off * off;
            whole[i + lane] = (int8_t)(int32_t)rounded;
        }
    for (int lane = 0; lane < LANES; lane++) *squares += square[lane], *lost += rest[lane];
    return unit;
}
