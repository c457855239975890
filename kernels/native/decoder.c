/* The layers of a decoder-only transformer (Vaswani et al. 2017, with RMS norms, rotary positions, grouped heads and a
   gated MLP, as Llama, Mistral, Qwen, Phi-3 and Gemma have them) over the packed rows of one step.

   The residual stream stays in fp32; nothing is rounded but what a matrix or attention reads. Whatever is done row by
   row is one pass; products and attention run on all threads. A row's result does not depend on the others. */
#define _GNU_SOURCE
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

#include "decoder.h"
#include "product_inline.h"
#include "sieved_inline.h"

/* Passes over fewer rows run on the calling thread: waking the others takes longer. */
enum { FEW_ROWS = 8 };

struct buffers {
    struct operand in, attended, inner;
    float *projected; /* [rows][(n_heads + 2 * n_groups) * head_dim or hidden, the larger one] */
    struct attention_span *spans;
    struct chosen_span *chosen;
};

static int64_t projected_width(const struct decoder *d) {
    int64_t width = (d->n_heads + 2 * d->n_groups) * d->head_dim;
    return width > d->hidden ? width : d->hidden;
}

int64_t decoder_work(const struct decoder *d, int64_t rows) {
    return operand_bytes(rows, d->hidden) + operand_bytes(rows, d->n_heads * d->head_dim) +
           operand_bytes(rows, d->inner) + rows * projected_width(d) * (int64_t)sizeof(float) +
           rows * (int64_t)(sizeof(struct attention_span) + sizeof(struct chosen_span));
}

static struct buffers buffers_of(const struct decoder *d, const struct packed_step *step) {
    struct buffers b;
    char *at = (char *)step->work;
    b.in = operand_at(at, step->rows, d->hidden), at += operand_bytes(step->rows, d->hidden);
    b.attended = operand_at(at, step->rows, d->n_heads * d->head_dim);
    at += operand_bytes(step->rows, d->n_heads * d->head_dim);
    b.inner = operand_at(at, step->rows, d->inner), at += operand_bytes(step->rows, d->inner);
    b.projected = (float *)at, at += step->rows * projected_width(d) * (int64_t)sizeof(float);
    b.spans = (struct attention_span *)at, at += step->rows * (int64_t)sizeof(struct attention_span);
    b.chosen = (struct chosen_span *)at;
    return b;
}

struct pass {
    const struct decoder *decoder;
    const struct layer *layer;
    const struct packed_step *step;
    struct buffers buffers;
    int64_t index, bits;
    const float *norm;
    const int64_t *rows; /* of hidden that take part; 0: all */
};

static void over_rows(chunk_fn fn, struct pass *pass, int64_t rows, int n_threads) {
    parallel_chunks(fn, pass, rows, rows < FEW_ROWS ? 1 : n_threads);
}

/* ---- root mean square norm (Zhang and Sennrich 2019) ---- */

INLINE float inverse_rms(const float *x, int64_t n, float eps) {
    float acc[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) acc[l] += x[i + l] * x[i + l];
    for (; i < n; i++) acc[i % 16] += x[i] * x[i];
    for (int l = 0; l < 16; l++) sum += acc[l];
    return 1.0f / sqrtf(sum / (float)n + eps);
}

/* A row of hidden, normed, becomes an operand. */
INLINE void norm_row(void *arg, int64_t chunk) {
    const struct pass *p = arg;
    const int64_t n = p->decoder->hidden;
    const float *x = (const float *)p->step->hidden + (p->rows ? p->rows[chunk] : chunk) * n;
    float factor = inverse_rms(x, n, p->decoder->eps);
    for (int64_t block = 0; block < n / BLOCK; block++) {
        float values[BLOCK];
        for (int i = 0; i < BLOCK; i++) values[i] = x[block * BLOCK + i] * factor * p->norm[block * BLOCK + i];
        operand_block(&p->buffers.in, p->bits, chunk, block, values);
    }
}
EACH_LEVEL(norm_row)

