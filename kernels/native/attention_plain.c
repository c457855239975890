/* Attention in fp32 arithmetic, for processors without AVX-512 BF16: few rows and many. */
#include "attention_inline.h"

enum { KEYS = 64 };

struct plain_work {
    float query[BLOCK_ROWS][MAX_DIM], keys[KEYS][MAX_DIM], values[KEYS][MAX_DIM], weights[KEYS];
};

INLINE void widen(const uint16_t *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(from[i]);
}

/* 2^x for x <= 0; exactly 0 below -126; NaN stays NaN. */
INLINE float exp2_negative(float x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    union { float value; int32_t bits; } shifted = {(x < -126.0f ? -126.0f : x) + round}, power;
    float f = (x < -126.0f ? -126.0f : x) - (shifted.value - round);
    float p = ((((EXP2_5 * f + EXP2_4) * f + EXP2_3) * f + EXP2_2) * f + EXP2_1) * f + 1.0f;
    power.bits = (int32_t)((uint32_t)(shifted.bits - 0x4B400000 + 127) << 23);
    return x < -126.0f ? 0.0f : p * power.value;
}

/* In sixteen sums, so that the order is fixed whatever vectors there are. */
INLINE float dot(const float *a, const float *b, int64_t n) {
    float acc[16] = {0};
    for (int64_t d = 0; d < n; d += 16)
        for (int i = 0; i < 16; i++) acc[i] += a[d + i] * b[d + i];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) acc[i] += acc[i + half];
    return acc[0];
}

/* One row over keys [at, at + n), which are widened. */
INLINE void attend_row(const struct attention_piece *piece, struct plain_work *work, int64_t r, int64_t at, int64_t n) {
    const int64_t head_dim = piece->shape->head_dim, rows = piece->n_rows;
    float *acc = piece->state + r * head_dim, *max = piece->state + rows * head_dim + r, *sum = max + rows;
    const float scaling = piece->shape->scaling * LOG2_E;
    int64_t first = first_key(piece, r) - at, last = last_key(piece, r) - at;
    if (first >= n || last < 0) return;
    float best = *max;
    for (int64_t j = 0; j < n; j++) {
        float score = j < first || j > last ? -INFINITY : dot(work->query[r], work->keys[j], head_dim) * scaling;
        work->weights[j] = score;
        best = score > best ? score : best; /* NaN leaves the maximum alone */
    }
    float scale = exp2_negative(*max - best), total = 0.0f;
    for (int64_t j = 0; j < n; j++) work->weights[j] = exp2_negative(work->weights[j] - best);
    for (int64_t j = 0; j < n; j++) total += work->weights[j];
    *sum = *sum * scale + total;
    *max = best;
    for (int64_t d = 0; d < head_dim; d += 32) {
        float part[32];
        for (int i = 0; i < 32; i++) part[i] = acc[d + i] * scale;
        for (int64_t j = 0; j < n; j++)
            for (int i = 0; i < 32; i++) part[i] += work->weights[j] * work->values[j][d + i];
        for (int i = 0; i < 32; i++) acc[d + i] = part[i];
    }
}

INLINE void attend(const struct attention_piece *piece) {
    struct plain_work work;
    const int64_t head_dim = piece->shape->head_dim, rows = piece->n_rows;
    for (int64_t i = 0; i < rows * head_dim; i++) piece->state[i] = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
        piece->state[rows * head_dim + r] = NO_SCORE, piece->state[rows * (head_dim + 1) + r] = 0.0f;
        widen(query_of(piece, r), head_dim, work.query[r]);
    }
    for (int64_t at = piece->begin; at < piece->end; at += KEYS) {
        int64_t n = least(piece->end - at, KEYS);
        for (int64_t j = 0; j < n; j++) {
            widen(piece->keys + (at + j) * head_dim, head_dim, work.keys[j]);
            widen(piece->values + (at + j) * head_dim, head_dim, work.values[j]);
        }
        for (int64_t r = 0; r < rows; r++) attend_row(piece, &work, r, at, n);
    }
}

void attention_plain(const struct attention_piece *piece) { attend(piece); }

#if HAVE_X86
AVX2 void attention_avx2(const struct attention_piece *piece) { attend(piece); }
#endif
