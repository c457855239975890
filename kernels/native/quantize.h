/* Exported by quantize.c. */
#ifndef SESSIOND_QUANTIZE_H
#define SESSIOND_QUANTIZE_H

#include <stdint.h>

void quantize_rows(uintptr_t rows, int is_bf16, int64_t row_group_stride, int64_t row_stride, uintptr_t codes,
                   int64_t code_group_stride, int64_t code_stride, uintptr_t scales, int64_t scale_group_stride,
                   int64_t scale_stride, int64_t n_groups, int64_t n, int64_t width, int bits, int64_t shared,
                   int n_threads);

#endif
