// Products of matrices: a block of rows, whose operand is prepared in cache, times strips of STRIP columns, fp32 sums.
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

// What products of images stored as T multiply: fp32, or bf16 where the CPU has its dot product. A cell is 32 bits of an
// operand: one number, or two that are neighbours in depth.
#if defined(__AVX512BF16__)
template <class T>
using Operand = T;
#else
template <class T>
using Operand = float;
#endif

#if defined(__AMX_BF16__)
#define AMX 1
#else
#define AMX 0
#endif

template <class O>
constexpr int CELL = 4 / sizeof(O);  // numbers in a cell
template <class O>
constexpr bool PAIRS = sizeof(O) == 2;

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
INLINE int padded(int channels) { return round_up(channels, LANES); }
INLINE int strips(int columns) { return (columns + STRIP - 1) / STRIP; }
INLINE int vectors_of(int columns, int from) { return columns - from > LANES ? 2 : 1; }

// Rows of an operand of `depth` columns: how far apart, in numbers, and how many cells a product reads of each, which
// must be zero past the columns.
template <class O>
INLINE int leading(int depth) {
    return PAIRS<O> ? round_up(depth, 2 * LANES) : padded(depth);
}
template <class O>
INLINE int cells(int depth) {
    return AMX && PAIRS<O> ? leading<O>(depth) / 2 : (depth + CELL<O> - 1) / CELL<O>;
}

// Rows of a block whose operand of `depth` columns stays in L2: whole tiles.
template <class O>
INLINE int block_rows(int depth) {
    if (PAIRS<O>) return std::max(32, std::min(128, 98304 / depth / 32 * 32));
    return std::max(24, std::min(96, 49152 / depth / TILE * TILE));
}

// --- tiles in vector registers ---------------------------------------------------------------------------------------

INLINE vf dot(vf a, vf b, vf sum, const float*) { return a * b + sum; }

#if defined(__AVX512BF16__)
INLINE vf dot(vf a, vf b, vf sum, const bf16*) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

INLINE vf repeat(const float* p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    return (vf)(bits - vi{});
}

// c [M x N vectors] = Σ_k a(i, k) b[k], or more by that, over cells. a(i, k) is a[i lda + k], or ACROSS a[k lda + i].
template <class O, int M, int N, bool ACROSS, bool ADD>
static __attribute__((noinline)) void tile(int depth, const float* a, long lda, const float* b, long ldb, float* c,
                                           long ldc) {
    vf sums[M][N];
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N; j++) sums[i][j] = ADD ? load(c + i * ldc + j * LANES) : vf{};
    for (int k = 0; k < depth; k++) {
        vf row[N];
        UNROLL for (int j = 0; j < N; j++) row[j] = load(b + j * LANES);
        UNROLL for (int i = 0; i < M; i++) {
            const vf x = repeat(ACROSS ? a + i : a + i * lda);
            UNROLL for (int j = 0; j < N; j++) sums[i][j] = dot(x, row[j], sums[i][j], (const O*)nullptr);
        }
        a += ACROSS ? lda : 1;
        b += ldb;
    }
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N; j++) store(c + i * ldc + j * LANES, sums[i][j]);
}

template <class O, int M, int N, bool ACROSS, bool ADD>
INLINE void tile_of(int rows, int depth, const float* a, long lda, const float* b, long ldb, float* c, long ldc) {
    if constexpr (M > 1)
        if (rows != M) return tile_of<O, M - 1, N, ACROSS, ADD>(rows, depth, a, lda, b, ldb, c, ldc);
    tile<O, M, N, ACROSS, ADD>(depth, a, lda, b, ldb, c, ldc);
}

// Tiles of nearly equal height down `rows`.
template <class O, bool ACROSS, bool ADD>
static void tiles(int rows, int vectors, int depth, const float* a, long lda, const float* b, long ldb, float* c,
                  long ldc) {
    const int count = (rows + TILE - 1) / TILE;
    for (int t = 0, i = 0; t < count; t++) {
        const int height = (rows - i + count - t - 1) / (count - t);
        const float* at = a + (ACROSS ? i : i * lda);
        if (vectors == 2)
            tile_of<O, TILE, 2, ACROSS, ADD>(height, depth, at, lda, b, ldb, c + i * ldc, ldc);
        else
            tile_of<O, TILE, 1, ACROSS, ADD>(height, depth, at, lda, b, ldb, c + i * ldc, ldc);
        i += height;
    }
}

