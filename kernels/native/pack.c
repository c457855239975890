/* Lossless coding of bf16 keys and values: 8 bits of sign and mantissa as they are, the 8 bits of exponent as a small
   distance from a base of its channel. docs/format.md, "exponent-planes", has the layout:

       u8 width | u8 base[G][D] | u8 sign_mantissa[N] | width bit planes of ceil(N / 8) bytes | escaped exponents

   with N = G * n * D values in the order [G][n][D]. A distance of 2^width - 1 says that the exponent is escaped. */
#include <string.h>

#include "native.h"
#include "pack.h"
#include "runtime.h"

enum { MAX_WIDTH = 5, MAX_STEPS = 8 };

static int exponent_of(uint16_t value) { return value >> 7 & 0xFF; }

/* For each width the base that leaves fewest escapes, the largest of equals, and how many they are: one channel of
   n_tokens values, `step` apart. */
static void best_bases(const uint16_t *values, int64_t n_tokens, int64_t step, uint8_t base[MAX_WIDTH + 1],
                       int64_t escapes[MAX_WIDTH + 1]) {
    uint16_t counts[256] = {0};
    int top = 0;
    for (int64_t t = 0; t < n_tokens; t++) {
        int e = exponent_of(values[t * step]);
        counts[e]++;
        if (e > top) top = e;
    }
    enum { REACH = MAX_STEPS + (1 << MAX_WIDTH) };
    int32_t upto[REACH + 1]; /* upto[k]: values with an exponent in (top - k, top] */
    upto[0] = 0;
    for (int k = 0; k < REACH; k++) upto[k + 1] = upto[k] + (k <= top ? counts[top - k] : 0);
    for (int width = 1; width <= MAX_WIDTH; width++) {
        int codes = (1 << width) - 1, best = -1;
        for (int k = 0; k < MAX_STEPS && k <= top; k++) {
            int covered = upto[k + codes] - upto[k];
            if (covered > best) best = covered, base[width] = (uint8_t)(top - k);
        }
        escapes[width] += n_tokens - best;
    }
}

/* Bit k of the result is bit 0 of byte k of `bytes` (little-endian); the other bits of `bytes` are zero. */
static uint8_t gather_bits(uint64_t bytes) { return (uint8_t)(bytes * 0x0102040810204080u >> 56); }

/* values [G][n][D] contiguous, n < 65536; `out` has room for 1 + G*D + 2*N + 5*ceil(N/8) bytes, `work` for
   8*ceil(N/8) + 6*G*D. Returns bytes used. */
int64_t pack_exponents(uintptr_t values_, int64_t n_groups, int64_t n_tokens, int64_t dim, uintptr_t out_,
                       uintptr_t work) {
    const uint16_t *values = (const uint16_t *)values_;
    const int64_t n = n_groups * n_tokens * dim, channels = n_groups * dim, plane = (n + 7) / 8;
    uint8_t *out = (uint8_t *)out_, *distances = (uint8_t *)work, (*found)[MAX_WIDTH + 1] = (void *)(distances + 8 * plane);
    int64_t escapes[MAX_WIDTH + 1] = {0};
    int width = 1;

    for (int64_t channel = 0; channel < channels; channel++)
        best_bases(values + channel / dim * n_tokens * dim + channel % dim, n_tokens, dim, found[channel], escapes);
    for (int w = 2; w <= MAX_WIDTH; w++)
        if (w * plane + escapes[w] < width * plane + escapes[width]) width = w;

    uint8_t *bases = out + 1, *low = bases + channels, *planes = low + n, *escaped = planes + width * plane;
    out[0] = (uint8_t)width;
    for (int64_t channel = 0; channel < channels; channel++) bases[channel] = found[channel][width];

    const int escape = (1 << width) - 1;
    int64_t i = 0;
    for (int64_t g = 0; g < n_groups; g++)
        for (int64_t t = 0; t < n_tokens; t++)
            for (int64_t d = 0; d < dim; d++, i++) {
                int e = exponent_of(values[i]), distance = bases[g * dim + d] - e;
                low[i] = (uint8_t)((values[i] >> 8 & 0x80) | (values[i] & 0x7F));
                if (distance < 0 || distance >= escape) distance = escape, *escaped++ = (uint8_t)e;
                distances[i] = (uint8_t)distance;
            }
    memset(distances + n, 0, (size_t)(8 * plane - n));
    for (i = 0; i < plane; i++) {
        uint64_t eight;
        memcpy(&eight, distances + 8 * i, 8);
        for (int bit = 0; bit < width; bit++)
            planes[bit * plane + i] = gather_bits(eight >> bit & 0x0101010101010101u);
    }
    return escaped - out;
}

struct frame {
    const uint8_t *bases, *low, *planes, *escaped, *end;
    int64_t n_groups, n_tokens, dim, group_stride, plane;
    int width;
    uint16_t *values;
};

