/* Exported by linear.c. */
#ifndef SESSIOND_LINEAR_H
#define SESSIOND_LINEAR_H

#include <stdint.h>

void linear_bf16(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows, int64_t n_in,
                 int64_t n_out, int n_threads);

#endif
