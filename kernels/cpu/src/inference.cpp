// The block in evaluation: batch norms folded into weights and biases, a few images at a time, so that what lies
// between the convolutions stays in cache; activated once, where it is made.
#include "convolve.h"

// z = conv(x) bn_scale + bias of a convolution and the norm behind it, by the running statistics.
struct Folded {
    float *bn_scale, *bias;
    Folded(Arena& arena, long channels, const float* weight, const float* bias_, const float* mean, const float* var,
           double eps)
        : bn_scale(arena.zeros<float>(padded(channels))), bias(arena.zeros<float>(padded(channels))) {
        for (long c = 0; c < channels; c++) {
            const double s = weight[c] / std::sqrt((double)var[c] + eps);
            bn_scale[c] = (float)s, bias[c] = (float)(bias_[c] - mean[c] * s);
        }
    }
};

// Strips of wᵀ [depth x columns], w's rows times `bn_scale`.
template <class O>
static O* packed_weights(Call& call, const float* w, long depth, long columns, const float* bn_scale) {
    float* scaled = call.arena.take<float>(columns * depth);
    O* packed = call.arena.take<O>(strips(columns) * strip_size<O>(depth));
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
        for (long c = 0; c < columns; c++)
            for (long k = 0; k < depth; k++) scaled[c * depth + k] = w[c * depth + k] * bn_scale[c];
#pragma omp for schedule(static)
        for (int s = 0; s < strips(columns); s++)
            pack_strip<true>(scaled, depth, depth, columns, s, packed + s * strip_size<O>(depth));
    }
    return packed;
}

// Depthwise convolution of an image's activated rows in a chunk of channels: d = silu(z), and its mean over the image.
template <class T>
static void depthwise_image(const Map& map, const Chunks& chunks, int chunk, long k, long stride, const T* e, long n,
                            const float* w2, const Folded& folded, float* ring, T* d, float* pooled) {
    const int first = chunks.start(chunk), last = chunks.end(chunk);
    const long wide = std::max(map.width + map.left, (map.out_width - 1) * stride + k) * LANES;
    float *empty = ring + chunks.width * k * wide, *result = empty + wide, *sums = result + map.out_width * LANES;
    memset(ring, 0, (chunks.width * k + 1) * wide * sizeof(float));
    memset(sums, 0, chunks.width * LANES * sizeof(float));
    const Convolve convolve_row = whole(k, stride);
    long have = 0;
    for (long oy = 0; oy < map.out_height; oy++) {
        for (const long need = std::min(map.height, oy * stride - map.top + k); have < need; have++) {
            const T* source = e + (n * map.height + have) * map.width * map.channels;
            float* row = ring + have % k * wide + map.left * LANES;
            for (long x = 0; x < map.width; x++)
                for (int b = first; b < last; b++)
                    store(row + (b - first) * k * wide + x * LANES,
                          load(source + x * map.channels + b * LANES, map.channels - b * LANES));
        }
        for (int b = first; b < last; b++) {
            const float *rows[5], *weights[5];
            for (long q = 0; q < k; q++) {
                const long y = oy * stride - map.top + q;
                rows[q] = y < 0 || y >= map.height ? empty : ring + ((b - first) * k + y % k) * wide;
                weights[q] = w2 + (b * k + q) * k * LANES;
            }
            convolve_row(map.out_width, rows, weights, LANES, result, LANES);
            const int c = b * LANES;
            T* out = d + (n * map.out_height + oy) * map.out_width * map.channels + c;
            vf sum = load(sums + (b - first) * LANES);
            for (long x = 0; x < map.out_width; x++) {
                const vf z = load(result + x * LANES) + load(folded.bias + c), a = z * sigmoid<T>(z);
                store(out + x * map.channels, a, map.channels - c);
                sum += a;
            }
            store(sums + (b - first) * LANES, sum);
        }
    }
    const float area = (float)(map.out_height * map.out_width);
    for (int b = first; b < last; b++)
        store(pooled + n * map.channels + b * LANES, load(sums + (b - first) * LANES) / area, map.channels - b * LANES);
}

constexpr long WAVE_ROWS = 784;  // of the output, at least, that go through the block together