// --- tiles of AMX ----------------------------------------------------------------------------------------------------

#if AMX
// The calling thread's tiles, eight of 16 rows of 64 bytes; another user's configuration comes back at the end.
class TileUse {
  public:
    TileUse() {
        alignas(64) unsigned char wanted[64] = {1};
        for (int t = 0; t < 8; t++) wanted[16 + 2 * t] = 64, wanted[48 + t] = 16;
        _tile_storeconfig(before);
        _tile_loadconfig(wanted);
    }
    ~TileUse() { _tile_loadconfig(before); }

  private:
    alignas(64) unsigned char before[64];
};

// c [rows x columns] = Σ_k a[i][k] b[k], or more by that, in blocks of 32 x 32; `depth` a multiple of 16 cells, rows of a
// and c there up to a multiple of 16.
template <bool ADD>
static void amx_tiles(int rows, int columns, int depth, const float* a, long lda, const float* b, long ldb, float* c,
                      long ldc) {
    const long na = lda * 4, nb = ldb * 4, nc = ldc * 4;
    for (int i = 0; i < rows; i += 32)
        for (int j = 0; j < columns; j += 32) {
            const bool low = rows - i > 16, right = columns - j > 16;
            float *c00 = c + i * ldc + j, *c10 = c00 + 16 * ldc;
            if (ADD) {
                _tile_loadd(0, c00, nc);
                if (right) _tile_loadd(1, c00 + 16, nc);
                if (low) _tile_loadd(2, c10, nc);
                if (low && right) _tile_loadd(3, c10 + 16, nc);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int k = 0; k < depth; k += 16) {
                _tile_loadd(4, a + i * lda + k, na);
                _tile_loadd(6, b + k * ldb + j, nb);
                _tile_dpbf16ps(0, 4, 6);
                if (right) {
                    _tile_loadd(7, b + k * ldb + j + 16, nb);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (low) {
                    _tile_loadd(5, a + (i + 16) * lda + k, na);
                    _tile_dpbf16ps(2, 5, 6);
                    if (right) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c00, nc);
            if (right) _tile_stored(1, c00 + 16, nc);
            if (low) _tile_stored(2, c10, nc);
            if (low && right) _tile_stored(3, c10 + 16, nc);
        }
}
#else
struct TileUse {
    TileUse() {}
};
#endif

// --- rows times a strip ----------------------------------------------------------------------------------------------

INLINE const float* as_cells(const void* p) { return (const float*)p; }

// c [rows x STRIP] = a [rows x depth] times one packed strip; a's rows lie `lda` numbers apart. a and c have rows up to a
// multiple of 16.
template <class O>
INLINE void times_strip(int rows, int depth, const O* a, long lda, const O* strip, int vectors, float* c) {
#if AMX
    if constexpr (PAIRS<O>)
        return amx_tiles<false>(rows, vectors * LANES, cells<O>(depth), as_cells(a), lda / 2, as_cells(strip), STRIP, c,
                                STRIP);
#endif
    tiles<O, false, false>(rows, vectors, cells<O>(depth), as_cells(a), lda / CELL<O>, as_cells(strip), STRIP, c, STRIP);
}

// Numbers in a packed strip.
template <class O>
INLINE long strip_size(int depth) {
    return (long)cells<O>(depth) * CELL<O> * STRIP;
}

template <class T>
INLINE float wide(T x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        const uint32_t bits = (uint32_t)x.bits << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
}

INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {
    vh half = narrow(splat(x));
    p->bits = half[0];
}

// Strip `s` of the matrix b(k, j), [depth x columns], zeros past its ends: [cell][STRIP]. b(k, j) is w[k ldw + j], or
// TURNED w[j ldw + k].
template <bool TURNED, class T, class O>
static void pack_strip(const T* w, long ldw, int depth, int columns, int s, O* out) {
    const int from = s * STRIP, width = std::min(STRIP, columns - from), count = cells<O>(depth);
    if constexpr (TURNED) {
        int done = 0;  // whole cells
#if defined(__AVX512F__)
        if constexpr (sizeof(T) >= sizeof(O)) {
            done = depth / CELL<O>;
            const vi lanes = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * (int32_t)ldw;
            for (int j = 0; j < STRIP; j += LANES) {
                const int left = std::max(0, std::min(LANES, width - j));
                const auto gather = [&](const T* at) {  // 32 bits of each row
                    return (vf)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), (__mmask16)((1u << left) - 1),
                                                           (__m512i)lanes, at, sizeof(T));
                };
                for (int k = 0; k < done; k++) {
                    const T* at = w + (from + j) * ldw + k * CELL<O>;
                    float* to = (float*)out + (long)k * STRIP + j;
                    if constexpr (sizeof(T) == sizeof(O))
                        store(to, gather(at));
                    else
                        store(to, cells_of(gather(at), gather(at + 1)));
                }
            }
        }
#endif
        for (int k = done * CELL<O>; k < count * CELL<O>; k++)
            for (int j = 0; j < STRIP; j++)
                put(out + ((long)k / CELL<O> * STRIP + j) * CELL<O> + k % CELL<O>,
                    j < width && k < depth ? wide(w[(from + j) * ldw + k]) : 0.0f);
    } else {
        for (int k = 0; k < count; k++)
            for (int j = 0; j < STRIP; j += LANES) {
                const int left = std::max(0, width - j);
                vf rows[CELL<O>];
                UNROLL for (int q = 0; q < CELL<O>; q++) {
                    const long row = (long)k * CELL<O> + q;
                    rows[q] = left && row < depth ? load(w + row * ldw + from + j, left) : vf{};
                }
                store_cells(out + ((long)k * STRIP + j) * CELL<O>, rows);
            }
    }
}

