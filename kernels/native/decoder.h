/* Exported by decoder.c: the layers of a decoder-only transformer over the packed rows of a step. */
#ifndef SESSIOND_DECODER_H
#define SESSIOND_DECODER_H

#include <stdint.h>

#include "matrix.h"
#include "sieved.h"

/* `inner`: numbers between the MLP's matrices. `rotary`: channels of a head that rotate. `gate`: 0 SiLU, 1 GELU (tanh). */
struct decoder {
    int64_t hidden, n_heads, n_groups, head_dim, inner, rotary, gate;
    float eps;
};

/* One layer. Norms are fp32 [hidden] or, of queries and keys, [head_dim]; 0: there is none. `window`: keys that a query
   sees, 0: all. `rope`: which of a step's tables of angles. gate_up: by turns 32 outputs that gate and the 32 gated. */
struct layer {
    struct matrix qkv, out, gate_up, down;
    uintptr_t before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
    int64_t window, rope;
    float scaling;
};

/* Rows [row, row + n_new) of a step: tokens of one session at `position` and on. `kv`: its memory, bf16
   [layers][2][groups][capacity][head_dim]; `in_file`: of a file, whose pages leave memory after every layer. `sieve`:
   struct sieved, what chooses for the session's one token; 0: it attends to everything. Sessions stand in the order of
   their rows. */
struct rows_of_session {
    uintptr_t kv, sieve;
    int64_t capacity, position, row, n_new, in_file;
};

/* One step. hidden fp32 [rows][hidden]; angles fp32 [tables][cosines, sines][n_angles][rotary / 2] of the first
   positions; query and attended bf16 [rows][n_heads * head_dim]; `work`: decoder_work() bytes. */
struct packed_step {
    int64_t rows, n_sessions, n_angles;
    uintptr_t sessions, hidden, angles, query, attended, work;
};

int64_t decoder_work(const struct decoder *decoder, int64_t rows);

/* Norm, projections, rotation: queries, and keys and values into the sessions' memory. */
void decoder_before(const struct decoder *decoder, const struct layer *layer, const struct packed_step *step,
                    int64_t index, int n_threads);
/* Output projection, MLP, both with their residual sums. */
void decoder_after(const struct decoder *decoder, const struct layer *layer, const struct packed_step *step,
                   int n_threads);
/* Layers [first, last) whole. `scratch`: floats as told. */
int64_t decoder_scratch(const struct decoder *decoder, const struct layer *layers, int64_t n_layers,
                        const struct packed_step *step, int n_threads);
void decoder_run(const struct decoder *decoder, const struct layer *layers, const struct packed_step *step,
                 int64_t first, int64_t last, uintptr_t scratch, int n_threads);

/* out [n][n_out of head] fp32: the head's product of the given rows of hidden after the last norm. */
void decoder_logits(const struct decoder *decoder, uintptr_t norm, const struct matrix *head,
                    const struct packed_step *step, const int64_t *rows, int64_t n, uintptr_t out, int n_threads);

#endif
