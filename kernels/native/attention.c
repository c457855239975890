/* Attention of new tokens over long histories, for many sessions in one call: grouped heads, bf16, fp32 sums.

   The rows of a group (new tokens times query heads) are cut into blocks, the keys that a block sees into parts. Every
   part of every block of every group of every span is a chunk, which leaves maximum, sum and weighted values (online
   softmax); whoever ends the last part of a block joins them (flash-decoding, Dao et al. 2023). The cuts depend on a
   span's own lengths only: neither on threads nor on other spans. */
#include <stdatomic.h>
#include <string.h>

#include "attention_inline.h"

/* A part waits for its first keys: over long contexts the fewer the better, over short ones threads need some each. */
enum { SHORT_PART = 256, SHORT_CONTEXT = 1024, LONG_PART = 512, MANY_PART = 1024, MAX_PARTS = 8, MANY_CHUNKS = 48 };

typedef void (*attention_fn)(const struct attention_piece *piece);

/* How a span is cut, and where what belongs to it begins. */
struct attention_cut {
    int64_t rows, block_rows, n_blocks, n_parts; /* rows of a group */
    int64_t first_chunk, first_block, states;
};

struct attention_job {
    const struct attention_shape *shape;
    const struct attention_span *spans;
    const struct attention_cut *cuts;
    _Atomic int32_t *parts_done; /* of each block of each group */
    float *states;
    int64_t n_spans;
    enum isa isa;
};

static struct attention_cut cut_of(const struct attention_shape *shape, const struct attention_span *span) {
    struct attention_cut cut = {.rows = span->n_new * shape->n_share};
    int few = cut.rows <= FEW_ROWS;
    cut.block_rows = few ? cut.rows : BLOCK_ROWS;
    cut.n_blocks = cut.rows ? (cut.rows + cut.block_rows - 1) / cut.block_rows : 0;
    int64_t n_keys = span->position + span->n_new, most = MAX_PARTS, part = MANY_PART;
    if (shape->window) n_keys = least(n_keys, shape->window + span->n_new);
    if (few) part = n_keys > SHORT_CONTEXT ? LONG_PART : SHORT_PART;
    if (!few) most = least(most, MANY_CHUNKS / (cut.n_blocks * shape->n_groups) + 1);
    cut.n_parts = least((n_keys + part - 1) / part, most);
    return cut;
}

static int64_t state_floats(const struct attention_shape *shape, const struct attention_cut *cut) {
    return (cut->block_rows * (shape->head_dim + 2) + 15) / 16 * 16;
}

/* Fills `cuts` if it is given. Adds up chunks, blocks and floats of states. */
static struct attention_cut cut_all(const struct attention_shape *shape, const struct attention_span *spans,
                                    int64_t n_spans, struct attention_cut *cuts) {
    struct attention_cut at = {0};
    for (int64_t i = 0; i < n_spans; i++) {
        struct attention_cut cut = cut_of(shape, spans + i);
        int64_t n_blocks = shape->n_groups * cut.n_blocks;
        cut.first_chunk = at.first_chunk, cut.first_block = at.first_block, cut.states = at.states;
        at.first_chunk += n_blocks * cut.n_parts;
        at.first_block += n_blocks;
        at.states += n_blocks * cut.n_parts * state_floats(shape, &cut);
        if (cuts) cuts[i] = cut;
    }
    return at;
}

static int64_t floats_of(int64_t nbytes) { return (nbytes + 63) / 64 * 16; }

/* Floats of scratch that attention_spans needs. */
int64_t attention_spans_scratch(const struct attention_shape *shape, const struct attention_span *spans,
                                int64_t n_spans, int n_threads) {
    (void)n_threads; /* whatever their number: results do not depend on it */
    struct attention_cut all = cut_all(shape, spans, n_spans, NULL);
    return floats_of(n_spans * (int64_t)sizeof(struct attention_cut)) + floats_of(all.first_block * 4) + all.states;
}

/* Joins the parts of one block and rounds. */
INLINE void join(const struct attention_piece *piece, int64_t n_parts, int64_t step, uint16_t *out) {
    const int64_t rows = piece->n_rows, head_dim = piece->shape->head_dim, n_share = piece->shape->n_share;
    for (int64_t r = 0; r < rows; r++) {
        const float *maxima = piece->state + rows * head_dim + r, *sums = maxima + rows;
        float top = NO_SCORE, total = 0.0f, factor[MAX_PARTS], values[MAX_DIM];
        for (int64_t p = 0; p < n_parts; p++) top = maxima[p * step] > top ? maxima[p * step] : top;
        for (int64_t p = 0; p < n_parts; p++) {
            factor[p] = power_of_two(maxima[p * step] - top);
            total += factor[p] * sums[p * step];
        }
        for (int64_t d = 0; d < head_dim; d++) values[d] = 0.0f;
        for (int64_t p = 0; p < n_parts; p++) {
            const float *part = piece->state + p * step + r * head_dim;
            for (int64_t d = 0; d < head_dim; d++) values[d] += factor[p] * part[d];
        }
        int64_t row = piece->row + r;
        uint16_t *target = out + row / n_share * piece->span->out_row + row % n_share * head_dim;
        for (int64_t d = 0; d < head_dim; d++) target[d] = to_bf16(values[d] / total);
    }
}

