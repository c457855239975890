/* Rows of keys or values in 2, 4 or 8 bits, row by row: what stands in for them (policies/quantized.py). */
#include <string.h>

#include "quantize_inline.h"
#include "quantize.h"

enum { MOST_WIDTH = 1024 };

struct quantize_job {
    const uint8_t *rows;
    uint8_t *codes;
    uint16_t *scales;
    int64_t row_group_stride, row_stride, code_group_stride, code_stride, scale_group_stride, scale_stride;
    int64_t n, width, shared;
    int is_bf16, bits;
};

/* One row: its codes by byte, the first of them in the lowest bits, then B codes further the next. */
INLINE void pack_codes(const uint8_t *codes, int64_t n_bytes, int bits, uint8_t *out) {
    for (int64_t i = 0; i < n_bytes; i++) {
        uint8_t packed = codes[i];
        for (int part = 1; part < 8 / bits; part++) packed |= (uint8_t)(codes[part * n_bytes + i] << (part * bits));
        out[i] = packed;
    }
}

INLINE void quantize_group(const struct quantize_job *job, int64_t group) {
    const int64_t size = job->is_bf16 ? 2 : 4, n_bytes = (job->width * job->bits + 7) / 8;
    const int64_t n_shares = (job->width + job->shared - 1) / job->shared;
    float row[MOST_WIDTH];
    uint8_t codes[MOST_WIDTH + 8] = {0}; /* zeros fill the last bytes up */
    for (int64_t i = 0; i < job->n; i++) {
        uint16_t *scales = job->scales + group * job->scale_group_stride + i * job->scale_stride;
        load_row(job->rows + (group * job->row_group_stride + i * job->row_stride) * size, job->is_bf16, job->width, row);
        for (int64_t p = 0; p < n_shares; p++) {
            int64_t at = p * job->shared, n = job->width - at < job->shared ? job->width - at : job->shared;
            struct bounds bounds = quantize(row + at, n, job->bits, codes + at);
            scales[p] = bounds.scale, scales[n_shares + p] = bounds.low;
        }
        uint8_t *out = job->codes + group * job->code_group_stride + i * job->code_stride;
        if (job->bits == 8) memcpy(out, codes, (size_t)n_bytes);
        else if (job->bits == 4) pack_codes(codes, n_bytes, 4, out);
        else pack_codes(codes, n_bytes, 2, out);
    }
}

static void quantize_chunk(void *arg, int64_t group) { quantize_group(arg, group); }
#if HAVE_X86
static AVX2 void quantize_chunk_avx2(void *arg, int64_t group) { quantize_group(arg, group); }
static AVX512 void quantize_chunk_avx512(void *arg, int64_t group) { quantize_group(arg, group); }
#endif

/* rows [n_groups][n][width], bf16 or fp32, width <= 1024; `shared` numbers of a row share a scale and a low, S shares.
   codes [n_groups][n][width * bits / 8, rounded up] bytes, scales [n_groups][n][2 * S] bf16: scales, then lows.
   All strides in elements; the last axes are contiguous. */
void quantize_rows(uintptr_t rows, int is_bf16, int64_t row_group_stride, int64_t row_stride, uintptr_t codes,
                   int64_t code_group_stride, int64_t code_stride, uintptr_t scales, int64_t scale_group_stride,
                   int64_t scale_stride, int64_t n_groups, int64_t n, int64_t width, int bits, int64_t shared,
                   int n_threads) {
    struct quantize_job job = {(const uint8_t *)rows, (uint8_t *)codes, (uint16_t *)scales, row_group_stride, row_stride,
                               code_group_stride, code_stride, scale_group_stride, scale_stride, n, width, shared,
                               is_bf16, bits};
    chunk_fn fn = quantize_chunk;
#if HAVE_X86
    if (isa() == ISA_AVX512) fn = quantize_chunk_avx512;
    else if (isa() == ISA_AVX2) fn = quantize_chunk_avx2;
#endif
    parallel_chunks(fn, &job, n_groups, n < 16 ? 1 : n_threads);
}
