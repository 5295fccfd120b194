/* Linear layers y = x W^T + b over rows of tokens, in exact float32 or from 8-bit codes, with what follows them fused in.
 *
 * Weights are packed in blocks of 64 outputs. int8: (N/64, K/4, 64, 4) signed codes, one scale an output; products are
 * summed in int32 by VNNI (no saturation for K < 66,000), then y = sx (sum - zx colsum) sw + b. float32: (N/64, K, 64).
 */
#include "rows.h"

typedef struct {
    const void *weights;
    const float *scale;    /* (N) int8 only */
    const int32_t *colsum; /* (N) int8 only: sum of the codes of each output */
    const float *bias;     /* (N), or NULL */
    int32_t K, N;          /* N of the packed weights: a multiple of 64 */
} Linear;

typedef struct {
    const float *values; /* float32 layers */
    Codes codes;         /* int8 layers */
    int64_t stride;      /* of values */
} Input;

/* What happens to each finished row. */
enum ending {
    END_STORE = 0,   /* y */
    END_CODES = 1,   /* codes of y */
    END_ADD_NORM = 2 /* residual += y; then norm(residual), as codes and / or float32; post-norm: residual = the norm */
};

typedef struct {
    int32_t activation; /* of y */
    int32_t gated;      /* 1: each block is 32 gates and 32 values, y = activation(gate) * value, N / 2 outputs */
    int32_t ending;
    int32_t centred, post_norm;
    float epsilon;
    float *out;      /* END_STORE: y, (T, stride >= N); END_ADD_NORM: the norm in float32, or NULL */
    int64_t stride;  /* of out */
    float *residual; /* END_ADD_NORM: (T, N), read and written */
    const float *gain, *bias;
    Codes codes, also; /* `also`: END_ADD_NORM, the same rows under other factors, or empty */
    int32_t outputs;   /* true number of outputs of a row */
} Ending;

INLINE void multiply_int8(int rows, const uint8_t *x, int64_t stride, const int8_t *w, int K, i32x16 sums[ROWS][4]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_si512();
    for (int k = 0; k < K; k += 4, w += 4 * BLOCK) {
        i32x16 w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        i32x16 w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + k, 4);
            i32x16 broadcast = _mm512_set1_epi32(four);
            sums[r][0] = dot_bytes(sums[r][0], broadcast, w0);
            sums[r][1] = dot_bytes(sums[r][1], broadcast, w1);
            sums[r][2] = dot_bytes(sums[r][2], broadcast, w2);
            sums[r][3] = dot_bytes(sums[r][3], broadcast, w3);
        }
    }
}

INLINE void multiply_f32(int rows, const float *x, int64_t stride, const float *w, int K, f32x16 sums[ROWS][4]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
    for (int k = 0; k < K; k++, w += BLOCK) {
        f32x16 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 16), w2 = _mm512_load_ps(w + 32), w3 = _mm512_load_ps(w + 48);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x16 broadcast = _mm512_set1_ps(x[r * stride + k]);
            sums[r][0] = _mm512_fmadd_ps(broadcast, w0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(broadcast, w1, sums[r][1]);
            sums[r][2] = _mm512_fmadd_ps(broadcast, w2, sums[r][2]);
            sums[r][3] = _mm512_fmadd_ps(broadcast, w3, sums[r][3]);
        }
    }
}

/* Writes y of `rows` rows and one block of outputs. */
INLINE void finish(int rows, f32x16 y[ROWS][4], int activation, int gated, int rough, float *out, int64_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        float *row = out + r * stride;
        if (gated) {
            _mm512_storeu_ps(row, _mm512_mul_ps(activate(y[r][0], activation, rough), y[r][2]));
            _mm512_storeu_ps(row + 16, _mm512_mul_ps(activate(y[r][1], activation, rough), y[r][3]));
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) _mm512_storeu_ps(row + 16 * c, activate(y[r][c], activation, rough));
        }
    }
}

INLINE void tile_int8(int rows, const Linear *layer, const Codes *x, int row, int block, const Ending *end, float *out, int64_t stride) {
    i32x16 sums[ROWS][4];
    f32x16 y[ROWS][4];
    const int8_t *w = (const int8_t *)layer->weights + (int64_t)block * BLOCK * layer->K;
    multiply_int8(rows, x->codes + row * x->stride, x->stride, w, layer->K, sums);
    int first = block * BLOCK;
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        i32x16 colsum = _mm512_loadu_si512(layer->colsum + first + 16 * c);
        f32x16 scale = _mm512_loadu_ps(layer->scale + first + 16 * c);
        f32x16 bias = layer->bias ? _mm512_loadu_ps(layer->bias + first + 16 * c) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            i32x16 centred = _mm512_sub_epi32(sums[r][c], _mm512_mullo_epi32(colsum, _mm512_set1_epi32(x->zero[row + r])));
            f32x16 both = _mm512_mul_ps(scale, _mm512_set1_ps(x->scale[row + r]));
            y[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(centred), both, bias);
        }
    }
    finish(rows, y, end->activation, end->gated, 1, out, stride);
}

