/* out = x @ weight.T for any number of rows, of weights in 16, 8 or 4 bits.

   Every weight is read once for a group of rows; one row is bound by memory, many by arithmetic. 16-bit weights
   multiply bf16 rows pair by pair. Others multiply rows in int8 codes, block by block of 32 inputs: whole products of a
   block are exact in int32, then scaled and summed in fp32 (the scheme of llama.cpp's Q8_1 rows). A result's order of
   additions is the order of inputs, whatever the number of rows and threads: a row is the same alone and beside others. */
#include "product_inline.h"

#include "arithmetic_inline.h"

/* Blocks of weights are asked for so long before they are multiplied: the processor's own guess comes too late where
   several rows are multiplied meanwhile (a step of 16 rows: 11.3 ms without, 8.3 with it). */
enum { MOST = 8 /* rows at a time */, TILES = 4 /* of a chunk */, AHEAD = 16 /* blocks, or pairs of 16-bit weights */ };

/* Results of a chunk: TILES * LANES outputs of a few rows. */
typedef float results[MOST][TILES * LANES];

INLINE float from_fp16(uint16_t half) {
#if defined(__FLT16_MAX__)
    union { uint16_t bits; _Float16 value; } word = {half};
    return (float)word.value;
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    union { uint32_t bits; float value; } word = {rest << 13};
    if (rest >= 0x7C00) word.bits |= 0x7F800000;
    else word.value *= 5.192296858534828e33f; /* 2^112: the exponents' biases differ by that */
    word.bits |= sign;
    return word.value;
#endif
}

/* ---- any processor ---- */

INLINE void tile_plain(const struct matrix *m, const struct operand *x, int64_t tile, int64_t row, int n_rows,
                       results out, int at) {
    const int64_t n_in = m->n_in, n_blocks = n_in / BLOCK;
    const uint16_t *scales = (const uint16_t *)m->scales + tile * n_blocks * LANES;
    const uint16_t *lows = (const uint16_t *)m->lows + tile * n_blocks * LANES;
    for (int r = 0; r < n_rows; r++) {
        float acc[LANES] = {0};
        if (m->bits == 16) {
            const uint32_t *pairs = (const uint32_t *)m->codes + tile * n_in / 2 * LANES;
            const uint16_t *row_in = x->bf16 + (row + r) * n_in;
            for (int64_t k = 0; k < n_in / 2; k++, pairs += LANES) {
                float first = from_bf16(row_in[2 * k]), second = from_bf16(row_in[2 * k + 1]);
                for (int i = 0; i < LANES; i++) {
                    union { uint32_t bits; float value; } low = {pairs[i] << 16}, high = {pairs[i] & 0xFFFF0000u};
                    acc[i] += low.value * first;
                    acc[i] += high.value * second;
                }
            }
        } else {
            const uint8_t *codes = (const uint8_t *)m->codes + tile * n_in * LANES * m->bits / 8;
            for (int64_t b = 0; b < n_blocks; b++) {
                const int8_t *q = x->codes + (row + r) * n_in + b * BLOCK;
                const int64_t place = (row + r) * n_blocks + b;
                int32_t sum[LANES];
                for (int i = 0; i < LANES; i++) sum[i] = m->bits == 8 ? x->shifts[place] : 0;
                if (m->bits == 8) {
                    for (int j = 0; j < 8; j++, codes += 4 * LANES)
                        for (int i = 0; i < LANES; i++)
                            for (int c = 0; c < 4; c++) sum[i] += codes[4 * i + c] * q[4 * j + c];
                } else {
                    for (int j = 0; j < 4; j++, codes += 4 * LANES)
                        for (int i = 0; i < LANES; i++)
                            for (int c = 0; c < 4; c++)
                                sum[i] += (codes[4 * i + c] & 15) * q[4 * j + c] + (codes[4 * i + c] >> 4) * q[16 + 4 * j + c];
                }
                for (int i = 0; i < LANES; i++) {
                    acc[i] += from_fp16(scales[b * LANES + i]) * x->scales[place] * (float)sum[i];
                    if (m->bits == 4) acc[i] += from_fp16(lows[b * LANES + i]) * x->sums[place];
                }
            }
        }
        for (int i = 0; i < LANES; i++) out[r][at + i] = acc[i];
    }
}

