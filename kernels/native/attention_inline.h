/* What the attention kernels share. */
#ifndef SESSIOND_ATTENTION_INLINE_H
#define SESSIOND_ATTENTION_INLINE_H

#include <math.h>

#include "attention.h"
#include "lanes_inline.h"
#include "native.h"

/* Up to FEW_ROWS rows of a group are one block of attention_few; more are cut into blocks of BLOCK_ROWS. */
enum { TILE = 16, FEW_ROWS = 8, BLOCK_ROWS = 96, MAX_DIM = 256 };

/* Maximum of no scores: finite, so that a masked score (-inf) less this is no NaN. */
#define NO_SCORE (-3e38f)
#define LOG2_E 1.44269504088896341f

/* Coefficients of 2^f on [-1/2, 1/2], relative error 1e-7; 2^0 is exactly 1. */
#define EXP2_1 6.931469776e-1f
#define EXP2_2 2.402224207e-1f
#define EXP2_3 5.550733766e-2f
#define EXP2_4 9.671513138e-3f
#define EXP2_5 1.326472025e-3f

/* Work of one call of a kernel: rows [row, row + n_rows) of one group over keys [begin, end), begin % TILE == 0.
   Row r is share r % n_share of new token r / n_share. */
struct attention_piece {
    const struct attention_shape *shape;
    const struct attention_span *span;
    const uint16_t *query, *keys, *values; /* of the group */
    int64_t row, n_rows, begin, end;
    float *state; /* [n_rows][head_dim] values times weights, [n_rows] maxima of log2 scores, [n_rows] sums of weights */
};

void attention_few(const struct attention_piece *piece);   /* AVX-512, n_rows <= FEW_ROWS */
void attention_many(const struct attention_piece *piece);  /* AVX-512, n_rows <= BLOCK_ROWS */
void attention_avx2(const struct attention_piece *piece);  /* the same bound */
void attention_plain(const struct attention_piece *piece); /* the same bound */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE const uint16_t *query_of(const struct attention_piece *piece, int64_t r) {
    int64_t row = piece->row + r, share = row % piece->shape->n_share;
    return piece->query + row / piece->shape->n_share * piece->span->query_row + share * piece->span->query_head;
}

/* The last key that a row sees. */
INLINE int64_t last_key(const struct attention_piece *piece, int64_t r) {
    return piece->span->position + (piece->row + r) / piece->shape->n_share;
}

/* Row r sees keys from here on. */
INLINE int64_t first_key(const struct attention_piece *piece, int64_t r) {
    return piece->shape->window ? last_key(piece, r) - piece->shape->window + 1 : 0;
}

/* 2^x. exp2f underflows slowly; below 2^-150 it is 0 anyway. */
INLINE float power_of_two(float x) { return x < -160.0f ? 0.0f : exp2f(x); }

#if HAVE_X86

/* 2^x for x <= 0; exactly 0 below -200 and for -inf; NaN stays NaN. */
INLINE AVX512 __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* in this order: of NaN and a number the second is the maximum */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole), p = _mm512_set1_ps(EXP2_5);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_4));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_3));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_2));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(EXP2_1));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Asks for n elements before they are needed. */
INLINE AVX512 void fetch(const uint16_t *from, int64_t n) {
    for (int64_t d = 0; d < n; d += 32) _mm_prefetch((const char *)(from + d), _MM_HINT_T0);
}

/* Lane 2i and 2i + 1 of the first result are lane i of a and of b, i < 16; of the second the same for i >= 16. */
INLINE AVX512 void interleave(__m512i a, __m512i b, __m512i *low, __m512i *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(a, first, b);
    *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}
#endif

#endif