template <class T>
static void inference(long threads, long images, long channels, long height, long width, long out_height,
                      long out_width, long top, long left, long k, long stride, long c_in, long out, long squeezed,
                      long residual, const T* x, const float* w1, const float* g1, const float* b1, const float* m1,
                      const float* v1, const float* w2, const float* g2, const float* b2, const float* m2,
                      const float* v2, const float* w_reduce, const float* b_reduce, const float* w_expand,
                      const float* b_expand, const float* w3, const float* g3, const float* b3, const float* m3,
                      const float* v3, double eps, T* y) {
    Call call(threads);
    const long area = height * width, out_area = out_height * out_width;
    const long wave = std::min(images, std::max(1L, WAVE_ROWS / out_area));
    const Folded second(call.arena, channels, g2, b2, m2, v2, eps), third(call.arena, out, g3, b3, m3, v3, eps);
    const Folded first = w1 ? Folded(call.arena, channels, g1, b1, m1, v1, eps) : second;
    using O = Operand<T>;
    const O* expand = w1 ? packed_weights<O>(call, w1, c_in, channels, first.bn_scale) : nullptr;
    const O* project = packed_weights<O>(call, w3, channels, out, third.bn_scale);
    const Map map(wave, channels, height, width, out_height, out_width, top, left);
    float* scaled_w2 = call.arena.take<float>(channels * k * k);
    for (long c = 0; c < channels; c++)
        for (long q = 0; q < k * k; q++) scaled_w2[c * k * k + q] = w2[c * k * k + q] * second.bn_scale[c];
    const float* packed = packed_weight(call.arena, scaled_w2, map, (int)(k * k));
    const long wide = std::max(width + left, (out_width - 1) * stride + k) * LANES;
    const Chunks chunks(map, k * wide * sizeof(float), x);
    const long ring = (chunks.width * k + 1) * wide + (out_width + chunks.width) * LANES;
    T* e_all = w1 ? call.arena.take<T>(wave * area * channels) : nullptr;
    T* d = call.arena.take<T>(wave * out_area * channels);
    float *pooled = call.arena.take<float>(wave * channels), *gate = call.arena.take<float>(wave * channels);
    const int narrow = padded(squeezed), low = block_rows<O>(c_in), high = block_rows<O>(channels);
    const int ldx = leading<O>(c_in), ldd = leading<O>(channels);
    float* active = call.arena.take<float>(wave * narrow);
    const long each = std::max({ring, (long)std::max(low, high) * STRIP,
                                small_scratch(wave, std::max(channels, squeezed))});
    const long operand_size = std::max((long)low * ldx, (long)high * ldd);
    O* operands = call.per_thread<O>(operand_size);
    float* scratches = call.per_thread<float>(each);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        float* scratch = scratches + each * thread();
        O* operand = operands + operand_size * thread();
        for (long n0 = 0; n0 < images; n0 += wave) {
            const long count = std::min(wave, images - n0);
            const T *input = x + n0 * area * c_in, *e = w1 ? e_all : input;
            if (w1) {
#pragma omp for schedule(dynamic)
                for (long r = 0; r < count * area; r += low) {
                    const int rows = (int)std::min<long>(low, count * area - r);
                    float* product = scratch;
                    copy_rows<O>(input + r * c_in, rows, c_in, operand);
                    for (int s = 0, from = 0; s < strips(channels); s++, from += STRIP) {
                        const int vectors = vectors_of(channels, from);
                        const O* strip = expand + s * strip_size<O>(c_in);
                        times_strip(rows, c_in, operand, ldx, strip, vectors, product);
                        for (int i = 0; i < rows; i++)
                            for (int c = from; c < from + vectors * LANES; c += LANES) {
                                const vf z = load(product + i * STRIP + c - from) + load(first.bias + c);
                                store(e_all + (r + i) * channels + c, z * sigmoid<T>(z), channels - c);
                            }
                    }
                }
            }
#pragma omp for schedule(dynamic) collapse(2)
            for (long n = 0; n < count; n++)
                for (int chunk = 0; chunk < chunks.count; chunk++)
                    depthwise_image(map, chunks, chunk, k, stride, e, n, packed, second, scratch, d, pooled);
            small_product<true>(count, channels, pooled, channels, w_reduce, channels, squeezed, scratch,
                                [&](int n, int s, vf v, int lanes) {
                                    v += load(b_reduce + s, lanes);
                                    store(active + n * narrow + s, v * sigmoid<float>(v));
                                });
            small_product<true>(count, squeezed, active, narrow, w_expand, squeezed, channels, scratch,
                                [&](int n, int c, vf v, int lanes) {
                                    store(gate + n * channels + c, sigmoid<float>(v + load(b_expand + c, lanes)), lanes);
                                });
#pragma omp for schedule(dynamic)
            for (long r = 0; r < count * out_area; r += high) {
                const int rows = (int)std::min<long>(high, count * out_area - r);
                float* product = scratch;
                for (int i = 0; i < rows; i++) {
                    const T* at = d + (r + i) * channels;
                    const float* gates = gate + (r + i) / out_area * channels;
                    for (int c = 0; c < channels; c += LANES)
                        store(operand + (long)i * ldd + c, load(at + c, channels - c) * load(gates + c, channels - c));
                    if (padded(channels) < ldd) store(operand + (long)i * ldd + padded(channels), vf{});
                }
                for (int s = 0, from = 0; s < strips(out); s++, from += STRIP) {
                    const int vectors = vectors_of(out, from);
                    const O* strip = project + s * strip_size<O>(channels);
                    times_strip(rows, channels, operand, ldd, strip, vectors, product);
                    for (int i = 0; i < rows; i++)
                        for (int c = from; c < from + vectors * LANES; c += LANES) {
                            const long at = (n0 * out_area + r + i) * out + c;
                            vf v = load(product + i * STRIP + c - from) + load(third.bias + c);
                            if (residual) v += load(x + at, out - c);
                            store(y + at, v, out - c);
                        }
                }
            }
        }
    }
}

OPERATION(inference)
