// Vectors of LANES floats, made of the compiler's own vector types, so that one source serves AVX-512, AVX2 with FMA,
// NEON and plain code. What only one machine has (masks, bf16 conversion) is here and nowhere else.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
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

// A store past the caches, for what is next read when it has long left them: p is a multiple of the vector's bytes. Other
// threads see it behind the barrier that ends a parallel region, whose locked instructions wait for such stores too.
template <class T>
INLINE void stream(T* p, vf v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_stream_ps((float*)p, (__m512)v);
    else
        _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        _mm256_stream_ps((float*)p, (__m256)v);
    else
        _mm_stream_si128((__m128i*)p, (__m128i)narrow(v));
#else
    store(p, v);
#endif
}

template <class T>
INLINE void store(T* p, vf v, int n) {
    if (n >= LANES) return store(p, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = (__mmask16)((1u << n) - 1);
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, mask, (__m512)v);
    else
        _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v));
    return;
#endif
    T part[LANES];
    store(part, v);
    for (int i = 0; i < n; i++) p[i] = part[i];
}

// What a load of v would find after a store as T.
INLINE vf stored(vf v, const float*) { return v; }

INLINE vf stored(vf v, const bf16*) { return (vf)(__builtin_convertvector(narrow(v), vu) << 16); }

// Cells of numbers that are neighbours in depth (`product.h`): fp32 as they are, bf16 two in 32 bits, the first below.
INLINE void store_cells(float* p, const vf (&rows)[1]) { store(p, rows[0]); }

INLINE vu bits_of(const bf16* p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vu);
}

INLINE vf cells_of(vf low, vf high) {
    return (vf)(__builtin_convertvector(narrow(low), vu) | __builtin_convertvector(narrow(high), vu) << 16);
}

INLINE vf cells_of(const float* low) { return cells_of(load(low), vf{}); }
INLINE vf cells_of(const float* low, const float* high) { return cells_of(load(low), load(high)); }
INLINE vf cells_of(const bf16* low) { return (vf)bits_of(low); }
INLINE vf cells_of(const bf16* low, const bf16* high) { return (vf)(bits_of(low) | bits_of(high) << 16); }

INLINE void store_cells(bf16* p, const vf (&rows)[2]) { store((float*)p, cells_of(rows[0], rows[1])); }

#if defined(__AVX512F__)
// 16 x 16 numbers of 32 bits.
INLINE void transpose(vf (&rows)[16]) {
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        UNROLL for (int h = 0; h < 2; h++) {
            const __m512d x = (__m512d)a[i + h], y = (__m512d)a[i + 2 + h];
            b[i + 2 * h] = (__m512)_mm512_unpacklo_pd(x, y);
            b[i + 2 * h + 1] = (__m512)_mm512_unpackhi_pd(x, y);
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[i] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
        rows[i + 4] = (vf)_mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
        rows[i + 12] = (vf)_mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
    }
}
#endif

// to[i] += v[i]; taking a vector's lanes apart one by one would move its accumulator out of its register.
INLINE void add_to(double* to, vf v) {
#if defined(__AVX512F__)
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
    _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
#elif defined(__AVX2__)
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
    _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), high));
#else
    float part[LANES];
    store(part, v);
    for (int i = 0; i < LANES; i++) to[i] += part[i];
#endif
}

INLINE vf root(vf v) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < LANES; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

template <class T>
INLINE void prefetch(const T* p) {
    __builtin_prefetch(p, 0, 2);
}

// --- sigmoid: 1 / (1 + e^-x) -----------------------------------------------------------------------------------------

// As exact as an image stored as T needs it: within an ulp or two of fp32, or within 2^-13 for bf16 where that is
// cheaper.
template <class T>
INLINE vf sigmoid(vf x) {
#if defined(__AVX512F__)
    // 2^t = 2^n 2^r with |r| <= 1/2 and Remez's polynomial for 2^r; a NaN passes `max` as its second operand.
    const __m512 y = _mm512_max_ps((__m512)splat(-87.0f), (__m512)x);
    const __m512 n = _mm512_roundscale_ps((__m512)((vf)y * -1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // In one instruction, or the rounding of the product is the error of a large |x|.
    vf r = (vf)_mm512_fnmsub_ps(y, (__m512)splat(1.44269504f), n);
    vf p;
    if constexpr (sizeof(T) == 2) {
        p = r * 0.0095701019081f + 0.055917860319f;
        p = p * r + 0.24024744828f;
        p = p * r + 0.69312181474f;
        p = p * r + 0.99999926145f;
    } else {
        r -= (vf)y * 1.925963033e-8f;  // log2 e's other digits
        p = r * 0.00015345812004f + 0.0013399931219f;
        p = p * r + 0.0096184889571f;
        p = p * r + 0.05550328777f;
        p = p * r + 0.24022646891f;
        p = p * r + 0.69314720574f;
        p = p * r + 1.0f;
    }
    const vf d = (vf)_mm512_scalef_ps((__m512)p, n) + 1.0f;
    const vf guess = (vf)_mm512_rcp14_ps((__m512)d);
    return sizeof(T) == 2 ? guess : guess * (1.0f - d * guess) + guess;  // one step of Newton's
#else
    // e^y = 2^n e^r with Cephes' polynomial of expf.
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
#endif
}

struct Silu {
    vf value, dsilu;  // a = x σ, and a' = σ + a (1 - σ)
};

template <class T>
INLINE Silu silu(vf x) {
    const vf s = sigmoid<T>(x), a = x * s;
    return {a, s + a * (1.0f - s)};
}
