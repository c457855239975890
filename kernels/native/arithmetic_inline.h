/* Functions of one number that compilers vectorize: no calls, no branches, no tables. */
#ifndef SESSIOND_ARITHMETIC_INLINE_H
#define SESSIOND_ARITHMETIC_INLINE_H

#include "native.h"

/* e^x, relative error below 2e-7 within [-87, 88]; clamped beyond. NaN stays NaN. */
INLINE float exp_lane(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    clamped = clamped > 88.0f ? 88.0f : clamped;
    float shifted = clamped * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
    float whole = shifted - 12582912.0f;
    float f = clamped - whole * 0.693359375f;
    f = f + whole * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    union { float value; int32_t bits; } n = {shifted}, power;
    power.bits = (n.bits - 0x4B400000 + 127) << 23;
    return p * power.value;
}

INLINE float silu(float x) { return x / (1.0f + exp_lane(-x)); }

/* GELU by its tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415). */
INLINE float gelu_tanh(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x * (1.0f - 1.0f / (1.0f + exp_lane(2.0f * inner)));
}

#endif
