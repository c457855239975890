/* Attention of few new tokens over a long history: grouped heads, bf16 keys and values, fp32 sums.

   The keys are cut into parts, every part of every head group is a chunk of its own: it keeps running maximum, sum and
   weighted values (online softmax), and the parts are joined at the end (flash-decoding, Dao et al. 2023). Keys are
   transposed in tiles of 16 so that one instruction serves 16 keys. The cut depends on lengths only, never on threads. */
#include <math.h>

#include "native.h"
#include "attention.h"

enum { TILE = 16, SPAN = 128, MIN_PART = 512, MAX_PARTS = 16, MANY_ROWS = 32, MAX_DIM = 256 };

static int64_t parts_of(int64_t rows, int64_t n_keys) {
    int64_t most = rows > MANY_ROWS ? 4 : MAX_PARTS, parts = (n_keys + MIN_PART - 1) / MIN_PART;
    return parts < 1 ? 1 : parts > most ? most : parts;
}

/* Floats of one part's running state: [rows][head_dim] values, [rows] maxima, [rows] sums. */
static int64_t state_floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

/* Floats of scratch that attention_bf16 needs for at most n_keys keys: states, scores and weights. */
int64_t attention_scratch(int64_t n_groups, int64_t rows, int64_t head_dim, int64_t n_keys) {
    return n_groups * parts_of(rows, n_keys) * (state_floats(rows, head_dim) + 2 * rows * SPAN);
}

#if HAVE_X86

struct attention_job {
    const uint16_t *query, *keys, *values;
    float *states;
    int64_t group_stride, rows, n_new, head_dim;
    int64_t first, end, position, window, n_parts, part_keys;
    float scaling;
};

INLINE AVX512 void transpose16(const uint16_t *keys, int64_t head_dim, __m512i out[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(keys + i * head_dim);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* a[4q + i]: element i of every 128 bits, keys 4q .. 4q + 3 */
        __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        out[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(low, high, 0xDD);
        low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
        out[4 + i] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[12 + i] = _mm512_shuffle_i32x4(low, high, 0xDD);
    }
}

/* Pairs of bf16 as one 32-bit lane in every lane. */
INLINE AVX512 __m512bh broadcast_pair(const uint16_t *pair) {
    uint32_t both;
    __builtin_memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32((int)both);
}

/* scores[r][0..16) = q[r] . k[j] of one transposed tile, for NR rows. */
INLINE AVX512 void score_rows(const int NR, const uint16_t *q, const __m512i *tile, int64_t head_dim, float scaling,
                                   float *scores) {
    __m512 acc[8];
    for (int r = 0; r < NR; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < head_dim / 2; pair++) {
        __m512bh keys = (__m512bh)_mm512_load_si512(tile + pair);
        for (int r = 0; r < NR; r++)
            acc[r] = _mm512_dpbf16_ps(acc[r], keys, broadcast_pair(q + r * head_dim + 2 * pair));
    }
    for (int r = 0; r < NR; r++)
        _mm512_storeu_ps(scores + r * SPAN, _mm512_mul_ps(acc[r], _mm512_set1_ps(scaling)));
}

/* e^x for x <= 0, relative error below 2e-7; exactly 0 below -87 and for -inf. */
INLINE AVX512 __m512 exp_negative(__m512 x) {
    __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* x - whole * ln 2 in two steps: the first product is exact */
    __m512 f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(alive, p, whole);
}

/* Keys of [at, at + SPAN) that a row must not see become -inf. */
INLINE AVX512 void mask_row(float *scores, int64_t at, int64_t low, int64_t high) {
    for (int j = 0; j < SPAN; j += 16) {
        __m512i key = _mm512_add_epi32(_mm512_set1_epi32((int)(at + j)),
                                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        __mmask16 hidden = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)low)) |
                           _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32((int)high));
        _mm512_mask_storeu_ps(scores + j, hidden, _mm512_set1_ps(-INFINITY));
    }
}

/* Scores of one span become bf16 weights e^(s - max); returns what earlier sums are to be multiplied by. A score that is
   no number makes everything NaN, as it does in arithmetic: the comparisons below would hide it. */
