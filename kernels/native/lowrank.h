/* Exported by lowrank.c. */
#ifndef SESSIOND_LOWRANK_H
#define SESSIOND_LOWRANK_H

#include <stdint.h>

#include "matrix.h"

/* Keys of some tokens from their coordinates: basis of the group times coordinates, and the mean, rotated to the token's
   position. bases: of 16 bits, one a group, [head_dim][rank]; mean fp32 [groups][head_dim]; coordinates bf16 [n][rank];
   angles fp32 [2][n_angles][half]: cosines and sines of positions; positions [groups][n_chosen]; exact u8, as positions:
   where it is not 0 the key of `keys` bf16 [groups][..][head_dim] is taken as it is; out bf16 [groups][n_chosen][head_dim].
   Returns 0, or -1 if a position is none of the first n: then `out` is as it was. */
struct low_rank {
    const struct matrix *bases;
    uintptr_t mean, coordinates, angles, positions, exact, keys, out;
    int64_t n_groups, head_dim, rank, n, n_angles, half, n_chosen, group_stride;
};
int low_rank_keys(const struct low_rank *job, int n_threads);

#endif
