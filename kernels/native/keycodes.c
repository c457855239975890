/* Keys as codes of 2, 4 or 8 bits: made, and scored against queries. keycodes_inline.h has the layout. */
#include "keycodes_inline.h"
#include "quantize_inline.h"
#include "keycodes.h"

static void plain(const struct code_shape *shape, const uint8_t *tiles, int64_t n_tiles, const struct code_query *query,
                  int64_t n_rows, float scaling, float *scores, int64_t stride) {
    for (int64_t t = 0; t < n_tiles; t++)
        score_tile_plain(shape, tiles + t * shape->tile_bytes, query, n_rows, scaling, scores + t * TILE_KEYS, stride);
}

#if HAVE_X86
static AVX2 void plain_avx2(const struct code_shape *shape, const uint8_t *tiles, int64_t n_tiles,
                            const struct code_query *query, int64_t n_rows, float scaling, float *scores,
                            int64_t stride) {
    for (int64_t t = 0; t < n_tiles; t++)
        score_tile_plain(shape, tiles + t * shape->tile_bytes, query, n_rows, scaling, scores + t * TILE_KEYS, stride);
}

static AVX512 void fast(const struct code_shape *shape, const uint8_t *tiles, int64_t n_tiles,
                        const struct code_query *query, int64_t n_rows, float scaling, float *scores, int64_t stride) {
    for (int64_t r = 0; r < n_rows;) {
        const struct code_query *q = query + r;
        float *to = scores + r * stride;
        int step = n_rows - r >= 4 ? 4 : n_rows - r == 3 ? 3 : 1;
        if (shape->width == 4) {
            if (step == 4) score_rows_avx512(4, 4, shape, tiles, n_tiles, q, scaling, to, stride);
            else if (step == 3) score_rows_avx512(4, 3, shape, tiles, n_tiles, q, scaling, to, stride);
            else score_rows_avx512(4, 1, shape, tiles, n_tiles, q, scaling, to, stride);
        } else {
            if (step == 4) score_rows_avx512(2, 4, shape, tiles, n_tiles, q, scaling, to, stride);
            else if (step == 3) score_rows_avx512(2, 3, shape, tiles, n_tiles, q, scaling, to, stride);
            else score_rows_avx512(2, 1, shape, tiles, n_tiles, q, scaling, to, stride);
        }
        r += step;
    }
}
#endif

void score_code_tiles(const struct code_shape *shape, const uint8_t *tiles, int64_t n_tiles,
                      const struct code_query *query, int64_t n_rows, float scaling, float *scores, int64_t stride) {
#if HAVE_X86
    if (isa() == ISA_AVX512) {
        fast(shape, tiles, n_tiles, query, n_rows, scaling, scores, stride);
        return;
    }
    if (isa() == ISA_AVX2) {
        plain_avx2(shape, tiles, n_tiles, query, n_rows, scaling, scores, stride);
        return;
    }
#endif
    plain(shape, tiles, n_tiles, query, n_rows, scaling, scores, stride);
}

/* A key's codes, zeros behind the last, into its lane of a tile. */
INLINE void place_codes(const struct code_shape *shape, const uint8_t *codes, struct bounds bounds, uint8_t *tile,
                        int64_t lane) {
    uint32_t *words = (uint32_t *)tile + lane;
    uint16_t *scales = (uint16_t *)(tile + shape->n_vectors * 64);
    for (int64_t v = 0; v < shape->n_vectors; v++) {
        uint32_t word = 0;
        for (int f = 0; f < shape->vector_fields; f++) {
            int64_t field = v * shape->vector_fields + f, channel = shape->bits == 8 ? field / 2 : field;
            uint32_t code = shape->bits == 8 ? codes[channel] >> (field % 2 * 4) & 15 : codes[channel];
            word |= code << (f / 2 * shape->width + f % 2 * 16);
        }
        words[v * TILE_KEYS] = word;
    }
    scales[lane] = bounds.scale;
    scales[TILE_KEYS + lane] = bounds.low;
}

struct pack_job {
    const uint8_t *rows;
    uint8_t *tiles;
    struct code_shape shape;
    int64_t row_group_stride, row_stride, tile_group_stride, first, n;
    int is_bf16;
};