INLINE void tile_f32(int rows, const Linear *layer, const Input *x, int row, int block, const Ending *end, float *out, int64_t stride) {
    f32x16 y[ROWS][4];
    const float *w = (const float *)layer->weights + (int64_t)block * BLOCK * layer->K;
    multiply_f32(rows, x->values + row * x->stride, x->stride, w, layer->K, y);
    if (layer->bias)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) y[r][c] = _mm512_add_ps(y[r][c], _mm512_loadu_ps(layer->bias + block * BLOCK + 16 * c));
    finish(rows, y, end->activation, end->gated, 0, out, stride);
}

/* One tile of `rows` <= 6 rows; each count is code of its own, so that the sums live in registers. */
#define DISPATCH(tile, ...)                    \
    switch (rows) {                            \
    case 6: tile(6, __VA_ARGS__); break;       \
    case 5: tile(5, __VA_ARGS__); break;       \
    case 4: tile(4, __VA_ARGS__); break;       \
    case 3: tile(3, __VA_ARGS__); break;       \
    case 2: tile(2, __VA_ARGS__); break;       \
    default: tile(1, __VA_ARGS__); break;      \
    }

static void int8_tile(int rows, const Linear *layer, const Input *x, int row, int block, const Ending *end, float *out, int64_t stride) {
    DISPATCH(tile_int8, layer, &x->codes, row, block, end, out, stride)
}

static void f32_tile(int rows, const Linear *layer, const Input *x, int row, int block, const Ending *end, float *out, int64_t stride) {
    DISPATCH(tile_f32, layer, x, row, block, end, out, stride)
}

static void code_row(const float *x, int count, int row, const Codes *to) {
    if (to->codes) quantize_row(x, to->factors, count, to->codes + row * to->stride, to->scale + row, to->zero + row);
}

static void end_row(float *y, int row, const Ending *end) {
    int count = end->outputs;
    if (end->ending == END_CODES) {
        code_row(y, count, row, &end->codes);
        return;
    }
    float *residual = end->residual + (int64_t)row * count;
    for (int k = 0; k < count; k += LANES) {
        __mmask16 mask = first_lanes(count - k);
        f32x16 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, residual + k), _mm512_maskz_loadu_ps(mask, y + k));
        _mm512_mask_storeu_ps(residual + k, mask, sum);
    }
    float *normed = end->post_norm ? residual : end->out ? end->out + row * end->stride : y;
    norm_row(residual, count, end->gain, end->bias, end->epsilon, end->centred, normed);
    code_row(normed, count, row, &end->codes);
    code_row(normed, count, row, &end->also);
}

#define STRIP 48 /* most rows between two passes over the weights */
#define OUTPUTS_KEPT (80 * 1024) /* bytes of a strip's outputs, which wait in the second-level cache for their ending */

/* Rows start .. start + count through all blocks of outputs, then ended row by row; returns -1 without memory. */
static int strip(const Linear *layer, const Input *x, int start, int count, const Ending *end, int int8) {
    int width = end->gated ? layer->N / 2 : layer->N, step = end->gated ? BLOCK / 2 : BLOCK;
    int direct = end->ending == END_STORE;
    float *out = direct ? end->out + start * end->stride : scratch(SCRATCH_ROWS, sizeof(float) * STRIP * width);
    int64_t stride = direct ? end->stride : width;
    if (!out) return -1;
    for (int block = 0; block < layer->N / BLOCK; block++)
        for (int r = 0; r < count; r += ROWS)
            (int8 ? int8_tile : f32_tile)(MIN(ROWS, count - r), layer, x, start + r, block, end, out + r * stride + block * step, stride);
    if (!direct)
        for (int r = 0; r < count; r++) end_row(out + r * stride, start + r, end);
    return 0;
}

/* Applies `layer` to T rows and ends them as `end` says; returns 0, or -1 without memory. */
EXPORT int oe_linear(const Linear *layer, const Input *x, int64_t T, const Ending *end, int int8, int threads) {
    int failed = 0;
    int rows = MAX(2 * ROWS, MIN(STRIP, OUTPUTS_KEPT / (int)sizeof(float) / (end->gated ? layer->N / 2 : layer->N) / ROWS * ROWS));
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(|:failed) if (T > rows)
    for (int start = 0; start < T; start += rows) failed |= strip(layer, x, start, MIN(rows, (int)T - start), end, int8);
    return failed;
}

/* The norm of T rows of x as float32 (`out`) and / or codes; returns 0, or -1 without memory. */
EXPORT int oe_norm(const float *x, int64_t T, const Ending *end) {
    int D = end->outputs;
    float *kept = scratch(SCRATCH_ROWS, sizeof(float) * (D + LANES));
    if (!kept) return -1;
    for (int t = 0; t < T; t++) {
        float *normed = end->out ? end->out + t * end->stride : kept;
        norm_row(x + (int64_t)t * D, D, end->gain, end->bias, end->epsilon, end->centred, normed);
        code_row(normed, D, t, &end->codes);
        code_row(normed, D, t, &end->also);
    }
    return 0;
}

/* Codes of T rows of K values. */
EXPORT void oe_quantize(const float *x, int64_t T, int K, int64_t stride, const Codes *out, int threads) {
#pragma omp parallel for num_threads(threads) if (T > STRIP)
    for (int t = 0; t < T; t++) code_row(x + t * stride, K, t, out);
}
