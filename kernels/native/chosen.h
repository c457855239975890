/* Exported by chosen.c. */
#ifndef SESSIOND_CHOSEN_H
#define SESSIOND_CHOSEN_H

#include <stdint.h>

/* Rows that are keys or values: of bf16 (bits 0), or of codes in 2, 4 or 8 bits (kernels/coded.py has their layout).
   rows [n_groups][..][head_dim] or [n_groups][..][bytes], scales [n_groups][..][2 * groups of channels]; strides from
   head group to head group, in elements. `group`: channels that share a scale, a multiple of 32 unless it is all.
   `in_order`: row i belongs to the i-th chosen position; else to the position that is called i. */
struct chosen_rows {
    uintptr_t rows, scales;
    int64_t stride, scales_stride, bits, group, in_order;
};

/* New tokens of one session. query [n_heads][n_new][head_dim] bf16 with strides; out [n_new][n_heads][head_dim] bf16,
   contiguous. chosen [n_groups][n_chosen] positions below own_start, -1: none; 0: positions 0 .. n_chosen - 1. Token i sees
   those, whose rows are `keys` and `values`, and positions own_start .. own_end - n_new + i of own_keys and own_values
   [n_groups][..][head_dim], own_end - own_start >= n_new > 0. The last three are written by chosen_plan. */
struct chosen_span {
    uintptr_t query, out, chosen, own_keys, own_values;
    int64_t head_stride, token_stride, chosen_stride, own_keys_stride, own_values_stride;
    int64_t n_new, n_chosen, own_start, own_end;
    struct chosen_rows keys, values;
    int64_t first_unit, first_chunk, first_state;
};

int64_t chosen_plan(struct chosen_span *spans, int64_t n_spans, int64_t n_groups, int64_t n_share, int64_t head_dim);
int attend_chosen_bf16(const struct chosen_span *spans, int64_t n_spans, int64_t n_groups, int64_t n_share,
                       int64_t head_dim, float scaling, uintptr_t scratch, int n_threads);
int positions_told(uintptr_t positions, int64_t n_rows, int64_t stride, int64_t n, int64_t end);

#endif