#if HAVE_X86

/* ---- AVX2: eight outputs at a time ---- */

/* Sums over four neighbours of unsigned codes below 16 times signed ones: at most 2 * 15 * 127 before widening. */
INLINE AVX2 __m256i small_products(__m256i codes, __m256i q, int16_t factor) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(factor));
}

INLINE AVX2 __m256i four_codes(const int8_t *q) {
    int32_t four;
    __builtin_memcpy(&four, q, sizeof four);
    return _mm256_set1_epi32(four);
}

static AVX2 void tile_codes_avx2(const struct matrix *m, const struct operand *x, int64_t tile, int64_t row, int n_rows,
                                 results out, int at) {
    const int64_t n_in = m->n_in, n_blocks = n_in / BLOCK;
    const uint16_t *scales = (const uint16_t *)m->scales + tile * n_blocks * LANES;
    const uint16_t *lows = (const uint16_t *)m->lows + tile * n_blocks * LANES;
    const __m256i half = _mm256_set1_epi8(15);
    for (int r = 0; r < n_rows; r++)
        for (int part = 0; part < LANES; part += 8) {
            const uint8_t *codes = (const uint8_t *)m->codes + tile * n_in * LANES * m->bits / 8 + 4 * part;
            __m256 acc = _mm256_setzero_ps();
            for (int64_t b = 0; b < n_blocks; b++) {
                const int8_t *q = x->codes + (row + r) * n_in + b * BLOCK;
                const int64_t place = (row + r) * n_blocks + b, side = b * LANES + part;
                __m256i sum = _mm256_set1_epi32(m->bits == 8 ? x->shifts[place] : 0);
                for (int j = 0; j < m->bits; j++, codes += 4 * LANES) {
                    __m256i both = _mm256_loadu_si256((const __m256i *)codes);
                    __m256i low = _mm256_and_si256(both, half), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
                    __m256i later = four_codes(m->bits == 8 ? q + 4 * j : q + 16 + 4 * j);
                    sum = _mm256_add_epi32(sum, small_products(low, four_codes(q + 4 * j), 1));
                    sum = _mm256_add_epi32(sum, small_products(high, later, m->bits == 8 ? 16 : 1));
                }
                __m256 scale = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + side))),
                                             _mm256_set1_ps(x->scales[place]));
                acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), acc);
                if (m->bits == 4)
                    acc = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(lows + side))),
                                          _mm256_set1_ps(x->sums[place]), acc);
            }
            _mm256_storeu_ps(out[r] + at + part, acc);
        }
}

/* ---- AVX-512 with BF16 and VNNI: sixteen outputs at a time, each weight unpacked once for NR rows ---- */

