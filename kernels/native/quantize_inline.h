/* Numbers as codes of few bits between their smallest and their largest: a scale and a low, both in bf16. */
#ifndef SESSIOND_QUANTIZE_INLINE_H
#define SESSIOND_QUANTIZE_INLINE_H

#include <math.h>

#include "native.h"

struct bounds {
    uint16_t scale, low;
};

INLINE void load_row(const void *from, int is_bf16, int64_t n, float *to) {
    if (is_bf16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t *)from)[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = ((const float *)from)[i];
}

/* codes[i] = round((row[i] - low) / scale), ties to even, n > 0. A number that is none makes scale and low NaN: whatever
   is computed from the codes is NaN then, as it would be from the numbers. */
INLINE struct bounds quantize(const float *row, int64_t n, int bits, uint8_t *codes) {
    const float most = (float)((1 << bits) - 1);
    float least[16], largest[16], strange = 0.0f;
    for (int j = 0; j < 16; j++) least[j] = largest[j] = row[0];
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            float x = row[i + j];
            least[j] = x < least[j] ? x : least[j];
            largest[j] = x > largest[j] ? x : largest[j];
        }
    for (; i < n; i++) {
        least[0] = row[i] < least[0] ? row[i] : least[0];
        largest[0] = row[i] > largest[0] ? row[i] : largest[0];
    }
    int n_strange = 0;
    for (i = 0; i < n; i++) n_strange += row[i] != row[i];
    if (n_strange) strange = NAN;
    for (int j = 1; j < 16; j++) {
        least[0] = least[j] < least[0] ? least[j] : least[0];
        largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
    }
    float step = (largest[0] - least[0]) / most;
    if (step < 1e-8f) step = 1e-8f;
    struct bounds bounds = {to_bf16(step + strange), to_bf16(least[0] + strange)};
    const float scale = from_bf16(bounds.scale), low = from_bf16(bounds.low);
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds a small number to a whole one */
    for (i = 0; i < n; i++) {
        float code = (row[i] - low) / scale;
        code = code > 0.0f ? code : 0.0f; /* NaN too */
        code = code < most ? code : most;
        codes[i] = (uint8_t)(int)((code + magic) - magic);
    }
    return bounds;
}

#endif
