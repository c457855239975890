/* Exported by sieved.c: what sieve chooses for one token of a session in every layer of a step. */
#ifndef SESSIOND_SIEVED_H
#define SESSIOND_SIEVED_H

#include <stdint.h>

#include "attention.h"
#include "chosen.h"

/* Sieve's index of one layer of one session, with room for the step's token; tiles 0: that layer attends to all. */
struct sieve_index {
    uintptr_t tiles;
    int64_t group_stride, bits, least, most;
    double mass;
};

/* `indexes`: struct sieve_index[layers]. Tokens before `turn_start` are chosen from; estimates that differ by less than
   the share `tie` tie. Written: positions [layers][stride], of n_groups rows each, and counts [layers], how many in a row
   (turn_start: all of them, -1: nothing was chosen from); nanoseconds that choosing took. */
struct sieved {
    uintptr_t indexes, positions, counts;
    int64_t turn_start, stride, nanoseconds;
    float tie, nothing;
};

#endif