INLINE AVX512 float soften_row(const float *scores, uint16_t *weights, float *max, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    __mmask16 strange = 0;
    for (int j = 0; j < SPAN; j += 16) {
        __m512 s = _mm512_loadu_ps(scores + j);
        strange |= _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, s);
    }
    if (strange) {
        for (int j = 0; j < SPAN; j++) weights[j] = 0;
        *sum = NAN;
        return NAN;
    }
    float best = _mm512_reduce_max_ps(top);
    if (best < *max) best = *max;
    if (best == -INFINITY) { /* nothing seen so far, and nothing here */
        for (int j = 0; j < SPAN; j += 16) _mm256_storeu_si256((__m256i *)(weights + j), _mm256_setzero_si256());
        return 1.0f;
    }
    __m512 total = _mm512_setzero_ps();
    for (int j = 0; j < SPAN; j += 16) {
        __m512 weight = exp_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(best)));
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float scale = *max == -INFINITY ? 0.0f : expf(*max - best);
    *sum = *sum * scale + _mm512_reduce_add_ps(total);
    *max = best;
    return scale;
}

/* acc[r][d .. d + 32) = acc * scale[r] + weights[r] @ values, for NR rows. The 32 sums stand in the order in which
   unpacking two rows leaves them; `place` knows it. */
INLINE AVX512 void weigh_rows(const int NR, const uint16_t *weights, const uint16_t *values, int64_t head_dim,
                                   int64_t n_keys, const float *scale, float *acc) {
    __m512 low[8], high[8];
    for (int r = 0; r < NR; r++) {
        __m512 s = _mm512_set1_ps(scale[r]);
        low[r] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * head_dim), s);
        high[r] = _mm512_mul_ps(_mm512_loadu_ps(acc + r * head_dim + 16), s);
    }
    for (int64_t j = 0; j < n_keys; j += 2) {
        __m512i v0 = _mm512_loadu_si512(values + j * head_dim), v1 = _mm512_loadu_si512(values + (j + 1) * head_dim);
        __m512bh l = (__m512bh)_mm512_unpacklo_epi16(v0, v1), h = (__m512bh)_mm512_unpackhi_epi16(v0, v1);
        for (int r = 0; r < NR; r++) {
            __m512bh w = broadcast_pair(weights + r * SPAN + j);
            low[r] = _mm512_dpbf16_ps(low[r], l, w);
            high[r] = _mm512_dpbf16_ps(high[r], h, w);
        }
    }
    for (int r = 0; r < NR; r++) {
        _mm512_storeu_ps(acc + r * head_dim, low[r]);
        _mm512_storeu_ps(acc + r * head_dim + 16, high[r]);
    }
}

/* Sum i of 32 belongs to this dimension: _mm512_unpacklo_epi16 takes the lower four of every eight. */
INLINE int place(int i) {
    int half = i / 16, lane = i % 16;
    return lane / 4 * 8 + half * 4 + lane % 4;
}

static AVX512 void attention_chunk(void *arg, int64_t chunk) {
    const struct attention_job *job = arg;
    const int64_t rows = job->rows, head_dim = job->head_dim, group = chunk / job->n_parts, part = chunk % job->n_parts;
    const uint16_t *q = job->query + group * rows * head_dim;
    const uint16_t *keys = job->keys + group * job->group_stride, *values = job->values + group * job->group_stride;
    float *acc = job->states + chunk * (state_floats(rows, head_dim) + 2 * rows * SPAN);
    float *max = acc + rows * head_dim, *sum = max + rows, *scores = sum + rows;
    uint16_t *weights = (uint16_t *)(scores + rows * SPAN);
    float scale[8];
    __m512i tiles[MAX_DIM / 2];

    for (int64_t i = 0; i < rows * head_dim; i++) acc[i] = 0.0f;
    for (int64_t r = 0; r < rows; r++) max[r] = -INFINITY, sum[r] = 0.0f;
    int64_t begin = job->first + part * job->part_keys;
    int64_t end = begin + job->part_keys < job->end ? begin + job->part_keys : job->end;
    for (int64_t at = begin; at < end; at += SPAN) {
        int64_t n = end - at < SPAN ? (end - at + TILE - 1) / TILE * TILE : SPAN;
        for (int64_t j = 0; j < n; j += TILE) {
            for (int64_t d = 0; d < head_dim; d += 32) transpose16(keys + (at + j) * head_dim + d, head_dim, tiles + d / 2);
            int64_t r = 0;
            for (; r + 8 <= rows; r += 8) score_rows(8, q + r * head_dim, tiles, head_dim, job->scaling, scores + r * SPAN + j);
            for (; r + 3 <= rows; r += 3) score_rows(3, q + r * head_dim, tiles, head_dim, job->scaling, scores + r * SPAN + j);
            for (; r < rows; r++) score_rows(1, q + r * head_dim, tiles, head_dim, job->scaling, scores + r * SPAN + j);
        }
        for (int64_t r = 0; r < rows; r += 8) {
            int n_rows = rows - r < 8 ? (int)(rows - r) : 8;
            for (int i = 0; i < n_rows; i++) {
                float *row = scores + (r + i) * SPAN;
                int64_t high = job->position + (r + i) % job->n_new;
                int64_t low = job->window ? high - job->window + 1 : 0;
                if (high >= end) high = end - 1;
                if (low > at || high < at + SPAN - 1) mask_row(row, at, low, high);
                scale[i] = soften_row(row, weights + (r + i) * SPAN, max + r + i, sum + r + i);
            }
            for (int64_t d = 0; d < head_dim; d += 32) {
                const uint16_t *w = weights + r * SPAN, *v = values + at * head_dim + d;
                float *a = acc + r * head_dim + d;
                if (n_rows == 8) {
                    weigh_rows(8, w, v, head_dim, n, scale, a);
                } else {
                    int i = 0;
                    for (; i + 3 <= n_rows; i += 3) weigh_rows(3, w + i * SPAN, v, head_dim, n, scale + i, a + i * head_dim);
                    for (; i < n_rows; i++) weigh_rows(1, w + i * SPAN, v, head_dim, n, scale + i, a + i * head_dim);
                }
            }
        }
    }
}

