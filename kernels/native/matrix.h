/* Exported by matrix.c. */
#ifndef SESSIOND_MATRIX_H
#define SESSIOND_MATRIX_H

#include <stdint.h>

/* A weight [n_out][n_in] laid out for products with any number of rows; n_in % 32 == 0.

   Outputs stand in tiles of 16, the last one filled up with zeros. A tile holds for
     bits 16: every two inputs the 16 outputs' pairs of bf16, 64 bytes;
     bits  8: every four inputs the 16 outputs' four codes, 64 bytes;
     bits  4: every 32 inputs 4 times 64 bytes: input 4j + c of output i in the lower half of byte 64j + 4i + c, input
              16 + 4j + c in the upper one.
   `scales` and `lows` fp16 [tile][n_in / 32][16]: a weight is scale * (code - 128) of 8 bits, scale * code + low of 4.
   `bias` fp32 [n_out], or 0. */
struct matrix {
    int64_t bits, n_in, n_out;
    uintptr_t codes, scales, lows, bias;
};

/* out [rows][n_out] fp32 = x [rows][n_in] @ weight.T + bias. `x` is bf16; `work`: matrix_work() bytes. */
int64_t matrix_work(int64_t rows, int64_t n_in);
void matrix_product(const struct matrix *matrix, uintptr_t x, int64_t rows, uintptr_t out, uintptr_t work,
                    int n_threads);

#endif
