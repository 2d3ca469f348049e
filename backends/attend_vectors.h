// Vectors of the CPU that this is compiled for, and functions of them.
#pragma once
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 12;
#else
constexpr int LANES = 4, ACCUMULATORS = 12;
#endif
constexpr int CHUNK = 256;  // keys whose scores are held at a time
constexpr int BLOCK = 64;   // queries and keys of one block of the layout
constexpr int VECTORS = 2, GROUP = VECTORS * LANES;
constexpr int TILE = 16;                      // rows that Intel AMX multiplies at a time
constexpr int PAIR_ROWS = CHUNK / 2 + TILE;   // those of a chunk's pairs of keys, and of the tile that they may not fill
constexpr int KEYS = ACCUMULATORS / VECTORS, WIDTH = ACCUMULATORS / VECTORS;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

inline Vec splat(float x) { return Vec{} + x; }
// The second operand if one is NaN.
inline Vec greater(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline Vec &at(float *p, int64_t j, int n) { return *(Vec *)(p + (j * VECTORS + n) * LANES); }
inline const Vec &at(const float *p, int64_t j, int n) { return *(const Vec *)(p + (j * VECTORS + n) * LANES); }

inline bool any(Int x) {
    int32_t found = 0;
    for (int t = 0; t < LANES; t++) found |= x[t];
    return found != 0;
}

inline Vec whole(Vec x) { return x + 12582912.f - 12582912.f; }  // the nearest number without a fraction

// 2^(n + f) for a whole n of at least -300 and |f| <= 1/2: a minimax polynomial, with a relative error of 2e-9 before rounding.
__attribute__((always_inline)) inline Vec power_of_two(Vec n, Vec f) {
    Vec p = splat(1.5353361913e-4f);
    p = p * f + 1.3398874434e-3f;
    p = p * f + 9.6184373578e-3f;
    p = p * f + 5.5503324711e-2f;
    p = p * f + 2.4022647914e-1f;
    p = p * f + 6.9314720286e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Int e = __builtin_convertvector(n, Int), half = e >> 1;  // two factors: 2^e alone may not be representable
    return p * (Vec)((half + 127) << 23) * (Vec)((e - half + 127) << 23);
#endif
}

// exp for at most 88; exactly 0 for -inf, NaN for NaN.
__attribute__((always_inline)) inline Vec exponential(Vec x) {
    constexpr float LOG2_E = 1.44269504088896341f;
    x = greater(splat(-150.f), x);
    const Vec n = whole(x * LOG2_E);
    return power_of_two(n, x * LOG2_E - n);
}

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose digits.
inline Vec hyperbolic_tangent(Vec x) {
    const Vec z = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    const Vec size = x < splat(0.f) ? -x : x;
    const Vec twice = 2.f * size, far = 1.f - 2.f / (exponential(twice > splat(88.f) ? splat(88.f) : twice) + 1.f);
    return size < splat(0.625f) ? p : x < splat(0.f) ? -far : far;
}

template <int STEP> inline void exchange(Vec *v) {
    Int low, high;
    for (int t = 0; t < LANES; t++) {
        low[t] = t & STEP ? LANES + t - STEP : t;
        high[t] = t & STEP ? LANES + t : t + STEP;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & STEP) continue;
        const Vec a = v[i], b = v[i + STEP];
#if defined(__clang__)
        for (int t = 0; t < LANES; t++) {
            v[i][t] = low[t] < LANES ? a[low[t]] : b[low[t] - LANES];
            v[i + STEP][t] = high[t] < LANES ? a[high[t]] : b[high[t] - LANES];
        }
#else
        v[i] = __builtin_shuffle(a, b, low);
        v[i + STEP] = __builtin_shuffle(a, b, high);
#endif
    }
}

inline void transpose(Vec *v) {
    exchange<1>(v);
    exchange<2>(v);
    if constexpr (LANES > 4) exchange<4>(v);
    if constexpr (LANES > 8) exchange<8>(v);
}

}  // namespace