INLINE AVX512 __m512i broadcast_four(const void *four_bytes) {
    int32_t four;
    __builtin_memcpy(&four, four_bytes, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE AVX512 void fetch(const void *line) { _mm_prefetch((const char *)line, _MM_HINT_T0); }

INLINE AVX512 __m512 sixteen_halves(const uint16_t *halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}

INLINE AVX512 void tile_codes(const int BITS, const int NR, const struct matrix *m, const struct operand *x, int64_t tile,
                              int64_t row, results out, int at) {
    const int64_t n_in = m->n_in, n_blocks = n_in / BLOCK;
    const uint8_t *codes = (const uint8_t *)m->codes + tile * n_in * LANES * BITS / 8;
    const uint16_t *scales = (const uint16_t *)m->scales + tile * n_blocks * LANES;
    const uint16_t *lows = (const uint16_t *)m->lows + tile * n_blocks * LANES;
    const int8_t *q = x->codes + row * n_in;
    const int64_t first = row * n_blocks;
    const __m512i half = _mm512_set1_epi8(15);
    __m512 acc[MOST];
    for (int r = 0; r < NR; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, codes += BLOCK * LANES * BITS / 8) {
        for (int j = 0; j < BITS; j++) fetch(codes + 64 * (j + AHEAD * BITS));
        if (b % 2 == 0) { /* a line holds sides of two blocks */
            fetch(scales + (b + AHEAD) * LANES);
            if (BITS == 4) fetch(lows + (b + AHEAD) * LANES);
        }
        __m512i w[8];
        for (int j = 0; j < BITS; j++) w[j] = _mm512_loadu_si512(codes + 64 * j);
        if (BITS == 4)
            for (int j = 0; j < 4; j++) {
                w[4 + j] = _mm512_and_si512(_mm512_srli_epi16(w[j], 4), half);
                w[j] = _mm512_and_si512(w[j], half);
            }
        __m512 scale = sixteen_halves(scales + b * LANES);
        __m512 low = BITS == 4 ? sixteen_halves(lows + b * LANES) : _mm512_setzero_ps();
        __m512i sum[MOST];
        for (int r = 0; r < NR; r++)
            sum[r] = BITS == 8 ? _mm512_set1_epi32(x->shifts[first + r * n_blocks + b]) : _mm512_setzero_si512();
        for (int j = 0; j < 8; j++)
            for (int r = 0; r < NR; r++)
                sum[r] = _mm512_dpbusd_epi32(sum[r], w[j], broadcast_four(q + r * n_in + b * BLOCK + 4 * j));
        for (int r = 0; r < NR; r++) {
            const int64_t place = first + r * n_blocks + b;
            __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x->scales[place]));
            acc[r] = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(sum[r]), acc[r]);
            if (BITS == 4) acc[r] = _mm512_fmadd_ps(low, _mm512_set1_ps(x->sums[place]), acc[r]);
        }
    }
    for (int r = 0; r < NR; r++) _mm512_storeu_ps(out[r] + at, acc[r]);
}

/* NT tiles side by side: one row alone needs several sums under way. */
INLINE AVX512 void tiles_bf16(const int NR, const int NT, const struct matrix *m, const struct operand *x, int64_t tile,
                              int64_t row, results out, int at) {
    const int64_t n_in = m->n_in;
    const uint16_t *w = (const uint16_t *)m->codes + tile * n_in * LANES, *in = x->bf16 + row * n_in;
    __m512 acc[MOST][4];
    for (int r = 0; r < NR; r++)
        for (int t = 0; t < NT; t++) acc[r][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_in; k += 2) {
        __m512bh weights[4];
        for (int t = 0; t < NT; t++) fetch(w + (t * n_in + k + 2 * AHEAD) * LANES);
        for (int t = 0; t < NT; t++) weights[t] = (__m512bh)_mm512_loadu_si512(w + (t * n_in + k) * LANES);
        for (int r = 0; r < NR; r++) {
            __m512bh pair = (__m512bh)broadcast_four(in + r * n_in + k);
            for (int t = 0; t < NT; t++) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], weights[t], pair);
        }
    }
    for (int r = 0; r < NR; r++)
        for (int t = 0; t < NT; t++) _mm512_storeu_ps(out[r] + at + t * LANES, acc[r][t]);
}

INLINE AVX512 void rows_avx512(const int NR, const struct matrix *m, const struct operand *x, int64_t tile, int64_t n_tiles,
                               int64_t row, results out) {
    int64_t t = 0;
    if (m->bits == 16) {
        const int together = NR > 4 ? 2 : 4;
        for (; t + together <= n_tiles; t += together)
            tiles_bf16(NR, together, m, x, tile + t, row, out, (int)t * LANES);
        for (; t < n_tiles; t++) tiles_bf16(NR, 1, m, x, tile + t, row, out, (int)t * LANES);
    } else if (m->bits == 8) {
        for (; t < n_tiles; t++) tile_codes(8, NR, m, x, tile + t, row, out, (int)t * LANES);
    } else {
        for (; t < n_tiles; t++) tile_codes(4, NR, m, x, tile + t, row, out, (int)t * LANES);
    }
}

