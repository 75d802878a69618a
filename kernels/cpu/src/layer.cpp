// A convolution with its batch norm and SiLU outside of the blocks, in training: the stem's, and around the head's, whose
// products are those of an expansion. The convolution of a window is a product with what the window holds, row by row.
#include "normed.h"

struct Windows {
    long channels, height, width, out_height, out_width, top, left, k, stride;
    int depth() const { return (int)(k * k * channels); }
    // What the window of output pixel `r` holds, [ky][kx][channel], zeros beyond the image and up to `ld`.
    template <class T, class O>
    void copy(const T* x, long r, O* out, int ld) const {
        const long n = r / (out_height * out_width), at = r % (out_height * out_width);
        const long y0 = at / out_width * stride - top, x0 = at % out_width * stride - left;
        const long first = std::max(0L, -x0), last = std::max(first, std::min(k, width - x0));
        memset((void*)out, 0, ld * sizeof(O));
        for (long ky = 0; ky < k; ky++) {
            if (y0 + ky < 0 || y0 + ky >= height || first >= last) continue;
            const T* from = x + ((n * height + y0 + ky) * width + x0 + first) * channels;
            O* to = out + (ky * k + first) * channels;
            for (long i = 0; i < (last - first) * channels; i++) {
                if constexpr (sizeof(T) == sizeof(O))
                    to[i] = from[i];
                else
                    to[i] = wide(from[i]);
            }
        }
    }
};

template <class T>
static void convolve(long threads, long images, long c_in, long height, long width, long out_height, long out_width,
                     long top, long left, long k, long stride, long channels, const T* x, const T* w, T* s, float* mean,
                     float* var) {
    Call call(threads);
    using O = Operand<T>;
    const Windows windows{c_in, height, width, out_height, out_width, top, left, k, stride};
    const int ld = leading<O>(windows.depth());
    const auto source = [=, &windows](long r, int n, O* scratch, const O** a, long* lda) {
        for (int i = 0; i < n; i++) windows.copy(x, r + i, scratch + (long)i * ld, ld);
        *a = scratch, *lda = ld;
    };
    product_with_statistics(call, source, images * out_height * out_width, windows.depth(), w, channels, s, mean, var);
}

// y = silu(norm(s)).
template <class T>
static void activate(long threads, long rows, long channels, const T* s, const float* mean, const float* var,
                     const float* weight, const float* bias, double eps, T* y) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    const bool past = streams_blocks(y, rows * channels, channels);
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (long r = 0; r < rows; r++)
        for (int c = 0; c < channels; c += LANES) {
            const vf z = norm.z(load(s + r * channels + c, channels - c), c), v = z * sigmoid<T>(z);
            if (past)
                stream(y + r * channels + c, v);
            else
                store(y + r * channels + c, v, channels - c);
        }
}

// du = dy σ'(z), and Σ du and Σ du ŝ.
template <class T>
static void activate_backward(long threads, long rows, long channels, const T* dy, const T* s, const float* mean,
                              const float* var, const float* weight, const float* bias, double eps, T* du, float* sums) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    const Groups groups(rows, 2 * channels);
    const int size = padded(channels);
    const bool past = streams_blocks(du, rows * channels, channels);
    double* found = call.arena.zeros<double>((size_t)groups.count * 2 * size);
#pragma omp parallel for schedule(dynamic) num_threads(call.threads)
    for (int g = 0; g < groups.count; g++) {
        double* mine = found + (size_t)g * 2 * size;
        for (long r = groups.start(g), end = groups.start(g + 1); r < end; r += FEW)
            for (int c = 0; c < channels; c += LANES) {
                const int lanes = channels - c;
                const vf centre = load(norm.mean + c);
                vf total{}, total_centred{};
                for (long i = r; i < std::min(end, r + FEW); i++) {
                    const vf raw = load(s + i * channels + c, lanes);
                    const vf v = load(dy + i * channels + c, lanes) * silu<T>(norm.z(raw, c)).dsilu;
                    if (past)
                        stream(du + i * channels + c, v);
                    else
                        store(du + i * channels + c, v, lanes);
                    total += v, total_centred += v * (raw - centre);
                }
                add_to(mine + c, total);
                add_to(mine + size + c, total_centred);
            }
    }
    for (int c = 0; c < channels; c++) {
        double total = 0, total_centred = 0;
        for (int g = 0; g < groups.count; g++) {
            total += found[(size_t)g * 2 * size + c], total_centred += found[(size_t)(g * 2 + 1) * size + c];
        }
        sums[c] = (float)total, sums[channels + c] = (float)(total_centred * norm.rstd[c]);
    }
}

// dw [channels, k k c_in] of a convolution whose norm's backward is left: du and s as `activate_backward` has them.
template <class T>
static void convolve_backward(long threads, long images, long c_in, long height, long width, long out_height,
                              long out_width, long top, long left, long k, long stride, long channels, const T* x,
                              const T* du, const T* s, const float* sums, const float* mean, const float* var,
                              const float* weight, const float* bias, double eps, float* dw) {
    Call call(threads);
    using O = Operand<T>;
    const Windows windows{c_in, height, width, out_height, out_width, top, left, k, stride};
    const long rows = images * out_height * out_width;
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    const NormBackward backward(call.arena, channels, norm, sums, rows);
    const int depth = windows.depth(), ldx = leading<O>(depth), ld = leading<O>(channels), wide_dw = padded(depth);
    const int block = block_rows<O>(std::max<int>(depth, channels));
    const long left_size = across_size<O>(block, channels), right_size = across_size<O>(block, depth);
    const long gradient = (long)round_up(channels, 16) * wide_dw;
    const Groups groups(rows, gradient);
    float* gradients = call.arena.zeros<float>(groups.count * gradient);
    O *ds_all = call.per_thread<O>((long)block * ld), *x_all = call.per_thread<O>((long)block * ldx);
    float* sides = call.per_thread<float>(left_size + right_size);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        O *ds = ds_all + (long)block * ld * thread(), *xs = x_all + (long)block * ldx * thread();
        float* side = sides + (left_size + right_size) * thread();
        memset((void*)ds, 0, (size_t)block * ld * sizeof(O));
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) {
            const long end = groups.start(g + 1);
            for (long r = groups.start(g); r < end; r += block) {
                const int n = (int)std::min<long>(block, end - r);
                for (int i = 0; i < n; i++) {
                    const long at = (r + i) * channels;
                    for (int c = 0; c < channels; c += LANES) {
                        const vf u = load(du + at + c, channels - c), raw = load(s + at + c, channels - c);
                        store(ds + (long)i * ld + c, backward.dx(norm, u, raw, c));
                    }
                    windows.copy(x, r + i, xs + (long)i * ldx, ldx);
                }
                long ldl, ldr;
                const float* l = left_of<O>(ds, ld, n, channels, side, &ldl);
                const float* right = right_of<O>(xs, ldx, n, depth, side + left_size, &ldr);
                add_across<O>(n, channels, l, ldl, depth, right, ldr, gradients + g * gradient, wide_dw);
            }
        }
    }
    for (int c = 0; c < channels; c++)
        for (int j = 0; j < depth; j++) {
            double total = 0;
            for (int g = 0; g < groups.count; g++) total += gradients[g * gradient + (long)c * wide_dw + j];
            dw[(long)c * depth + j] = (float)total;
        }
}

OPERATION(convolve)
OPERATION(activate)
OPERATION(activate_backward)
OPERATION(convolve_backward)