/* What attention or the MLP gave, normed, is added to hidden (Gemma). */
INLINE void add_normed_row(void *arg, int64_t row) {
    const struct pass *p = arg;
    const int64_t n = p->decoder->hidden;
    const float *x = p->buffers.projected + row * n;
    float *hidden = (float *)p->step->hidden + row * n, factor = inverse_rms(x, n, p->decoder->eps);
    for (int64_t i = 0; i < n; i++) hidden[i] += x[i] * factor * p->norm[i];
}
EACH_LEVEL(add_normed_row)

/* ---- queries, keys and values ---- */

static const struct rows_of_session *session_of(const struct packed_step *step, int64_t row) {
    const struct rows_of_session *sessions = (const struct rows_of_session *)step->sessions;
    int64_t low = 0, high = step->n_sessions;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (sessions[middle].row <= row) low = middle;
        else high = middle;
    }
    return sessions + low;
}

/* One head: normed if the layer does so, its first `rotary` channels rotated as two halves, then rounded. */
INLINE void rotated_head(const struct decoder *d, const float *head, const float *norm, const float *cosines,
                         const float *sines, uint16_t *out) {
    float x[256];
    float factor = norm ? inverse_rms(head, d->head_dim, d->eps) : 1.0f;
    for (int64_t i = 0; i < d->head_dim; i++) x[i] = norm ? head[i] * factor * norm[i] : head[i];
    const int64_t half = d->rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = to_bf16(x[i] * cosines[i] - x[half + i] * sines[i]);
        out[half + i] = to_bf16(x[half + i] * cosines[i] + x[i] * sines[i]);
    }
    for (int64_t i = d->rotary; i < d->head_dim; i++) out[i] = to_bf16(x[i]);
}

INLINE void place_row(void *arg, int64_t row) {
    const struct pass *p = arg;
    const struct decoder *d = p->decoder;
    const struct packed_step *step = p->step;
    const struct rows_of_session *session = session_of(step, row);
    const int64_t heads = d->n_heads, groups = d->n_groups, dim = d->head_dim, half = d->rotary / 2;
    const int64_t position = session->position + row - session->row;
    const float *cosines = (const float *)step->angles + (2 * p->layer->rope * step->n_angles + position) * half;
    const float *sines = cosines + step->n_angles * half;
    const float *from = p->buffers.projected + row * (heads + 2 * groups) * dim;
    uint16_t *query = (uint16_t *)step->query + row * heads * dim;
    for (int64_t h = 0; h < heads; h++)
        rotated_head(d, from + h * dim, (const float *)p->layer->query_norm, cosines, sines, query + h * dim);
    for (int64_t g = 0; g < groups; g++) {
        uint16_t *key = (uint16_t *)session->kv + ((2 * p->index * groups + g) * session->capacity + position) * dim;
        uint16_t *value = key + groups * session->capacity * dim;
        rotated_head(d, from + (heads + g) * dim, (const float *)p->layer->key_norm, cosines, sines, key);
        for (int64_t i = 0; i < dim; i++) value[i] = to_bf16(from[(heads + groups + g) * dim + i]);
    }
}
EACH_LEVEL(place_row)

void decoder_before(const struct decoder *decoder, const struct layer *layer, const struct packed_step *step,
                    int64_t index, int n_threads) {
    struct pass pass = {.decoder = decoder, .layer = layer, .step = step, .buffers = buffers_of(decoder, step),
                        .index = index, .bits = layer->qkv.bits, .norm = (const float *)layer->before_attention};
    over_rows(AT_LEVEL(norm_row), &pass, step->rows, n_threads);
    struct product product = {.matrix = &layer->qkv, .x = pass.buffers.in, .out = pass.buffers.projected,
                              .rows = step->rows, .epilogue = STORE};
    run_product(&product, n_threads);
    over_rows(AT_LEVEL(place_row), &pass, step->rows, n_threads);
}

/* ---- attention ---- */

static struct attention_shape shape_of(const struct decoder *d, const struct layer *layer) {
    return (struct attention_shape){d->n_groups, d->n_heads / d->n_groups, d->head_dim, layer->window, layer->scaling};
}

