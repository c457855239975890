/* Attention in fp32 arithmetic, for processors without AVX-512 BF16: few rows and many, as attention_many does it.
   Whoever includes this says how many LANES a vector has.

   LANES rows are the lanes of a vector, in scores [key][rows] as in sums [dimension][rows]; keys and values are widened
   once for all rows of the block. */
#include "attention_inline.h"

enum { KEYS = 64, VECTORS = BLOCK_ROWS / LANES, TOGETHER = 2 };

/* Passed by address only: by value, where they go depends on the processor. */
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

struct plain_work {
    lanes query[VECTORS][MAX_DIM], sums[VECTORS][MAX_DIM];
    lanes scores[TOGETHER][KEYS]; /* then weights */
    lanes max[VECTORS], sum[VECTORS], scale[TOGETHER];
    ints first[VECTORS], last[VECTORS];                 /* keys that a row sees */
    float keys[KEYS * MAX_DIM], values[KEYS * MAX_DIM]; /* [KEYS][head_dim] */
};

INLINE void widen(const uint16_t *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(from[i]);
}

/* x where the mask is 0, y where it is -1. */
INLINE void choose(lanes *x, const ints *mask, const lanes *y) {
    *x = (lanes)((ints)*x & ~*mask | (ints)*y & *mask);
}

/* 2^x for x <= 0; exactly 0 below -126; NaN stays NaN. */
INLINE void exp2_lanes(lanes *x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const lanes zero = {0}, lowest = zero - 126.0f;
    ints vanishes = *x < lowest;
    choose(x, &vanishes, &lowest);
    lanes shifted = *x + round, f = *x - (shifted - round);
    lanes p = ((((EXP2_5 * f + EXP2_4) * f + EXP2_3) * f + EXP2_2) * f + EXP2_1) * f + 1.0f;
    *x = p * (lanes)(((ints)shifted - 0x4B400000 + 127) << 23);
    choose(x, &vanishes, &zero);
}

INLINE void begin(const struct attention_piece *piece, struct plain_work *work) {
    const int64_t head_dim = piece->shape->head_dim;
    for (int64_t v = 0; v * LANES < piece->n_rows; v++)
        for (int i = 0; i < LANES; i++) { /* lanes without a row repeat the last one */
            int64_t r = least(LANES * v + i, piece->n_rows - 1);
            const uint16_t *query = query_of(piece, r);
            for (int64_t d = 0; d < head_dim; d++) work->query[v][d][i] = from_bf16(query[d]), work->sums[v][d][i] = 0.0f;
            work->max[v][i] = NO_SCORE, work->sum[v][i] = 0.0f;
            work->first[v][i] = (int32_t)first_key(piece, r), work->last[v][i] = (int32_t)last_key(piece, r);
        }
}

/* Scores of NK keys for NV vectors of rows. */
INLINE void score(const int NV, const int NK, struct plain_work *work, int64_t v, int64_t head_dim, int64_t j,
                  float scaling) {
    lanes acc[TOGETHER][8] = {0};
    const float *keys = work->keys + j * head_dim;
    for (int64_t d = 0; d < head_dim; d++)
        for (int k = 0; k < NK; k++)
            for (int i = 0; i < NV; i++) acc[i][k] += work->query[v + i][d] * keys[k * head_dim + d];
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < NK; k++) work->scores[i][j + k] = acc[i][k] * scaling;
}

/* Scores of keys [at, at + n) that a row must not see become -inf. */
INLINE void hide(lanes *scores, const ints *first, const ints *last, int64_t at, int64_t n) {
    const lanes nothing = (lanes){0} - INFINITY;
    for (int64_t j = 0; j < n; j++) {
        ints hidden = *first > (int32_t)(at + j) | *last < (int32_t)(at + j);
        choose(scores + j, &hidden, &nothing);
    }
}

