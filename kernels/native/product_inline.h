/* Products of rows with a matrix, and what becomes of their results: shared by matrix.c and decoder.c. */
#ifndef SESSIOND_PRODUCT_INLINE_H
#define SESSIOND_PRODUCT_INLINE_H

#include "matrix.h"
#include "native.h"

/* Numbers of a block that share a scale, of weights and of rows. */
enum { BLOCK = 32, LANES = 16 };

/* Rows [rows][n] in the form that a matrix multiplies: bf16 for one of 16 bits, else int8 codes with, for each block,
   a scale, the scaled sum of its codes and -128 times that sum. */
struct operand {
    uint16_t *bf16;
    int8_t *codes;
    float *scales, *sums;
    int32_t *shifts;
    int64_t n;
};

/* An operand in `work` for either kind of matrix; operand_bytes() of them. */
int64_t operand_bytes(int64_t rows, int64_t n);
struct operand operand_at(void *work, int64_t rows, int64_t n);

INLINE float max_abs(const float *values) {
    float most[LANES];
    for (int i = 0; i < LANES; i++) {
        float first = values[i] < 0 ? -values[i] : values[i];
        float second = values[LANES + i] < 0 ? -values[LANES + i] : values[LANES + i];
        first = first > 0 ? first : 0;
        most[i] = second > first ? second : first;
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[half + i] > most[i] ? most[half + i] : most[i];
    return most[0];
}

/* 0, or none where one of the values is no number. Sums by lanes: one sum after the other would take longer than all
   else of a block. */
INLINE float strangeness(const float *values) {
    float strange[LANES];
    for (int i = 0; i < LANES; i++) strange[i] = values[i] * 0.0f + values[LANES + i] * 0.0f;
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) strange[i] += strange[half + i];
    return strange[0];
}

/* Writes one block of 32 numbers of a row. */
INLINE void operand_block(const struct operand *x, int64_t bits, int64_t row, int64_t block, const float *values) {
    if (bits == 16) {
        uint16_t *to = x->bf16 + row * x->n + block * BLOCK;
        for (int i = 0; i < BLOCK; i++) to[i] = to_bf16(values[i]);
        return;
    }
    const int64_t place = row * (x->n / BLOCK) + block;
    float scale = max_abs(values) / 127.0f, factor = scale > 0 ? 1.0f / scale : 0.0f;
    int8_t *to = x->codes + row * x->n + block * BLOCK;
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        float shifted = values[i] * factor + 12582912.0f; /* rounds to nearest, ties to even */
        int32_t code = (int32_t)(shifted - 12582912.0f);
        to[i] = (int8_t)code;
        sum += code;
    }
    /* A number that is none must not be lost in codes: it makes the whole block none. */
    x->scales[place] = scale + strangeness(values);
    x->sums[place] = x->scales[place] * (float)sum;
    x->shifts[place] = -128 * sum;
}

enum epilogue {
    STORE, /* out[row][o] = result + bias */
    ADD,   /* out[row][o] += result + bias */
    GATE,  /* of every 64 outputs 32 gate the others: 32 numbers of `next` */
};
enum activation { SILU, GELU_TANH };

struct product {
    const struct matrix *matrix;
    struct operand x, next;
    float *out; /* [rows][n_out] */
    int64_t rows, next_bits;
    enum epilogue epilogue;
    enum activation activation;
};

void run_product(const struct product *product, int n_threads);

/* out [n_rows][n_out] = x [n_rows][n_in] @ matrix.T of 16 bits, on the calling thread; n_rows <= 8, n_out % 16 == 0. */
void few_rows_product(const struct matrix *matrix, const uint16_t *x, int n_rows, float *out);

#endif
