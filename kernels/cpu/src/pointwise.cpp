// Expansion, residual add and their backward: everything of a block but its depthwise and projecting convolutions.
#include "normed.h"

template <class T>
static void expand(long threads, long rows, long c_in, long channels, const T* x, const T* w, T* e, float* mean,
                   float* var) {
    Call call(threads);
    using O = Operand<T>;
    const auto source = [=](long r, int n, O* scratch, const O** a, long* lda) {
        if (read_in_place<T>(n, c_in)) {
            *a = (const O*)(x + r * c_in), *lda = c_in;
        } else {
            copy_rows<O>(x + r * c_in, n, c_in, scratch);
            *a = scratch, *lda = leading<O>(c_in);
        }
    };
    product_with_statistics(call, source, rows, c_in, w, channels, e, mean, var);
}

// y = drop_scale[b] norm(p) + residual, one row; what was stored also as an operand, where asked for.
template <class T>
INLINE void residual_add_row(const Norm& norm, const T* p, const T* residual, float drop_scale, int channels, T* y,
                     Operand<T>* kept) {
    for (int c = 0; c < channels; c += LANES) {
        vf v = norm.z(load(p + c, channels - c), c) * drop_scale;
        if (residual) v += load(residual + c, channels - c);
        store(y + c, v, channels - c);
        if (kept) store(kept + c, stored(v, y));
    }
}

template <class T>
static void residual_expand(long threads, long images, long area, long c_in, long channels, const T* p, const T* residual,
                          const float* drop_scale, const float* mean0, const float* var0, const float* weight,
                          const float* bias, double eps, const T* w, T* x, T* e, float* mean, float* var) {
    Call call(threads);
    const Norm norm(call.arena, c_in, mean0, var0, weight, bias, eps);
    using O = Operand<T>;
    const int ld = leading<O>(c_in);
    const auto source = [=, &norm](long r, int n, O* scratch, const O** a, long* lda) {
        for (int i = 0; i < n; i++) {
            const long at = (r + i) * c_in;
            residual_add_row(norm, p + at, residual ? residual + at : nullptr,
                             drop_scale ? drop_scale[(r + i) / area] : 1.0f, c_in, x + at, scratch + (long)i * ld);
            if (padded(c_in) < ld) store(scratch + (long)i * ld + padded(c_in), vf{});
        }
        *a = scratch, *lda = ld;
    };
    product_with_statistics(call, source, images * area, c_in, w, channels, e, mean, var);
}

template <class T>
static void residual_add(long threads, long images, long area, long channels, const T* p, const T* residual,
                         const float* drop_scale, const float* mean, const float* var, const float* weight,
                         const float* bias, double eps, T* y) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (long r = 0; r < images * area; r++) {
        const long at = r * channels;
        residual_add_row(norm, p + at, residual ? residual + at : nullptr, drop_scale ? drop_scale[r / area] : 1.0f,
                         channels, y + at, (Operand<T>*)nullptr);
    }
}

// Σ dz and Σ dz p̂, dz = drop_scale[b] dy.
template <class T>
static void residual_add_backward(long threads, long images, long area, long channels, const T* dy,
                                  const T* p, const float* drop_scale, const float* mean, const float* var, double eps,
                                  float* sums) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, nullptr, nullptr, eps);
    const Groups groups(images * area, 2 * channels);
    const int size = padded(channels);
    double* found = call.arena.zeros<double>((size_t)groups.count * 2 * size);
#pragma omp parallel for schedule(dynamic) num_threads(call.threads)
    for (int g = 0; g < groups.count; g++) {
        double* mine = found + (size_t)g * 2 * size;
        for (long r = groups.start(g), end = groups.start(g + 1); r < end;) {
            const long until = std::min({end, r + FEW, (r / area + 1) * area});  // rows of one image
            const float factor = drop_scale ? drop_scale[r / area] : 1.0f;
            for (int c = 0; c < channels; c += LANES) {
                vf s{}, q{};
                const vf centre = load(norm.mean + c);
                for (long i = r; i < until; i++) {
                    const vf dz = load(dy + i * channels + c, channels - c);
                    s += dz, q += dz * (load(p + i * channels + c, channels - c) - centre);
                }
                add_to(mine + c, s * factor);
                add_to(mine + size + c, q * factor);
            }
            r = until;
        }
    }
    for (int c = 0; c < channels; c++) {
        double s = 0, q = 0;
        for (int g = 0; g < groups.count; g++) {
            s += found[(size_t)g * 2 * size + c], q += found[(size_t)(g * 2 + 1) * size + c];
        }
        sums[c] = (float)s, sums[channels + c] = (float)(q * norm.rstd[c]);
    }
}

