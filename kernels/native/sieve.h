/* Exported by sieve.c. */
#ifndef SESSIOND_SIEVE_H
#define SESSIOND_SIEVE_H

#include <stdint.h>

int64_t sieve_room(int64_t n_groups, int64_t n_share, int64_t n, int64_t most);
int64_t sieve_choose(uintptr_t tiles, int64_t tile_group_stride, uintptr_t query, int is_bf16, int64_t n_groups,
                     int64_t n_share, int64_t head_dim, int bits, int64_t n, int64_t n_earlier, float scaling,
                     uintptr_t prior, int64_t prior_stride, int64_t n_prior, float tie, float nothing, double mass,
                     int64_t least, int64_t most, uintptr_t positions, uintptr_t room, int n_threads);

#endif