// --- sums over rows --------------------------------------------------------------------------------------------------

// What `add_across` reads of `rows` rows of an operand: of fp32 the rows themselves, of bf16 pairs of rows as cells, and
// on the left, for AMX, those transposed.
INLINE int row_cells(int rows) { return AMX ? round_up((rows + 1) / 2, 16) : (rows + 1) / 2; }

template <class O>
INLINE long across_size(int rows, int columns) {  // in floats
    return PAIRS<O> ? (long)row_cells(rows) * round_up(columns, 2 * LANES) : 0;
}

template <class S>
INLINE vf cells_at(const S* rows, long ld, int r, int count, int c) {
    const S* at = rows + r * ld + c;
    return r + 1 < count ? cells_of(at, at + ld) : r < count ? cells_of(at) : vf{};
}

// Pairs of rows of S (fp32 or bf16) as cells, zeros past their end: `columns` up to a whole vector.
template <class S>
[[maybe_unused]] static void pair_rows(const S* rows, long ld, int count, int columns, float* out, long ldo) {
    for (int r = 0; r < row_cells(count); r++)
        for (int c = 0; c < columns; c += LANES) {
            store(out + r * ldo + c, cells_at(rows, ld, 2 * r, count, c));
        }
}

template <class O, class S>
INLINE const float* right_of(const S* rows, long ld, int count, int columns, float* scratch, long* ldo) {
    if constexpr (!PAIRS<O>) {
        *ldo = ld;
        return rows;
    } else {
        *ldo = round_up(columns, 2 * LANES);
        pair_rows(rows, ld, count, columns, scratch, *ldo);
        return scratch;
    }
}

template <class O>
INLINE const float* left_of(const O* rows, long ld, int count, int columns, float* scratch, long* ldo) {
#if AMX
    if constexpr (PAIRS<O>) {
        *ldo = row_cells(count);
        for (int c = 0; c < columns; c += LANES)
            for (int k = 0; k < *ldo; k += LANES) {
                vf block[LANES];
                UNROLL for (int r = 0; r < LANES; r++) block[r] = cells_at(rows, ld, 2 * (k + r), count, c);
                transpose(block);
                for (int r = 0; r < LANES; r++) store(scratch + (c + r) * *ldo + k, block[r]);
            }
        return scratch;
    }
#endif
    return right_of<O>(rows, ld, count, columns, scratch, ldo);
}

// c [m x columns] += leftᵀ right over `rows` rows; columns up to a whole vector, and c's rows up to a multiple of 16.
template <class O>
static void add_across(int rows, int m, const float* left, long ldl, int columns, const float* right, long ldr, float* c,
                       long ldc) {
#if AMX
    if constexpr (PAIRS<O>)
        return amx_tiles<true>(m, round_up(columns, LANES), row_cells(rows), left, ldl, right, ldr, c, ldc);
#endif
    for (int j = 0; j < columns; j += STRIP)
        tiles<O, true, true>(m, vectors_of(columns, j), PAIRS<O> ? row_cells(rows) : rows, left, ldl, right + j, ldr,
                             c + j, ldc);
}