/* Scores become weights 2^(s - max), earlier sums are to be multiplied by `scale`. */
INLINE void soften(lanes *scores, int64_t n, lanes *max, lanes *sum, lanes *scale) {
    lanes best = *max, total = {0};
    for (int64_t j = 0; j < n; j++) {
        ints more = scores[j] > best; /* NaN leaves the maximum alone */
        choose(&best, &more, scores + j);
    }
    for (int64_t j = 0; j < n; j++) {
        lanes weight = scores[j] - best;
        exp2_lanes(&weight);
        total += weight;
        scores[j] = weight;
    }
    *scale = *max - best;
    exp2_lanes(scale);
    *sum = *sum * *scale + total;
    *max = best;
}

/* sums[d .. d + ND) = sums * scale + values @ weights for NV vectors of rows. */
INLINE void weigh(const int NV, const int ND, struct plain_work *work, int64_t v, int64_t head_dim, int64_t d, int64_t n) {
    lanes acc[TOGETHER][8];
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < ND; k++)
            acc[i][k] = work->sums[v + i][d + k] * work->scale[i];
    for (int64_t j = 0; j < n; j++)
        for (int k = 0; k < ND; k++)
            for (int i = 0; i < NV; i++) acc[i][k] += work->scores[i][j] * work->values[j * head_dim + d + k];
    for (int i = 0; i < NV; i++)
        for (int k = 0; k < ND; k++) work->sums[v + i][d + k] = acc[i][k];
}

/* NV vectors of rows from v on over keys [at, at + n), which are widened. */
INLINE void attend_vectors(const int NV, const struct attention_piece *piece, struct plain_work *work, int64_t v, int64_t at,
                           int64_t n) {
    const int NK = 8 / NV;
    const int64_t head_dim = piece->shape->head_dim, last_row = least(LANES * (v + NV), piece->n_rows) - 1;
    if (at > last_key(piece, last_row) || at + n <= first_key(piece, LANES * v)) return;
    n = least(n, (last_key(piece, last_row) - at) / TILE * TILE + TILE);
    for (int64_t j = 0; j < n; j += NK) score(NV, NK, work, v, head_dim, j, piece->shape->scaling * LOG2_E);
    int open = at + n - 1 <= last_key(piece, LANES * v) && at >= first_key(piece, last_row);
    for (int i = 0; i < NV; i++) {
        if (!open) hide(work->scores[i], work->first + v + i, work->last + v + i, at, n);
        soften(work->scores[i], n, work->max + v + i, work->sum + v + i, work->scale + i);
    }
    for (int64_t d = 0; d < head_dim; d += NK) weigh(NV, NK, work, v, head_dim, d, n);
}

INLINE void store_state(const struct attention_piece *piece, const struct plain_work *work) {
    const int64_t head_dim = piece->shape->head_dim, rows = piece->n_rows;
    for (int64_t r = 0; r < rows; r++) {
        int64_t v = r / LANES, i = r % LANES;
        for (int64_t d = 0; d < head_dim; d++) piece->state[r * head_dim + d] = work->sums[v][d][i];
        piece->state[rows * head_dim + r] = work->max[v][i], piece->state[rows * (head_dim + 1) + r] = work->sum[v][i];
    }
}

INLINE void attend(const struct attention_piece *piece) {
    struct plain_work work;
    const int64_t head_dim = piece->shape->head_dim, n_vectors = (piece->n_rows + LANES - 1) / LANES;
    begin(piece, &work);
    for (int64_t at = piece->begin; at < piece->end; at += KEYS) {
        int64_t n = least((piece->end - at + TILE - 1) / TILE * TILE, KEYS), v = 0;
        widen(piece->keys + at * head_dim, n * head_dim, work.keys);
        widen(piece->values + at * head_dim, n * head_dim, work.values);
        for (; v + 2 <= n_vectors; v += 2) attend_vectors(2, piece, &work, v, at, n);
        if (v < n_vectors) attend_vectors(1, piece, &work, v, at, n);
    }
    store_state(piece, &work);
}
