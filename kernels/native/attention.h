/* Exported by attention.c. */
#ifndef SESSIOND_ATTENTION_H
#define SESSIOND_ATTENTION_H

#include <stdint.h>

/* n_share query heads read one group's keys and values; head_dim % 32 == 0, at most 256; window 0: all of history. */
struct attention_shape {
    int64_t n_groups, n_share, head_dim, window;
    float scaling;
};

/* One session's new tokens, bf16. Strides count elements. */
struct attention_span {
    uintptr_t query;        /* token i, head h = group * n_share + share: query + i * query_row + h * query_head */
    uintptr_t out;          /* [n_new][n_heads][head_dim], row i at out + i * out_row */
    uintptr_t keys, values; /* [n_groups][capacity][head_dim], group_stride from group to group */
    int64_t query_row, query_head, out_row, group_stride, n_new, position;
};

int64_t attention_spans_scratch(const struct attention_shape *shape, const struct attention_span *spans,
                                int64_t n_spans, int n_threads);
void attention_spans(const struct attention_shape *shape, const struct attention_span *spans, int64_t n_spans,
                     uintptr_t scratch, int n_threads);

#endif