/* What a session's rows attend with, and all that they may attend to. */
static struct attention_span span_of(const struct decoder *d, const struct packed_step *step,
                                     const struct rows_of_session *s, int64_t index) {
    const int64_t width = d->n_heads * d->head_dim;
    const uint16_t *keys = (const uint16_t *)s->kv + 2 * index * d->n_groups * s->capacity * d->head_dim;
    const uint16_t *values = keys + d->n_groups * s->capacity * d->head_dim;
    return (struct attention_span){
        .query = (uintptr_t)((uint16_t *)step->query + s->row * width),
        .out = (uintptr_t)((uint16_t *)step->attended + s->row * width),
        .keys = (uintptr_t)keys, .values = (uintptr_t)values,
        .query_row = width, .query_head = d->head_dim, .out_row = width,
        .group_stride = s->capacity * d->head_dim, .n_new = s->n_new, .position = s->position};
}

/* Floats of scratch for any layer. */
int64_t decoder_scratch(const struct decoder *decoder, const struct layer *layers, int64_t n_layers,
                        const struct packed_step *step, int n_threads) {
    const struct rows_of_session *sessions = (const struct rows_of_session *)step->sessions;
    struct buffers b = buffers_of(decoder, step);
    struct attention_shape shape = {0};
    int64_t most = 0, window = -1, n_chosen = 0;
    for (int64_t i = 0; i < step->n_sessions; i++) b.spans[i] = span_of(decoder, step, sessions + i, 0);
    for (int64_t i = 0; i < n_layers; i++) {
        if (layers[i].window == window) continue; /* as the layer before */
        shape = shape_of(decoder, layers + i);
        int64_t floats = attention_spans_scratch(&shape, b.spans, step->n_sessions, n_threads);
        most = floats > most ? floats : most, window = layers[i].window;
    }
    for (int64_t i = 0; i < step->n_sessions; i++) {
        const struct sieved *sieved = (const struct sieved *)sessions[i].sieve;
        if (!sieved) continue;
        int64_t words = sieved_room(sieved, n_layers, &shape, sessions[i].position);
        most = words > most ? words : most;
        sieved_most(sieved, n_layers, b.spans + i, b.chosen + n_chosen++);
    }
    int64_t states = chosen_plan(b.chosen, n_chosen, decoder->n_groups, shape.n_share, decoder->head_dim);
    return states > most ? states : most;
}

static void attend(const struct decoder *decoder, const struct layer *layer, const struct packed_step *step,
                   int64_t index, uintptr_t scratch, int n_threads) {
    const struct rows_of_session *sessions = (const struct rows_of_session *)step->sessions;
    const struct attention_shape shape = shape_of(decoder, layer);
    const struct buffers b = buffers_of(decoder, step);
    int64_t n_whole = 0, n_chosen = 0;
    for (int64_t i = 0; i < step->n_sessions; i++) {
        struct sieved *sieved = (struct sieved *)sessions[i].sieve;
        b.spans[n_whole] = span_of(decoder, step, sessions + i, index);
        if (sieved && !layer->window &&
            sieved_choose(sieved, index, &shape, b.spans + n_whole, b.chosen + n_chosen, scratch, n_threads))
            n_chosen++;
        else
            n_whole++;
    }
    attention_spans(&shape, b.spans, n_whole, scratch, n_threads);
    chosen_plan(b.chosen, n_chosen, shape.n_groups, shape.n_share, shape.head_dim);
    attend_chosen_bf16(b.chosen, n_chosen, shape.n_groups, shape.n_share, shape.head_dim, shape.scaling, scratch,
                       n_threads);
}

