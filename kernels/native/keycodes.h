/* Exported by keycodes.c. */
#ifndef SESSIOND_KEYCODES_H
#define SESSIOND_KEYCODES_H

#include <stdint.h>

void key_codes_pack(uintptr_t rows, int is_bf16, int64_t row_group_stride, int64_t row_stride, uintptr_t tiles,
                    int64_t tile_group_stride, int64_t n_groups, int64_t first, int64_t n, int64_t head_dim, int bits,
                    int n_threads);
void key_codes_scores(uintptr_t tiles, int64_t tile_group_stride, uintptr_t query, int is_bf16, uintptr_t scores,
                      int64_t score_stride, int64_t n_groups, int64_t n_share, int64_t n, int64_t head_dim, int bits,
                      int n_threads);

#endif