static AVX512 int some_rows_avx512(const struct matrix *m, const struct operand *x, int64_t tile, int64_t n_tiles,
                                   int64_t row, int64_t left, results out) {
    if (left >= 8) return rows_avx512(8, m, x, tile, n_tiles, row, out), 8;
    if (left >= 4) return rows_avx512(4, m, x, tile, n_tiles, row, out), 4;
    if (left >= 2) return rows_avx512(2, m, x, tile, n_tiles, row, out), 2;
    return rows_avx512(1, m, x, tile, n_tiles, row, out), 1;
}
#endif

/* ---- what becomes of results ---- */

INLINE void finish_rows(const struct product *p, int64_t tile, int64_t n_tiles, int64_t row, int n_rows, results found) {
    const struct matrix *m = p->matrix;
    const int64_t o = tile * LANES;
    const int64_t n = m->n_out - o < n_tiles * LANES ? m->n_out - o : n_tiles * LANES;
    const float *bias = (const float *)m->bias;
    for (int r = 0; r < n_rows; r++) {
        if (bias)
            for (int64_t i = 0; i < n; i++) found[r][i] += bias[o + i];
        if (p->epilogue == GATE) {
            float gated[BLOCK];
            if (p->activation == SILU)
                for (int i = 0; i < BLOCK; i++) gated[i] = silu(found[r][i]) * found[r][BLOCK + i];
            else
                for (int i = 0; i < BLOCK; i++) gated[i] = gelu_tanh(found[r][i]) * found[r][BLOCK + i];
            operand_block(&p->next, p->next_bits, row + r, tile / TILES, gated);
        } else if (p->epilogue == ADD) {
            float *out = p->out + (row + r) * m->n_out + o;
            for (int64_t i = 0; i < n; i++) out[i] += found[r][i];
        } else {
            float *out = p->out + (row + r) * m->n_out + o;
            for (int64_t i = 0; i < n; i++) out[i] = found[r][i];
        }
    }
}

/* ---- chunks of outputs, all rows each ---- */

struct shared_product {
    const struct product *product;
    int64_t tiles, tiles_a_chunk;
};

INLINE void bounds(const struct shared_product *shared, int64_t chunk, int64_t *tile, int64_t *n_tiles) {
    *tile = chunk * shared->tiles_a_chunk;
    *n_tiles = shared->tiles - *tile < shared->tiles_a_chunk ? shared->tiles - *tile : shared->tiles_a_chunk;
}

static void chunk_portable(void *arg, int64_t chunk) {
    const struct shared_product *shared = arg;
    const struct product *p = shared->product;
    int64_t tile, n_tiles;
    bounds(shared, chunk, &tile, &n_tiles);
    for (int64_t row = 0; row < p->rows; row += MOST) {
        int n_rows = p->rows - row < MOST ? (int)(p->rows - row) : MOST;
        results found;
        for (int64_t t = 0; t < n_tiles; t++) tile_plain(p->matrix, &p->x, tile + t, row, n_rows, found, (int)t * LANES);
        finish_rows(p, tile, n_tiles, row, n_rows, found);
    }
}

#if HAVE_X86
static AVX2 void chunk_avx2(void *arg, int64_t chunk) {
    const struct shared_product *shared = arg;
    const struct product *p = shared->product;
    int64_t tile, n_tiles;
    bounds(shared, chunk, &tile, &n_tiles);
    for (int64_t row = 0; row < p->rows; row += MOST) {
        int n_rows = p->rows - row < MOST ? (int)(p->rows - row) : MOST;
        results found;
        for (int64_t t = 0; t < n_tiles; t++) {
            if (p->matrix->bits == 16) tile_plain(p->matrix, &p->x, tile + t, row, n_rows, found, (int)t * LANES);
            else tile_codes_avx2(p->matrix, &p->x, tile + t, row, n_rows, found, (int)t * LANES);
        }
        finish_rows(p, tile, n_tiles, row, n_rows, found);
    }
}

