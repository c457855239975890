/* e^x as the kernels that weigh tokens compute it, in plain C that compilers turn into vectors. */
#ifndef SESSIOND_SOFTMAX_INLINE_H
#define SESSIOND_SOFTMAX_INLINE_H

#include <math.h>

#include "native.h"

/* e^x for x <= 0, relative error below 3e-7; exactly 0 below -87 and for -inf, NaN for NaN. */
INLINE float exp_falling(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
    float held = x < -87.0f ? -87.0f : x;
    union { float value; int32_t bits; } whole = {held * 1.44269504088896341f + magic}, power;
    float rounded = whole.value - magic;
    float f = held - rounded * 0.693359375f; /* ln 2 in two parts: the first product is exact */
    f = f + rounded * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    power.bits = (int32_t)((uint32_t)(whole.bits + 127) << 23); /* 2^rounded */
    return x < -87.0f ? 0.0f : p * power.value;
}

/* The largest of row[n]; -inf for none. NaN is passed over: it comes back in the sum. */
INLINE float row_max(const float *row, int64_t n) {
    float most[16];
    for (int j = 0; j < 16; j++) most[j] = -INFINITY;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) most[j] = row[i + j] > most[j] ? row[i + j] : most[j];
    for (; i < n; i++) most[0] = row[i] > most[0] ? row[i] : most[0];
    for (int j = 1; j < 16; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
    return most[0];
}

/* row[i] becomes e^(row[i] - max); returns their sum, by 16 lanes: NaN if a number is NaN. */
INLINE float soften(float *row, int64_t n, float max) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            float e = exp_falling(row[i + j] - max);
            row[i + j] = e;
            sums[j] += e;
        }
    for (; i < n; i++) sums[i % 16] += row[i] = exp_falling(row[i] - max);
    for (int step = 8; step; step /= 2)
        for (int j = 0; j < step; j++) sums[j] += sums[j + step];
    return sums[0];
}

#endif