constexpr long AHEAD = 8;  // rows, of what is prefetched

// dE of a block from dA1 σ'(z), which `depthwise_backward` leaves, and E; dx = dE w (+ the residual's), dw = dEᵀ x.
template <class T>
static void expand_backward(long threads, long rows, long c_in, long channels, const T* du, const T* e,
                            const float* sums, const float* mean, const float* var, const float* weight,
                            const float* bias, double eps, const T* x, const T* w, const T* residual, T* dx,
                            float* dw) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    const NormBackward backward(call.arena, channels, norm, sums, rows);
    using O = Operand<T>;
    const int count = strips(c_in), height = block_rows<O>(channels), ld = leading<O>(channels);
    const int wide_x = leading<O>(c_in), ldx = padded(c_in);
    const long size = strip_size<O>(channels), gradient = (long)round_up(channels, 16) * ldx;
    const long left_size = across_size<O>(height, channels), right_size = across_size<O>(height, c_in);
    const Groups groups(rows, gradient);
    O* packed = call.arena.take<O>(count * size);
    float* gradients = call.arena.zeros<float>(groups.count * gradient);
    O *de_all = call.per_thread<O>((long)height * ld), *x_all = call.per_thread<O>((long)height * wide_x);
    float* products = call.per_thread<float>(height * STRIP);
    float* sides = call.per_thread<float>(left_size + right_size);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        O *de = de_all + (long)height * ld * thread(), *xs = x_all + (long)height * wide_x * thread();
        float* product = products + (long)height * STRIP * thread();
        float* side = sides + (left_size + right_size) * thread();
        memset((void*)de, 0, (size_t)height * ld * sizeof(O));
#pragma omp for schedule(static)
        for (int s = 0; s < count; s++) pack_strip<false>(w, c_in, channels, c_in, s, packed + s * size);
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) {
            const long end = groups.start(g + 1);
            for (long r = groups.start(g); r < end; r += height) {
                const int n = (int)std::min<long>(height, end - r);
                for (int i = 0; i < n; i++) {
                    const T *u = du + (r + i) * channels, *raw = e + (r + i) * channels;
                    for (int c = 0; c < channels; c += LANES) {
                        const int left = channels - c;
                        prefetch(u + AHEAD * channels + c);
                        prefetch(raw + AHEAD * channels + c);
                        store(de + (long)i * ld + c, backward.dx(norm, load(u + c, left), load(raw + c, left), c));
                    }
                }
                for (int s = 0, from = 0; s < count; s++, from += STRIP) {
                    const int vectors = vectors_of(c_in, from);
                    times_strip(n, channels, de, ld, packed + s * size, vectors, product);
                    for (int i = 0; i < n; i++)
                        for (int j = 0; j < vectors; j++) {
                            const long at = (r + i) * c_in + from + j * LANES;
                            const int left = c_in - from - j * LANES;
                            vf v = load(product + i * STRIP + j * LANES);
                            if (residual) v += load(residual + at, left);
                            store(dx + at, v, left);
                        }
                }
                copy_rows<O>(x + r * c_in, n, c_in, xs);
                long ldl, ldr;
                const float* left = left_of<O>(de, ld, n, channels, side, &ldl);
                const float* right = right_of<O>(xs, wide_x, n, c_in, side + left_size, &ldr);
                add_across<O>(n, channels, left, ldl, c_in, right, ldr, gradients + g * gradient, ldx);
            }
        }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            for (int k = 0; k < c_in; k += LANES) {
                vf v{};
                for (int g = 0; g < groups.count; g++) v += load(gradients + g * gradient + (long)c * ldx + k);
                store(dw + (long)c * c_in + k, v, c_in - k);
            }
    }
}

OPERATION(expand)
OPERATION(residual_expand)
OPERATION(residual_add)
OPERATION(residual_add_backward)
OPERATION(expand_backward)