static AVX512 void chunk_avx512(void *arg, int64_t chunk) {
    const struct shared_product *shared = arg;
    const struct product *p = shared->product;
    int64_t tile, n_tiles;
    bounds(shared, chunk, &tile, &n_tiles);
    for (int64_t row = 0; row < p->rows;) {
        results found;
        int n_rows = some_rows_avx512(p->matrix, &p->x, tile, n_tiles, row, p->rows - row, found);
        finish_rows(p, tile, n_tiles, row, n_rows, found);
        row += n_rows;
    }
}
#endif

void run_product(const struct product *product, int n_threads) {
    int64_t tiles = (product->matrix->n_out + LANES - 1) / LANES;
    int64_t each = product->epilogue == GATE || tiles > 128 ? TILES : TILES / 2;
    struct shared_product shared = {product, tiles, each};
    chunk_fn fn = chunk_portable;
#if HAVE_X86
    if (isa() == ISA_AVX512) fn = chunk_avx512;
    else if (isa() == ISA_AVX2) fn = chunk_avx2;
#endif
    parallel_chunks(fn, &shared, (tiles + each - 1) / each, n_threads);
}

void few_rows_product(const struct matrix *matrix, const uint16_t *x, int n_rows, float *out) {
    const struct operand in = {.bf16 = (uint16_t *)x, .n = matrix->n_in};
    const int64_t tiles = matrix->n_out / LANES;
    for (int row = 0; row < n_rows;)
        for (int64_t tile = 0, done = 0; tile < tiles; tile += TILES) {
            int64_t n_tiles = tiles - tile < TILES ? tiles - tile : TILES;
            results found;
#if HAVE_X86
            if (isa() == ISA_AVX512) done = some_rows_avx512(matrix, &in, tile, n_tiles, row, n_rows - row, found);
            else
#endif
                for (int64_t t = 0; t < n_tiles; t++) tile_plain(matrix, &in, tile + t, row, (int)(done = n_rows - row), found, (int)t * LANES);
            for (int64_t r = 0; r < done; r++)
                for (int64_t i = 0; i < n_tiles * LANES; i++) out[(row + r) * matrix->n_out + tile * LANES + i] = found[r][i];
            if (tile + TILES >= tiles) row += (int)done;
        }
}

/* ---- operands ---- */

static int64_t whole_lines(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

int64_t operand_bytes(int64_t rows, int64_t n) {
    return whole_lines(rows * n * 2) + whole_lines(rows * n) + 3 * whole_lines(rows * (n / BLOCK) * 4);
}

struct operand operand_at(void *work, int64_t rows, int64_t n) {
    char *at = work;
    struct operand x = {.n = n};
    x.bf16 = (uint16_t *)at, at += whole_lines(rows * n * 2);
    x.codes = (int8_t *)at, at += whole_lines(rows * n);
    x.scales = (float *)at, at += whole_lines(rows * (n / BLOCK) * 4);
    x.sums = (float *)at, at += whole_lines(rows * (n / BLOCK) * 4);
    x.shifts = (int32_t *)at;
    return x;
}

int64_t matrix_work(int64_t rows, int64_t n_in) { return operand_bytes(rows, n_in); }

struct widening {
    struct operand x;
    const uint16_t *from;
};

INLINE void widen_row(void *arg, int64_t row) {
    const struct widening *job = arg;
    for (int64_t block = 0; block < job->x.n / BLOCK; block++) {
        float values[BLOCK];
        for (int i = 0; i < BLOCK; i++) values[i] = from_bf16(job->from[row * job->x.n + block * BLOCK + i]);
        operand_block(&job->x, 8, row, block, values);
    }
}
EACH_LEVEL(widen_row)

void matrix_product(const struct matrix *matrix, uintptr_t x, int64_t rows, uintptr_t out, uintptr_t work,
                    int n_threads) {
    struct operand in = operand_at((void *)work, rows, matrix->n_in);
    if (matrix->bits == 16) {
        in.bf16 = (uint16_t *)x;
    } else {
        struct widening job = {in, (const uint16_t *)x};
        parallel_chunks(AT_LEVEL(widen_row), &job, rows, rows > 16 ? n_threads : 1);
    }
    struct product product = {.matrix = matrix, .x = in, .out = (float *)out, .rows = rows, .epilogue = STORE};
    run_product(&product, n_threads);
}
