/* Exported by rocket.c. */
#ifndef SESSIOND_ROCKET_H
#define SESSIOND_ROCKET_H

#include <stdint.h>

int64_t rocket_room(int64_t n_groups, int64_t n_pages, int64_t page_size);
void rocket_choose(uintptr_t query, int query_bf16, uintptr_t low, uintptr_t high, int64_t group_stride,
                   int bounds_bf16, int64_t n_groups, int64_t n_share, int64_t head_dim, int64_t n_tokens,
                   int64_t page_size, int64_t n_set, int64_t n_channels, int64_t n_chosen, float scaling,
                   uintptr_t chosen, uintptr_t room, int n_threads);

#endif