static int unpack_portable(struct frame *f) {
    const int escape = (1 << f->width) - 1;
    int64_t i = 0;
    for (int64_t g = 0; g < f->n_groups; g++)
        for (int64_t at = 0; at < f->n_tokens * f->dim; at++, i++) {
            int distance = 0, e;
            for (int bit = 0; bit < f->width; bit++) distance |= (f->planes[bit * f->plane + i / 8] >> i % 8 & 1) << bit;
            if (distance != escape)
                e = (uint8_t)(f->bases[g * f->dim + at % f->dim] - distance);
            else if (f->escaped < f->end)
                e = *f->escaped++;
            else
                return -1;
            f->values[g * f->group_stride + at] = (uint16_t)((f->low[i] & 0x80) << 8 | e << 7 | f->low[i] & 0x7F);
        }
    return f->escaped == f->end ? 0 : -1;
}

#if HAVE_X86
/* 64 values at a time; dim % 64 == 0. */
INLINE AVX512_VBMI2 int unpack_width(const int WIDTH, struct frame *f) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    int64_t i = 0;
    for (int64_t g = 0; g < f->n_groups; g++) {
        uint16_t *out = f->values + g * f->group_stride;
        for (int64_t t = 0; t < f->n_tokens; t++)
            for (int64_t d = 0; d < f->dim; d += 64, i += 64, out += 64) {
                uint64_t all = ~(uint64_t)0;
                __m512i distance = _mm512_setzero_si512();
                for (int bit = 0; bit < WIDTH; bit++) {
                    uint64_t mask;
                    memcpy(&mask, f->planes + bit * f->plane + i / 8, 8);
                    all &= mask;
                    distance = _mm512_mask_add_epi8(distance, mask, distance, _mm512_set1_epi8((char)(1 << bit)));
                }
                __m512i e = _mm512_sub_epi8(_mm512_loadu_si512(f->bases + g * f->dim + d), distance);
                if (all) {
                    int64_t count = (int64_t)_mm_popcnt_u64(all);
                    if (f->end - f->escaped < count) return -1;
                    e = _mm512_mask_expandloadu_epi8(e, all, f->escaped);
                    f->escaped += count;
                }
                /* a value is two bytes: sign and seven bits of exponent, its last bit and the mantissa */
                __m512i low = _mm512_loadu_si512(f->low + i);
                __m512i upper = _mm512_or_si512(_mm512_and_si512(low, sign),
                                                _mm512_and_si512(_mm512_srli_epi16(e, 1), _mm512_set1_epi8(0x7F)));
                __m512i lower = _mm512_or_si512(_mm512_andnot_si512(sign, low),
                                                _mm512_and_si512(_mm512_slli_epi16(e, 7), sign));
                __m512i a = _mm512_unpacklo_epi8(lower, upper), b = _mm512_unpackhi_epi8(lower, upper);
                const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
                const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
                _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, front, b));
                _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(a, back, b));
            }
    }
    return f->escaped == f->end ? 0 : -1;
}

static AVX512_VBMI2 int unpack_vbmi2(struct frame *f) {
    switch (f->width) {
    case 1: return unpack_width(1, f);
    case 2: return unpack_width(2, f);
    case 3: return unpack_width(3, f);
    case 4: return unpack_width(4, f);
    default: return unpack_width(5, f);
    }
}
#endif

/* Decodes n_bytes into values [G][n][D], `group_stride` elements from group to group. Returns 0, or -1 if the bytes are
   not exactly one frame of this shape (values then hold anything). `portable` forces the plain loop. */
int unpack_exponents(uintptr_t coded_, int64_t n_bytes, uintptr_t values, int64_t group_stride, int64_t n_groups,
                     int64_t n_tokens, int64_t dim, int portable) {
    const uint8_t *coded = (const uint8_t *)coded_;
    const int64_t n = n_groups * n_tokens * dim, channels = n_groups * dim, plane = (n + 7) / 8;
    if (n_bytes < 1 || coded[0] < 1 || coded[0] > MAX_WIDTH || n_bytes < 1 + channels + n + coded[0] * plane) return -1;
    struct frame f = {.bases = coded + 1, .low = coded + 1 + channels, .planes = coded + 1 + channels + n,
                      .escaped = coded + 1 + channels + n + coded[0] * plane, .end = coded + n_bytes,
                      .n_groups = n_groups, .n_tokens = n_tokens, .dim = dim, .group_stride = group_stride,
                      .plane = plane, .width = coded[0], .values = (uint16_t *)values};
#if HAVE_X86
    if (!portable && dim % 64 == 0 && has_avx512_vbmi2()) return unpack_vbmi2(&f);
#endif
    (void)portable;
    return unpack_portable(&f);
}
