// The depthwise convolution, forward and backward: rows of an image slide through a ring of K rows in cache, a chunk of
// channels at a time, [block of LANES channels][row][column][LANES], activated once as they are loaded.
#include "convolve.h"

// Every other tap of every other row: what reaches one parity of input rows and columns backward at stride 2.
static Convolve half(int rows, int taps) {
    switch (rows * 4 + taps) {
        case 5: return convolve<1, 1, 1, -1>;
        case 6: return convolve<1, 2, 1, -1>;
        case 9: return convolve<2, 1, 1, -1>;
        case 10: return convolve<2, 2, 1, -1>;
        case 11: return convolve<2, 3, 1, -1>;
        case 14: return convolve<3, 2, 1, -1>;
        default: return convolve<3, 3, 1, -1>;
    }
}

template <class T>
static void forward(Call& call, const Map& map, long K, long S, const T* e, const Norm& norm, const float* w, T* d,
                    float* mean, float* var) {
    const long wide = std::max(map.width + map.left, (map.out_width - 1) * S + K) * LANES;
    const Chunks chunks(map, K * wide * sizeof(float), e);
    const float* packed = packed_weight(call.arena, w, map, K * K);
    Statistics found(call.arena, map.images, map.channels);
    std::fill(found.rows.begin(), found.rows.end(), map.out_height * map.out_width);
    const Convolve convolve_row = whole(K, S);
    const bool past = streams_blocks(d, map.images * map.out_height * map.out_width * map.channels, map.channels);
    const long ring_size = (chunks.width * K + 1) * wide, each = ring_size + map.out_width * LANES;
    float* rings = call.per_thread<float>(each);
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(call.threads)
    for (long n = 0; n < map.images; n++)
        for (int k = 0; k < chunks.count; k++) {
            const int first = chunks.start(k), last = chunks.end(k);
            float *ring = rings + each * thread(), *empty = ring + chunks.width * K * wide, *result = empty + wide;
            memset(ring, 0, ring_size * sizeof(float));
            long have = 0;
            for (long oy = 0; oy < map.out_height; oy++) {
                for (const long need = std::min(map.height, oy * S - map.top + K); have < need; have++) {
                    const T* source = e + (n * map.height + have) * map.width * map.channels;
                    float* row = ring + have % K * wide + map.left * LANES;
                    for (long x = 0; x < map.width; x++)
                        for (int b = first; b < last; b++) {
                            const int c = b * LANES;
                            const T* at = source + x * map.channels + c;
                            prefetch(at + map.width * map.channels);
                            vf v = load(at, map.channels - c);
                            if (norm) {
                                const vf z = norm.z(v, c);
                                v = z * sigmoid<T>(z);
                            }
                            store(row + (b - first) * K * wide + x * LANES, v);
                        }
                }
                for (int b = first; b < last; b++) {
                    const float *rows[5], *weights[5];
                    for (int q = 0; q < K; q++) {
                        const long y = oy * S - map.top + q;
                        rows[q] = y < 0 || y >= map.height ? empty : ring + ((b - first) * K + y % K) * wide;
                        weights[q] = packed + ((long)b * K * K + q * K) * LANES;
                    }
                    const int c = b * LANES;
                    float* pivots = found.pivot + n * found.size + c;
                    convolve_row(map.out_width, rows, weights, LANES, result, LANES);
                    if (oy == 0) store(pivots, mean_of(result, map.out_width, LANES));
                    const vf pivot = load(pivots);
                    T* out = d + (n * map.out_height + oy) * map.out_width * map.channels + c;
                    for (long x = 0; x < map.out_width;) {
                        vf s{}, q{};
                        for (const long until = std::min(map.out_width, x + FEW); x < until; x++) {
                            const vf v = load(result + x * LANES), beyond = v - pivot;
                            if (past)
                                stream(out + x * map.channels, v);
                            else
                                store(out + x * map.channels, v, map.channels - c);
                            s += beyond, q += beyond * beyond;
                        }
                        found.add(n, c, s, q);
                    }
                }
            }
        }
    found.merge(mean, var);
}

