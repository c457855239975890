/* Exported by pages.c. */
#ifndef SESSIOND_PAGES_H
#define SESSIOND_PAGES_H

#include <stdint.h>

void pages_extend(uintptr_t keys, int64_t key_group_stride, int64_t key_stride, uintptr_t low, uintptr_t high,
                  int64_t group_stride, int is_bf16, int64_t n_groups, int64_t first, int64_t n, int64_t size,
                  int64_t head_dim);
void page_scores(uintptr_t query, int query_bf16, uintptr_t rising, int64_t rising_rows, uintptr_t low, uintptr_t high,
                 int64_t group_stride, int bounds_bf16, int64_t n_groups, int64_t n_share, int64_t n_pages,
                 int64_t head_dim, uintptr_t scores, int best, int n_threads);
void page_positions(uintptr_t pages, int64_t n, int64_t size, int64_t end, uintptr_t positions);

#endif