/* The layer's pages of KV in files leave memory. */
static void release(const struct decoder *d, const struct packed_step *step, int64_t index) {
    const struct rows_of_session *sessions = (const struct rows_of_session *)step->sessions;
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int64_t i = 0; i < step->n_sessions; i++) {
        const struct rows_of_session *s = sessions + i;
        if (!s->in_file) continue;
        const uintptr_t nbytes = (uintptr_t)(2 * d->n_groups * s->capacity * d->head_dim * 2);
        const uintptr_t first = (s->kv + (uintptr_t)index * nbytes + page - 1) / page * page;
        const uintptr_t end = (s->kv + (uintptr_t)(index + 1) * nbytes) / page * page;
        if (first < end) madvise((void *)first, end - first, MADV_DONTNEED);
    }
}

/* ---- what follows attention ---- */

INLINE void attended_row(void *arg, int64_t row) {
    const struct pass *p = arg;
    const int64_t n = p->buffers.attended.n;
    const uint16_t *from = (const uint16_t *)p->step->attended + row * n;
    for (int64_t block = 0; block < n / BLOCK; block++) {
        float values[BLOCK];
        for (int i = 0; i < BLOCK; i++) values[i] = from_bf16(from[block * BLOCK + i]);
        operand_block(&p->buffers.attended, p->bits, row, block, values);
    }
}
EACH_LEVEL(attended_row)

/* hidden += x @ matrix, normed before it is added if there is a `norm`. */
static void add_product(struct pass *pass, const struct matrix *matrix, struct operand x, uintptr_t norm, int n_threads) {
    struct product product = {.matrix = matrix, .x = x, .rows = pass->step->rows, .epilogue = norm ? STORE : ADD,
                              .out = norm ? pass->buffers.projected : (float *)pass->step->hidden};
    run_product(&product, n_threads);
    if (norm) {
        pass->norm = (const float *)norm;
        over_rows(AT_LEVEL(add_normed_row), pass, pass->step->rows, n_threads);
    }
}

void decoder_after(const struct decoder *decoder, const struct layer *layer, const struct packed_step *step,
                   int n_threads) {
    struct pass pass = {.decoder = decoder, .layer = layer, .step = step, .buffers = buffers_of(decoder, step),
                        .bits = layer->out.bits};
    struct operand attended = pass.buffers.attended;
    if (layer->out.bits == 16) attended.bf16 = (uint16_t *)step->attended;
    else over_rows(AT_LEVEL(attended_row), &pass, step->rows, n_threads);
    add_product(&pass, &layer->out, attended, layer->after_attention, n_threads);

    pass.bits = layer->gate_up.bits, pass.norm = (const float *)layer->before_mlp;
    over_rows(AT_LEVEL(norm_row), &pass, step->rows, n_threads);
    struct product gated = {.matrix = &layer->gate_up, .x = pass.buffers.in, .next = pass.buffers.inner,
                            .rows = step->rows, .next_bits = layer->down.bits, .epilogue = GATE,
                            .activation = decoder->gate ? GELU_TANH : SILU};
    run_product(&gated, n_threads);
    add_product(&pass, &layer->down, pass.buffers.inner, layer->after_mlp, n_threads);
}

void decoder_run(const struct decoder *decoder, const struct layer *layers, const struct packed_step *step,
                 int64_t first, int64_t last, uintptr_t scratch, int n_threads) {
    for (int64_t i = first; i < last; i++) {
        decoder_before(decoder, layers + i, step, i, n_threads);
        attend(decoder, layers + i, step, i, scratch, n_threads);
        release(decoder, step, i);
        decoder_after(decoder, layers + i, step, n_threads);
    }
}

void decoder_logits(const struct decoder *decoder, uintptr_t norm, const struct matrix *head,
                    const struct packed_step *step, const int64_t *rows, int64_t n, uintptr_t out, int n_threads) {
    struct pass pass = {.decoder = decoder, .step = step, .buffers = buffers_of(decoder, step), .bits = head->bits,
                        .norm = (const float *)norm, .rows = rows};
    over_rows(AT_LEVEL(norm_row), &pass, n, n_threads);
    struct product product = {.matrix = head, .x = pass.buffers.in, .out = (float *)out, .rows = n, .epilogue = STORE};
    run_product(&product, n_threads);
}