// sums [K K][LANES] += Σ over columns of ROWS rows of the output's gradient times the input row beneath them.
template <int ROWS, int K, int S>
static __attribute__((noinline)) void weigh(long count, const float* const* gradients, const float* input,
                                            float* const* sums) {
    vf found[ROWS][K];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < K; q++) found[r][q] = load(sums[r] + q * LANES);
    for (long o = 0; o < count; o++) {
        vf values[K];
        UNROLL for (int q = 0; q < K; q++) values[q] = load(input + (o * S + q) * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const vf gradient = load(gradients[r] + o * LANES);
            UNROLL for (int q = 0; q < K; q++) found[r][q] += values[q] * gradient;
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int q = 0; q < K; q++) store(sums[r] + q * LANES, found[r][q]);
}

template <int ROWS, int K, int S>
static void weigh_rows(long count, const float* const* gradients, const float* input, float* const* sums) {
    constexpr int MOST = TILE > 6 || K == 3 ? K : 2;  // rows whose sums fit into the registers
    if constexpr (ROWS > MOST) {
        weigh<MOST, K, S>(count, gradients, input, sums);
        weigh_rows<ROWS - MOST, K, S>(count, gradients + MOST, input, sums + MOST);
    } else {
        weigh<ROWS, K, S>(count, gradients, input, sums);
    }
}

using Weigh = decltype(&weigh_rows<3, 3, 1>);

static Weigh weighing(long k, long stride, int rows) {
    if (stride == 1) return k == 3 ? weigh_rows<3, 3, 1> : weigh_rows<5, 5, 1>;
    if (k == 3) return rows == 1 ? weigh_rows<1, 3, 2> : weigh_rows<2, 3, 2>;
    return rows == 2 ? weigh_rows<2, 5, 2> : weigh_rows<3, 5, 2>;
}

// What a task of the backward works in: rings of the output's gradient, a row of the input, the derivative of SiLU
// there and its gradient, and the sums for the weight's gradient.
struct Rows {
    long k, stride, ring_width, row_width, map_width, each;
    float *ring, *empty, *input, *dsilu, *result, *sums;
    Rows(const Map& map, long k, long stride, int blocks)
        : k(k), stride(stride), ring_width((map.out_width + 2 * k) * LANES),
          row_width(std::max(map.width + map.left, (map.out_width - 1) * stride + k) * LANES),
          map_width(map.width * LANES),
          each(blocks * (k * ring_width + row_width + map_width + k * k * LANES) + ring_width + map_width) {}
    void place(float* scratch, int blocks) {
        ring = scratch, empty = ring + blocks * k * ring_width, input = empty + ring_width;
        dsilu = input + blocks * row_width, result = dsilu + blocks * map_width, sums = result + map_width;
        memset(scratch, 0, each * sizeof(float));
    }
};