static void join_plain(const struct attention_piece *piece, int64_t n_parts, int64_t step, uint16_t *out) {
    join(piece, n_parts, step, out);
}

#if HAVE_X86
static AVX2 void join_avx2(const struct attention_piece *piece, int64_t n_parts, int64_t step, uint16_t *out) {
    join(piece, n_parts, step, out);
}
#endif

static void attend_piece(enum isa isa, const struct attention_piece *piece, int few) {
#if HAVE_X86
    if (isa == ISA_AVX512) {
        if (few) attention_few(piece);
        else attention_many(piece);
        return;
    }
    if (isa == ISA_AVX2) {
        attention_avx2(piece);
        return;
    }
#endif
    (void)isa, (void)few;
    attention_plain(piece);
}

static int64_t span_of(const struct attention_job *job, int64_t chunk) {
    int64_t low = 0, high = job->n_spans;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->cuts[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

/* The keys of one part of those that a block sees. */
static void set_keys(struct attention_piece *piece, int64_t part, int64_t n_parts) {
    int64_t first = first_key(piece, 0), end = last_key(piece, piece->n_rows - 1) + 1;
    first = first > 0 ? first / TILE * TILE : 0;
    int64_t n = ((end - first + n_parts - 1) / n_parts + 63) / 64 * 64;
    piece->begin = least(first + part * n, end);
    piece->end = least(piece->begin + n, end);
}

static void attention_chunk(void *arg, int64_t chunk) {
    const struct attention_job *job = arg;
    const struct attention_shape *shape = job->shape;
    const int64_t index = span_of(job, chunk);
    const struct attention_cut *cut = job->cuts + index;
    const struct attention_span *span = job->spans + index;
    int64_t own = chunk - cut->first_chunk, block = own % cut->n_blocks; /* all blocks read a part's keys in turn */
    int64_t part = own / cut->n_blocks % cut->n_parts, group = own / cut->n_blocks / cut->n_parts;
    int64_t step = state_floats(shape, cut), place = group * cut->n_blocks + block;
    float *states = job->states + cut->states + place * cut->n_parts * step;
    struct attention_piece piece = {
        .shape = shape,
        .span = span,
        .query = (const uint16_t *)span->query + group * shape->n_share * span->query_head,
        .keys = (const uint16_t *)span->keys + group * span->group_stride,
        .values = (const uint16_t *)span->values + group * span->group_stride,
        .row = block * cut->block_rows,
        .n_rows = least(cut->block_rows, cut->rows - block * cut->block_rows),
        .state = states + part * step,
    };
    set_keys(&piece, part, cut->n_parts);
    attend_piece(job->isa, &piece, cut->rows <= FEW_ROWS);
    if (atomic_fetch_add_explicit(job->parts_done + cut->first_block + place, 1, memory_order_acq_rel) + 1 < cut->n_parts)
        return;
    piece.state = states;
    uint16_t *out = (uint16_t *)span->out + group * shape->n_share * shape->head_dim;
#if HAVE_X86
    if (job->isa != ISA_PORTABLE) {
        join_avx2(&piece, cut->n_parts, step, out);
        return;
    }
#endif
    join_plain(&piece, cut->n_parts, step, out);
}

/* New token i of a span stands at position + i and sees keys up to its own, with a window only the last `window`.
   Keys and values are readable up to the next multiple of 16 positions and hold no NaN there. Weights are rounded to
   bf16 by AVX-512, sums are fp32. `scratch`: attention_spans_scratch() floats, aligned to 8 bytes. */
void attention_spans(const struct attention_shape *shape, const struct attention_span *spans, int64_t n_spans,
                     uintptr_t scratch, int n_threads) {
    struct attention_cut *cuts = (struct attention_cut *)scratch;
    struct attention_cut all = cut_all(shape, spans, n_spans, cuts);
    float *floats = (float *)scratch + floats_of(n_spans * (int64_t)sizeof *cuts);
    memset(floats, 0, (size_t)all.first_block * 4);
    struct attention_job job = {shape, spans, cuts, (_Atomic int32_t *)floats,
                                floats + floats_of(all.first_block * 4), n_spans, isa()};
    parallel_chunks(attention_chunk, &job, all.first_chunk, n_threads);
}
