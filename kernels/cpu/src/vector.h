// Vectors of LANES floats, made of the compiler's own vector types, so that one source serves AVX-512, AVX2 with FMA,
// NEON and plain code. What only one machine has (masks, bf16 conversion) is here and nowhere else.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

INLINE vf splat(float x) { return x - vf{}; }

// --- loads: fp32 or bf16 in memory, fp32 in registers; the first n lanes, zeros behind them --------------------------

INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load(const bf16* p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
}

template <class T>
INLINE vf load(const T* p, int n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    const vu half = (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
    return (vf)(half << 16);
#else
    T part[LANES] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load(part);
#endif
}

// --- stores: rounded to nearest even where bf16 ----------------------------------------------------------------------

INLINE vh narrow(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    const vu bits = (vu)v;
    const vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const vu kept = v == v ? rounded : bits | 0x400000;  // a NaN stays one
    return __builtin_convertvector(kept >> 16, vh);
#endif
}

INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

INLINE void store(bf16* p, vf v) {
    const vh half = narrow(v);
    memcpy(p, &half, sizeof half);
}

template <class T>
INLINE void store(T* p, vf v, int n) {
    if (n >= LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    for (int i = 0; i < n; i++) p[i] = part[i];
}

// What a load of v would find after a store as T.
INLINE vf stored(vf v, const float*) { return v; }

INLINE vf stored(vf v, const bf16*) { return (vf)(__builtin_convertvector(narrow(v), vu) << 16); }

INLINE float sum_lanes(vf v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

template <class T>
INLINE void prefetch(const T* p) {
    __builtin_prefetch(p, 0, 2);
}

// --- sigmoid: 1 / (1 + e^y), y = -x; e^y = 2^n e^r with Cephes' expf polynomial, within an ulp or so -----------------

INLINE vf sigmoid(vf x) {
    vf y = -x;
    y = y > 87.0f ? splat(87.0f) : y;
    y = y < -87.0f ? splat(-87.0f) : y;
    const vf shifted = y * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: n in the low bits
    const vf n = shifted - 12582912.0f;
    const vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vf power = (vf)((vu)p + ((vu)shifted << 23));
    return 1.0f / (1.0f + power);
}

struct Silu {
    vf value, slope;  // a = x σ, and a' = σ + a (1 - σ)
};

INLINE Silu silu(vf x) {
    const vf s = sigmoid(x), a = x * s;
    return {a, s + a * (1.0f - s)};
}