/* Joins the parts of one group and rounds. out [n_new][n_heads][head_dim]; row = share * n_new + i. */
static AVX512 void join_parts(const struct attention_job *job, int64_t group, int64_t n_heads, uint16_t *out) {
    const int64_t rows = job->rows, head_dim = job->head_dim, n_parts = job->n_parts;
    const int64_t step = state_floats(rows, head_dim) + 2 * rows * SPAN;
    const float *states = job->states + group * n_parts * step;
    for (int64_t r = 0; r < rows; r++) {
        float top = -INFINITY, total = 0.0f, factor[MAX_PARTS];
        for (int64_t p = 0; p < n_parts; p++) {
            float max = states[p * step + rows * head_dim + r];
            if (max > top) top = max;
        }
        for (int64_t p = 0; p < n_parts; p++) {
            const float *state = states + p * step + rows * head_dim;
            factor[p] = state[r] == -INFINITY ? 0.0f : expf(state[r] - top);
            total += factor[p] * state[rows + r];
        }
        int64_t head = group * (rows / job->n_new) + r / job->n_new;
        uint16_t *target = out + ((r % job->n_new) * n_heads + head) * head_dim;
        for (int64_t d = 0; d < head_dim; d += 16) {
            __m512 value = _mm512_setzero_ps();
            for (int64_t p = 0; p < n_parts; p++)
                value = _mm512_fmadd_ps(_mm512_set1_ps(factor[p]), _mm512_loadu_ps(states + p * step + r * head_dim + d), value);
            uint16_t rounded[16];
            value = _mm512_div_ps(value, _mm512_set1_ps(total));
            _mm256_storeu_si256((__m256i *)rounded, (__m256i)_mm512_cvtneps_pbh(value));
            for (int i = 0; i < 16; i++) target[d / 32 * 32 + place((int)(d % 32) + i)] = rounded[i];
        }
    }
}
#endif

/* query [n_groups][n_share][n_new][head_dim]; keys and values [n_groups][capacity][head_dim], `group_stride` elements
   from group to group, readable up to the next multiple of 16 positions; out [n_new][n_groups * n_share][head_dim]: bf16.
   New token i stands at position + i and sees keys up to its own, with a window > 0 only the last `window` of them.
   head_dim % 32 == 0 and at most 256. `scratch`: attention_scratch() floats. */
void attention_bf16(uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t out, uintptr_t scratch,
                    int64_t n_groups, int64_t group_stride, int64_t n_share, int64_t n_new, int64_t head_dim,
                    int64_t position, int64_t window, float scaling, int n_threads) {
#if HAVE_X86
    int64_t rows = n_share * n_new, end = position + n_new;
    int64_t first = window && position - window + 1 > 0 ? (position - window + 1) / TILE * TILE : 0;
    int64_t n_parts = parts_of(rows, end - first);
    int64_t part_keys = ((end - first + n_parts - 1) / n_parts + SPAN - 1) / SPAN * SPAN;
    struct attention_job job = {(const uint16_t *)query, (const uint16_t *)keys, (const uint16_t *)values,
                                (float *)scratch, group_stride, rows, n_new, head_dim, first, end, position, window,
                                n_parts, part_keys, scaling};
    parallel_chunks(attention_chunk, &job, n_groups * n_parts, n_threads);
    for (int64_t group = 0; group < n_groups; group++) join_parts(&job, group, n_groups * n_share, (uint16_t *)out);
#else
    (void)query, (void)keys, (void)values, (void)out, (void)scratch, (void)n_groups, (void)group_stride, (void)n_share;
    (void)n_new, (void)head_dim, (void)position, (void)window, (void)scaling, (void)n_threads;
#endif
}
