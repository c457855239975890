/* Exported by attention.c. */
#ifndef SESSIOND_ATTENTION_H
#define SESSIOND_ATTENTION_H

#include <stdint.h>

int64_t attention_scratch(int64_t n_groups, int64_t rows, int64_t head_dim, int64_t n_keys);
void attention_bf16(uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t out, uintptr_t scratch,
                    int64_t n_groups, int64_t group_stride, int64_t n_share, int64_t n_new, int64_t head_dim,
                    int64_t position, int64_t window, float scaling, int n_threads);

#endif
