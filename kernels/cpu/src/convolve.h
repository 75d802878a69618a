// Depthwise convolution of rows in cache: [block of LANES channels][row][column][LANES] fp32.
#pragma once

#include "common.h"

struct Map {
    long images, channels, height, width, out_height, out_width, top, left;
    int size, blocks;  // channels up to a whole vector; in vectors
    Map(long images, long channels, long height, long width, long out_height, long out_width, long top, long left)
        : images(images), channels(channels), height(height), width(width), out_height(out_height),
          out_width(out_width), top(top), left(left), size(padded(channels)), blocks(padded(channels) / LANES) {}
};

constexpr long CHUNK_BYTES = (long)192 << 10;  // of L2
// Channels in chunks whose rows of `bytes` for each block stay in cache, at least a cache line of T wide.
struct Chunks {
    int blocks, width, count;
    template <class T>
    Chunks(const Map& map, long bytes, const T*) : blocks(map.blocks) {
        const int least = std::max<int>(1, 64 / sizeof(T) / LANES);
        const int most = std::max<int>(least, (int)(CHUNK_BYTES / bytes));
        count = (blocks + most - 1) / most;
        width = (blocks + count - 1) / count;
        count = (blocks + width - 1) / width;
    }
    int start(int k) const { return k * width; }
    int end(int k) const { return std::min(blocks, (k + 1) * width); }
};

// weight [channels, K, K] → [block][K K][LANES].
static float* packed_weight(Arena& arena, const float* weight, const Map& map, int area) {
    float* packed = arena.zeros<float>((size_t)map.size * area);
    for (int c = 0; c < map.channels; c++)
        for (int q = 0; q < area; q++) packed[((long)c / LANES * area + q) * LANES + c % LANES] = weight[c * area + q];
    return packed;
}

// N outputs: output n begins at column n STEP of the rows, tap q lies q LEAN further.
template <int ROWS, int TAPS, int STEP, int LEAN, int N>
INLINE void convolve_tile(const float* const* rows, const float* const* weights, long tap_step, long at, float* out,
                          long out_step) {
    vf sums[N];
    UNROLL for (int n = 0; n < N; n++) sums[n] = vf{};
    UNROLL for (int r = 0; r < ROWS; r++) {
        const float* row = rows[r] + at * STEP * LANES;
        UNROLL for (int q = 0; q < TAPS; q++) {
            const vf tap = load(weights[r] + q * tap_step);
            UNROLL for (int n = 0; n < N; n++) sums[n] += load(row + (n * STEP + q * LEAN) * LANES) * tap;
        }
    }
    UNROLL for (int n = 0; n < N; n++) store(out + (at + n) * out_step, sums[n]);
}

// `count` outputs from ROWS rows and TAPS taps of each, `out_step` floats apart.
template <int ROWS, int TAPS, int STEP, int LEAN>
static __attribute__((noinline)) void convolve(long count, const float* const* rows, const float* const* weights,
                                               long tap_step, float* out, long out_step) {
    long at = 0;
    for (; at + 7 <= count; at += 7)
        convolve_tile<ROWS, TAPS, STEP, LEAN, 7>(rows, weights, tap_step, at, out, out_step);
    for (; at + 3 <= count; at += 3)
        convolve_tile<ROWS, TAPS, STEP, LEAN, 3>(rows, weights, tap_step, at, out, out_step);
    for (; at < count; at++) convolve_tile<ROWS, TAPS, STEP, LEAN, 1>(rows, weights, tap_step, at, out, out_step);
}

using Convolve = decltype(&convolve<3, 3, 1, 1>);

// All taps of K rows: forward, and at stride 1 backward with the taps in reverse.
static Convolve whole(long k, long stride) {
    if (k == 3) return stride == 1 ? convolve<3, 3, 1, 1> : convolve<3, 3, 2, 1>;
    return stride == 1 ? convolve<5, 5, 1, 1> : convolve<5, 5, 2, 1>;
}