INLINE void pack_group(const struct pack_job *job, int64_t group) {
    float row[MOST_FIELDS / 2];
    uint8_t codes[MOST_FIELDS] = {0};
    const int64_t size = job->is_bf16 ? 2 : 4, head_dim = job->shape.head_dim;
    for (int64_t i = 0; i < job->n; i++) {
        int64_t key = job->first + i;
        load_row(job->rows + (group * job->row_group_stride + i * job->row_stride) * size, job->is_bf16, head_dim, row);
        struct bounds bounds = quantize(row, head_dim, job->shape.bits, codes);
        uint8_t *tile = job->tiles + group * job->tile_group_stride + key / TILE_KEYS * job->shape.tile_bytes;
        if (job->shape.bits == 4)
            place_codes(&(struct code_shape){head_dim, job->shape.n_vectors, job->shape.tile_bytes, 4, 4, 8}, codes, bounds,
                        tile, key % TILE_KEYS);
        else
            place_codes(&job->shape, codes, bounds, tile, key % TILE_KEYS);
    }
}

static void pack_chunk(void *arg, int64_t group) { pack_group(arg, group); }
#if HAVE_X86
static AVX2 void pack_chunk_avx2(void *arg, int64_t group) { pack_group(arg, group); }
static AVX512 void pack_chunk_avx512(void *arg, int64_t group) { pack_group(arg, group); }
#endif

/* Codes of `n` keys that stand at [first, first + n) of each group. `rows`: the first of them, [n_groups][n][head_dim]
   with the strides in elements, bf16 or fp32; `tiles` [n_groups][..][tile_bytes], its stride in bytes.
   head_dim <= 256. */
void key_codes_pack(uintptr_t rows, int is_bf16, int64_t row_group_stride, int64_t row_stride, uintptr_t tiles,
                    int64_t tile_group_stride, int64_t n_groups, int64_t first, int64_t n, int64_t head_dim, int bits,
                    int n_threads) {
    struct pack_job job = {(const uint8_t *)rows, (uint8_t *)tiles, code_shape(head_dim, bits), row_group_stride,
                           row_stride, tile_group_stride, first, n, is_bf16};
    chunk_fn fn = pack_chunk;
#if HAVE_X86
    if (isa() == ISA_AVX512) fn = pack_chunk_avx512;
    else if (isa() == ISA_AVX2) fn = pack_chunk_avx2;
#endif
    parallel_chunks(fn, &job, n_groups, n < 16 ? 1 : n_threads);
}

enum { PART_TILES = 128 };

struct score_job {
    const uint8_t *tiles, *query;
    float *scores;
    struct code_shape shape;
    int64_t tile_group_stride, score_stride, n_share, n, n_parts;
    int is_bf16;
};

static void score_chunk(void *arg, int64_t chunk) {
    const struct score_job *job = arg;
    const int64_t group = chunk / job->n_parts, begin = chunk % job->n_parts * PART_TILES, size = job->is_bf16 ? 2 : 4;
    const int64_t n_tiles = (job->n + TILE_KEYS - 1) / TILE_KEYS;
    const int64_t count = n_tiles - begin < PART_TILES ? n_tiles - begin : PART_TILES;
    const uint8_t *tiles = job->tiles + group * job->tile_group_stride + begin * job->shape.tile_bytes;
    struct code_query query[4];
    for (int64_t r = 0; r < job->n_share; r += 4) {
        int64_t rows = job->n_share - r < 4 ? job->n_share - r : 4, row = group * job->n_share + r;
        for (int64_t i = 0; i < rows; i++)
            take_query(&job->shape, job->query + (row + i) * job->shape.head_dim * size, job->is_bf16, query + i);
        score_code_tiles(&job->shape, tiles, count, query, rows, 1.0f,
                         job->scores + row * job->score_stride + begin * TILE_KEYS, job->score_stride);
    }
}

/* query [n_groups][n_share][head_dim] contiguous, bf16 or fp32, against the first `n` keys of `tiles`, which are
   readable to the end of the last tile. scores [n_groups][n_share][score_stride] fp32, score_stride a multiple of 16 and
   at least n: what lies behind n is undefined. */
void key_codes_scores(uintptr_t tiles, int64_t tile_group_stride, uintptr_t query, int is_bf16, uintptr_t scores,
                      int64_t score_stride, int64_t n_groups, int64_t n_share, int64_t n, int64_t head_dim, int bits,
                      int n_threads) {
    int64_t n_tiles = (n + TILE_KEYS - 1) / TILE_KEYS;
    struct score_job job = {(const uint8_t *)tiles, (const uint8_t *)query, (float *)scores, code_shape(head_dim, bits),
                            tile_group_stride, score_stride, n_share, n, (n_tiles + PART_TILES - 1) / PART_TILES, is_bf16};
    parallel_chunks(score_chunk, &job, n_groups * job.n_parts, n_threads);
}