// Gradient of one input row in one block of channels, into `rows.result`; and its share of the weight's gradient.
static void backward_row(const Map& map, long iy, const Rows& rows, int b, const float* w) {
    const float *gradients[5], *weights[5], *starts[5], *columns[5];
    float* sums[5];
    const long k = rows.k, stride = rows.stride;
    const int parity = stride == 1 ? 0 : (int)((iy + map.top) & 1);
    int taken = 0;
    for (long ky = parity; ky < k; ky += stride, taken++) {
        const long oy = (iy + map.top - ky) / stride;
        const bool there = iy + map.top >= ky && oy < map.out_height;
        gradients[taken] = (there ? rows.ring + (b * k + oy % k) * rows.ring_width : rows.empty) + k * LANES;
        weights[taken] = w + ky * k * LANES;
        sums[taken] = rows.sums + (b * k + ky) * k * LANES;
    }
    if (stride == 1) {
        for (int r = 0; r < taken; r++) {
            columns[r] = gradients[r] + (map.left + 1 - k) * LANES;
            starts[r] = weights[r] + (k - 1) * LANES;
        }
        whole(k, 1)(map.width, columns, starts, -LANES, rows.result, LANES);
    } else {
        for (int odd = 0; odd < 2; odd++) {
            const long kx = (odd + map.left) & 1;
            for (int r = 0; r < taken; r++) {
                columns[r] = gradients[r] + (odd + map.left - kx) / 2 * LANES;
                starts[r] = weights[r] + kx * LANES;
            }
            half(taken, (int)(k + 1 - kx) / 2)((map.width + 1 - odd) / 2, columns, starts, 2 * LANES,
                                               rows.result + odd * LANES, 2 * LANES);
        }
    }
    weighing(k, stride, taken)(map.out_width, gradients, rows.input + b * rows.row_width, sums);
}

template <class T>
struct Output {  // D, its gradient on the way in, and the norm on it
    const T *da, *d;
    const float *gate, *q;
    const Norm& norm;
    const NormBackward& backward;
};

template <class T>
static void backward(Call& call, const Map& map, long K, long S, const Output<T>& out, const T* e,
                     const Norm& norm, const float* w, T* du, float* dw, float* sums) {
    const Chunks chunks(map, (K + 2) * std::max(map.width, map.out_width + 2 * K) * LANES * sizeof(float), e);
    const float* packed = packed_weight(call.arena, w, map, K * K);
    const int groups = (int)std::min<long>(map.images, MOST_GROUPS);
    const long cells = (long)map.size * K * K;
    double* tap_sums = call.arena.zeros<double>(groups * cells);
    double* norm_sums = call.arena.zeros<double>((size_t)groups * 2 * map.size);
    const Rows shape(map, K, S, chunks.width);
    float* scratches = call.per_thread<float>(shape.each);
    const bool past = streams_blocks(du, map.images * map.height * map.width * map.channels, map.channels);
    const long flush = std::max(1L, 512 / map.out_width);  // rows that fp32 sums run over
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(call.threads)
    for (int g = 0; g < groups; g++)
        for (int k = 0; k < chunks.count; k++) {
            const int first = chunks.start(k), last = chunks.end(k);
            Rows rows = shape;
            rows.place(scratches + shape.each * thread(), chunks.width);
            for (long n = map.images * g / groups; n < map.images * (g + 1) / groups; n++) {
                const float *gate = out.gate + n * map.channels, *q = out.q + n * map.channels;
                long have = 0;
                for (long iy = 0; iy < map.height; iy++) {
                    for (const long need = std::min(map.out_height, (iy + map.top) / S + 1); have < need; have++) {
                        const long at = (n * map.out_height + have) * map.out_width * map.channels;
                        float* row = rows.ring + have % K * rows.ring_width + K * LANES;
                        for (long x = 0; x < map.out_width; x++)
                            for (int b = first; b < last; b++) {
                                const int c = b * LANES, lanes = map.channels - c;
                                const long p = at + x * map.channels + c;
                                prefetch(out.d + p + map.out_width * map.channels);
                                prefetch(out.da + p + map.out_width * map.channels);
                                const vf raw = load(out.d + p, lanes);
                                const vf dz = (load(out.da + p, lanes) * load(gate + c, lanes) + load(q + c, lanes)) *
                                              silu<T>(out.norm.z(raw, c)).dsilu;
                                store(row + (b - first) * K * rows.ring_width + x * LANES,
                                      out.backward.dx(out.norm, dz, raw, c));
                            }
                    }
                    const long at = (n * map.height + iy) * map.width * map.channels;
                    for (long x = 0; x < map.width; x++)
                        for (int b = first; b < last; b++) {
                            const int c = b * LANES, i = b - first;
                            const T* source = e + at + x * map.channels + c;
                            prefetch(source + map.width * map.channels);
                            vf v = load(source, map.channels - c);
                            if (norm) {
                                const Silu act = silu<T>(norm.z(v, c));
                                store(rows.dsilu + i * rows.map_width + x * LANES, act.dsilu);
                                v = act.value;
                            }
                            store(rows.input + i * rows.row_width + (x + map.left) * LANES, v);
                        }
                    for (int b = first; b < last; b++) {
                        const int c = b * LANES, i = b - first, lanes = map.channels - c;
                        const float* dsilu = rows.dsilu + i * rows.map_width;
                        const vf centre = norm ? load(norm.mean + c) : vf{};
                        vf s{}, x{};
                        backward_row(map, iy, rows, i, packed + (long)b * K * K * LANES);
                        for (long ix = 0; ix < map.width; ix++) {
                            const long p = at + ix * map.channels + c;
                            vf v = load(rows.result + ix * LANES);
                            if (norm) {
                                v *= load(dsilu + ix * LANES);
                                s += v, x += v * (load(e + p, lanes) - centre);
                            }
                            if (past)
                                stream(du + p, v);
                            else
                                store(du + p, v, lanes);
                        }
                        double* mine = norm_sums + (size_t)g * 2 * map.size + c;
                        add_to(mine, s);
                        add_to(mine + map.size, x);
                    }
                    if (iy % flush == flush - 1 || iy == map.height - 1) {
                        double* mine = tap_sums + g * cells + (long)first * K * K * LANES;
                        for (long j = 0; j < (long)(last - first) * K * K * LANES; j++)
                            mine[j] += rows.sums[j], rows.sums[j] = 0;
                    }
                }
            }
        }
    for (int c = 0; c < map.channels; c++) {
        for (long j = 0; j < K * K; j++) {
            double total = 0;
            const long at = ((long)c / LANES * K * K + j) * LANES + c % LANES;
            for (int g = 0; g < groups; g++) total += tap_sums[g * cells + at];
            dw[c * K * K + j] = (float)total;
        }
        if (!norm) continue;
        double s = 0, x = 0;
        for (int g = 0; g < groups; g++) {
            s += norm_sums[(size_t)g * 2 * map.size + c], x += norm_sums[(size_t)(g * 2 + 1) * map.size + c];
        }
        sums[c] = (float)s, sums[map.channels + c] = (float)(x * norm.rstd[c]);
    }
}

