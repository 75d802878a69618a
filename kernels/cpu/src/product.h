// Products of matrices in fp32: a block of rows, whose operand is prepared in cache, times strips of STRIP columns.
#pragma once

#include <algorithm>

#include "vector.h"

constexpr int VECTORS = 2;                 // of a strip
constexpr int STRIP = VECTORS * LANES;     // columns that a tile of the product has
#if LANES == 16 || defined(__aarch64__)    // 32 registers
constexpr int TILE = 14;                   // rows of a tile
#else
constexpr int TILE = 6;
#endif

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
INLINE int padded(int channels) { return round_up(channels, LANES); }
INLINE int strips(int columns) { return (columns + STRIP - 1) / STRIP; }
INLINE int vectors_of(int columns, int from) { return columns - from > LANES ? 2 : 1; }

// c [M x N vectors] = Σ_k a(i, k) b[k], or more by that. a(i, k) is a[i lda + k], or ACROSS a[k lda + i].
template <int M, int N, bool ACROSS, bool ADD>
static __attribute__((noinline)) void tile(int depth, const float* a, long lda, const float* b, long ldb, float* c,
                                           long ldc) {
    vf sums[M][N];
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N; j++) sums[i][j] = ADD ? load(c + i * ldc + j * LANES) : vf{};
    for (int k = 0; k < depth; k++) {
        vf row[N];
        UNROLL for (int j = 0; j < N; j++) row[j] = load(b + j * LANES);
        UNROLL for (int i = 0; i < M; i++) {
            const float x = ACROSS ? a[i] : a[i * lda];
            UNROLL for (int j = 0; j < N; j++) sums[i][j] += x * row[j];
        }
        a += ACROSS ? lda : 1;
        b += ldb;
    }
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N; j++) store(c + i * ldc + j * LANES, sums[i][j]);
}

template <int M, int N, bool ACROSS, bool ADD>
INLINE void tile_of(int rows, int depth, const float* a, long lda, const float* b, long ldb, float* c, long ldc) {
    if constexpr (M > 1)
        if (rows != M) return tile_of<M - 1, N, ACROSS, ADD>(rows, depth, a, lda, b, ldb, c, ldc);
    tile<M, N, ACROSS, ADD>(depth, a, lda, b, ldb, c, ldc);
}

// Tiles of nearly equal height down `rows`.
template <bool ACROSS, bool ADD>
static void tiles(int rows, int vectors, int depth, const float* a, long lda, const float* b, long ldb, float* c,
                  long ldc) {
    const int count = (rows + TILE - 1) / TILE;
    for (int t = 0, i = 0; t < count; t++) {
        const int height = (rows - i + count - t - 1) / (count - t);
        const float* at = a + (ACROSS ? i : i * lda);
        if (vectors == 2)
            tile_of<TILE, 2, ACROSS, ADD>(height, depth, at, lda, b, ldb, c + i * ldc, ldc);
        else
            tile_of<TILE, 1, ACROSS, ADD>(height, depth, at, lda, b, ldb, c + i * ldc, ldc);
        i += height;
    }
}

// c [rows x STRIP] = a [rows x depth] times one packed strip.
INLINE void times_strip(int rows, int depth, const float* a, long lda, const float* strip, int vectors, float* c) {
    tiles<false, false>(rows, vectors, depth, a, lda, strip, STRIP, c, STRIP);
}

// c [m x columns] += aᵀ b over `rows` rows; b and c have columns up to a whole vector.
[[maybe_unused]] static void add_across(int rows, int m, const float* a, long lda, int columns, const float* b,
                                        long ldb, float* c, long ldc) {
    for (int j = 0; j < columns; j += STRIP)
        tiles<true, true>(m, vectors_of(columns, j), rows, a, lda, b + j, ldb, c + j, ldc);
}

// Strip `s` of the matrix b(k, j), [depth x columns], zeros in the columns past its end: [depth][STRIP]. b(k, j) is
// w[k ldw + j], or TURNED w[j ldw + k].
template <bool TURNED, class T>
static void pack_strip(const T* w, long ldw, int depth, int columns, int s, float* out) {
    const int from = s * STRIP, width = std::min(STRIP, columns - from);
    if constexpr (TURNED) {
        for (int j = 0; j < STRIP; j++) {
            const T* row = w + (from + j) * ldw;
            if (j < width)
                for (int k = 0; k < depth; k++) {
                    if constexpr (sizeof(T) == 4) {
                        out[(long)k * STRIP + j] = row[k];
                    } else {
                        const uint32_t bits = (uint32_t)row[k].bits << 16;
                        memcpy(out + (long)k * STRIP + j, &bits, 4);
                    }
                }
            else
                for (int k = 0; k < depth; k++) out[(long)k * STRIP + j] = 0;
        }
    } else {
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < VECTORS; j++) {
                const int left = std::max(0, width - j * LANES);
                store(out + (long)k * STRIP + j * LANES, left ? load(w + k * ldw + from + j * LANES, left) : vf{});
            }
    }
}