template <class T>
static void depthwise(long threads, long images, long channels, long height, long width, long out_height,
                      long out_width, long top, long left, long k, long stride, const T* e, const float* mean,
                      const float* var, const float* weight, const float* bias, const float* w, double eps, T* d,
                      float* d_mean, float* d_var) {
    Call call(threads);
    const Map map(images, channels, height, width, out_height, out_width, top, left);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    forward(call, map, k, stride, e, norm, w, d, d_mean, d_var);
}

template <class T>
static void depthwise_backward(long threads, long images, long channels, long height, long width, long out_height,
                               long out_width, long top, long left, long k, long stride, const T* da, const T* d,
                               const float* gate, const float* q, const float* d_sums, const float* d_mean,
                               const float* d_var, const float* d_weight, const float* d_bias, const T* e,
                               const float* mean, const float* var, const float* weight, const float* bias,
                               const float* w, double eps, T* du, float* dw, float* sums) {
    Call call(threads);
    const Map map(images, channels, height, width, out_height, out_width, top, left);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    const Norm d_norm(call.arena, channels, d_mean, d_var, d_weight, d_bias, eps);
    const NormBackward d_backward(call.arena, channels, d_norm, d_sums, images * out_height * out_width);
    const Output<T> out{da, d, gate, q, d_norm, d_backward};
    backward(call, map, k, stride, out, e, norm, w, du, dw, sums);
}

OPERATION(depthwise)
OPERATION(depthwise_backward)
