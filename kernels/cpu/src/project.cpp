// Squeeze-and-excite and the projection, forward and backward.
#include "common.h"

constexpr int SWEEP = 8;  // rows that a pass over the channels takes at a time: sums stay in registers meanwhile

// Per image and channel Σ a, Σ σ', Σ σ' d̂ of a group's rows, into its slots [slot][3][size].
template <class T>
static void squeeze(const Norm& norm, const T* d, long area, int channels, const Groups& groups, int g,
                    const Slots& slots, float* partial, double* found) {
    const int size = padded(channels);
    const long end = groups.start(g + 1);
    for (long r = groups.start(g); r < end;) {
        const long n = r / area, until = std::min({end, (n + 1) * area, r + 8 * SWEEP});
        memset(partial, 0, 3 * size * sizeof(float));
        for (; r < until; r += SWEEP) {
            const int rows = (int)std::min<long>(SWEEP, until - r);
            for (int c = 0; c < channels; c += LANES) {
                vf a = load(partial + c), s = load(partial + size + c), q = load(partial + 2 * size + c);
                for (int i = 0; i < rows; i++) {
                    const T* at = d + (r + i) * channels + c;
                    prefetch(at + SWEEP * channels);
                    const vf x = load(at, channels - c);
                    const Silu act = silu<T>(norm.z(x, c));
                    a += act.value, s += act.dsilu, q += act.dsilu * (x - load(norm.mean + c));
                }
                store(partial + c, a), store(partial + size + c, s), store(partial + 2 * size + c, q);
            }
        }
        r = until;
        double* sums = found + (size_t)slots.of(g, groups, area, n) * 3 * size;
        for (int i = 0; i < 3 * size; i++) sums[i] += partial[i];
    }
}

// Sums of an image over its slots, of which `vectors` doubles [vectors][size] each.
INLINE void image_sums(const Slots& slots, int n, const double* found, int vectors, int size, double* out) {
    std::fill(out, out + (size_t)vectors * size, 0.0);
    const auto range = std::equal_range(slots.image.begin(), slots.image.end(), n);
    for (auto slot = range.first; slot != range.second; slot++)
        for (int i = 0; i < vectors * size; i++) out[i] += found[(slot - slots.image.begin()) * vectors * size + i];
}

template <class T>
static void project(long threads, long images, long area, long channels, long out, long squeezed, const T* d,
                    const float* mean, const float* var, const float* weight, const float* bias, const float* w_reduce,
                    const float* b_reduce, const float* w_expand, const float* b_expand, const T* w, double eps, T* p,
                    float* p_mean, float* p_var, float* d_norm, float* pooled, float* hidden, float* gate,
                    float* dsilu_sums) {
    Call call(threads);
    const Norm norm(call.arena, channels, mean, var, weight, bias, eps);
    for (int c = 0; c < channels; c++) {
        d_norm[c] = norm.mean[c], d_norm[channels + c] = norm.rstd[c];
        d_norm[2 * channels + c] = norm.bn_scale[c], d_norm[3 * channels + c] = norm.bias[c];
    }
    using O = Operand<T>;
    const int count = strips(out), height = block_rows<O>(channels), size = padded(channels), narrow = padded(squeezed);
    const int ld = leading<O>(channels);
    const long strip = strip_size<O>(channels);
    const Groups groups(images * area, 2 * out);
    const Slots slots(groups, area);
    Statistics found(call.arena, groups.count, out);
    O *packed = call.arena.take<O>(count * strip), *operands = call.per_thread<O>((long)height * ld);
    double* sums = call.arena.zeros<double>((size_t)slots.count() * 3 * size);
    float* active = call.arena.take<float>(images * narrow);  // silu(hidden)
    const long each = std::max((long)height * STRIP, small_scratch(images, std::max(channels, squeezed)));
    float *scratches = call.per_thread<float>(each), *partials = call.per_thread<float>(3 * size);
    double* totals = call.per_thread<double>(3 * size);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        float *scratch = scratches + each * thread(), *partial = partials + 3 * size * thread();
        O* operand = operands + (long)height * ld * thread();
        double* total = totals + 3 * size * thread();
        memset((void*)operand, 0, (size_t)height * ld * sizeof(O));
#pragma omp for schedule(static) nowait
        for (int s = 0; s < count; s++) pack_strip<true>(w, channels, channels, out, s, packed + s * strip);
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) squeeze(norm, d, area, channels, groups, g, slots, partial, sums);
#pragma omp for schedule(static)
        for (int n = 0; n < images; n++) {
            image_sums(slots, n, sums, 3, size, total);
            for (int c = 0; c < channels; c++) {
                pooled[n * channels + c] = (float)(total[c] / area);
                dsilu_sums[n * channels + c] = (float)total[size + c];
                dsilu_sums[(images + n) * channels + c] = (float)(total[2 * size + c] * norm.rstd[c]);
            }
        }
        small_product<true>(images, channels, pooled, channels, w_reduce, channels, squeezed, scratch,
                            [&](int n, int s, vf v, int lanes) {
                                v += load(b_reduce + s, lanes);
                                store(hidden + n * squeezed + s, v, lanes);
                                store(active + n * narrow + s, v * sigmoid<float>(v));
                            });
        small_product<true>(images, squeezed, active, narrow, w_expand, squeezed, channels, scratch,
                            [&](int n, int c, vf v, int lanes) {
                                store(gate + n * channels + c, sigmoid<float>(v + load(b_expand + c, lanes)), lanes);
                            });
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) {
            const long start = groups.start(g), end = groups.start(g + 1);
            float* product = scratch;
            found.rows[g] = end - start;
            for (long r = start; r < end; r += height) {
                const int rows = (int)std::min<long>(height, end - r);
                for (int i = 0; i < rows; i++) {
                    const T* at = d + (r + i) * channels;
                    const float* gates = gate + (r + i) / area * channels;
                    for (int c = 0; c < channels; c += LANES) {
                        const int lanes = channels - c;
                        prefetch(at + channels + c);
                        const vf z = norm.z(load(at + c, lanes), c);
                        store(operand + (long)i * ld + c, z * sigmoid<T>(z) * load(gates + c, lanes));
                    }
                }
                for (int s = 0, from = 0; s < count; s++, from += STRIP) {
                    const int vectors = vectors_of(out, from);
                    times_strip(rows, channels, operand, ld, packed + s * strip, vectors, product);
                    keep_strip(found, vectors, g, r == start, product, rows, from, p + r * out + from, out,
                               Store::whole);
                }
            }
        }
    }
    found.merge(p_mean, p_var);
}

// What follows dA of a strip: stored; its sums with a, σ' and σ' d̂ over rows of one image; and a times the gate in its
// place, the weight gradient's operand.
template <int N, bool PAST, class T>
static void finish_strip(const Norm& norm, float* product, int rows, int from, int channels, const T* d, T* da,
                         const float* gate, double* sums, int size) {
    vf mean[N], bn_scale[N], bias[N], gates[N], sum[3][N] = {};
    UNROLL for (int j = 0; j < N; j++) {
        const int c = from + j * LANES;
        mean[j] = load(norm.mean + c), bn_scale[j] = load(norm.bn_scale + c), bias[j] = load(norm.bias + c);
        gates[j] = load(gate + c, channels - c);
    }
    for (int i = 0; i < rows; i++) {
        prefetch(d + (i + 4L) * channels + from);
        UNROLL for (int j = 0; j < N; j++) {
            const int c = from + j * LANES;
            const long at = (long)i * channels + c;
            float* cell = product + i * STRIP + j * LANES;
            const vf g = load(cell), beyond = load(d + at, channels - c) - mean[j];
            const Silu act = silu<T>(beyond * bn_scale[j] + bias[j]);
            if constexpr (PAST)
                stream(da + at, g);
            else
                store(da + at, g, channels - c);
            sum[0][j] += g * act.value, sum[1][j] += g * act.dsilu, sum[2][j] += g * act.dsilu * beyond;
            store(cell, act.value * gates[j]);
        }
    }
    UNROLL for (int k = 0; k < 3; k++)
        UNROLL for (int j = 0; j < N; j++) add_to(sums + k * size + from + j * LANES, sum[k][j]);
}

template <class T>
static void project_backward(long threads, long images, long area, long channels, long out, long squeezed, const T* dy,
                             const T* p, const float* drop_scale, const float* p_sums, const float* p_mean,
                             const float* p_var, const float* p_weight, const float* p_bias, const T* d,
                             const float* d_norm, const T* w, const float* w_reduce, const float* w_expand,
                             const float* pooled, const float* hidden, const float* gate, const float* dsilu_sums,
                             double eps, T* da, float* q, float* d_sums, float* dw, float* dw_reduce, float* db_reduce,
                             float* dw_expand, float* db_expand) {
    Call call(threads);
    const Norm p_norm(call.arena, out, p_mean, p_var, p_weight, p_bias, eps);
    const NormBackward backward(call.arena, out, p_norm, p_sums, images * area);
    const Norm norm(call.arena, channels, d_norm);
    using O = Operand<T>;
    const int count = strips(channels), height = block_rows<O>(out), size = padded(channels), ldp = leading<O>(out);
    const int narrow = padded(squeezed);
    const long strip = strip_size<O>(out), gradient = (long)round_up(out, 16) * size;
    const long left_size = across_size<O>(height, out), right_size = across_size<O>(height, STRIP);
    const bool past = store_of(da, images * area * channels, channels) == Store::stream;
    const Groups groups(images * area, gradient);
    const Slots slots(groups, area);
    O *packed = call.arena.take<O>(count * strip), *operands = call.per_thread<O>((long)height * ldp);
    float* gradients = call.arena.zeros<float>(groups.count * gradient);
    double* sums = call.arena.zeros<double>((size_t)slots.count() * 3 * size);
    float *du = call.arena.zeros<float>(images * size), *dv = call.arena.zeros<float>(images * narrow);
    float* sum_dsilu = call.arena.zeros<float>(images * size);
    float* sum_dsilu_centred = call.arena.zeros<float>(images * size);
    float *wide_pooled = call.arena.zeros<float>(images * size), *active = call.arena.zeros<float>(images * narrow);
    float *reduce = call.arena.zeros<float>(squeezed * size), *expand = call.arena.zeros<float>(size * narrow);
    const long each = std::max((long)height * STRIP, small_scratch(images, std::max(channels, squeezed)));
    float* sides = call.per_thread<float>(left_size + right_size);
    float* scratches = call.per_thread<float>(each);
    double* totals = call.per_thread<double>(3 * size);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        O* dp = operands + (long)height * ldp * thread();
        float *product = scratches + each * thread(), *side = sides + (left_size + right_size) * thread();
        memset((void*)dp, 0, (size_t)height * ldp * sizeof(O));
        double* total = totals + 3 * size * thread();
#pragma omp for schedule(static)
        for (int s = 0; s < count; s++) pack_strip<false>(w, channels, out, channels, s, packed + s * strip);
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) {
            const long end = groups.start(g + 1);
            for (long r = groups.start(g); r < end; r += height) {
                const int rows = (int)std::min<long>(height, end - r);
                for (int i = 0; i < rows; i++) {
                    const float factor = drop_scale ? drop_scale[(r + i) / area] : 1.0f;
                    const long at = (r + i) * out;
                    for (int c = 0; c < out; c += LANES) {
                        const vf dz = load(dy + at + c, out - c) * factor;
                        store(dp + (long)i * ldp + c, backward.dx(p_norm, dz, load(p + at + c, out - c), c));
                    }
                }
                long ldl, ldr;
                const float* left = left_of<O>(dp, ldp, rows, out, side, &ldl);
                for (int s = 0, from = 0; s < count; s++, from += STRIP) {
                    const int vectors = vectors_of(channels, from);
                    times_strip(rows, out, dp, ldp, packed + s * strip, vectors, product);
                    for (int i = 0; i < rows;) {
                        const long n = (r + i) / area, at = (r + i) * channels;
                        const int until = (int)std::min<long>(rows, (n + 1) * area - r);
                        double* mine = sums + (size_t)slots.of(g, groups, area, n) * 3 * size;
                        const float* gates = gate + n * channels;
                        const auto finish = vectors == 1 ? finish_strip<1, false, T>
                                            : past       ? finish_strip<2, true, T>
                                                         : finish_strip<2, false, T>;
                        float* rows_of = product + i * STRIP;
                        finish(norm, rows_of, until - i, from, channels, d + at, da + at, gates, mine, size);
                        i = until;
                    }
                    const int wide = vectors * LANES;
                    const float* right = right_of<O>(product, STRIP, rows, wide, side + left_size, &ldr);
                    add_across<O>(rows, out, left, ldl, wide, right, ldr, gradients + g * gradient + from, size);
                }
            }
        }
#pragma omp for schedule(static)
        for (int n = 0; n < images; n++) {
            image_sums(slots, n, sums, 3, size, total);
            for (int c = 0; c < channels; c++) {
                const float open = gate[n * channels + c];
                du[n * size + c] = (float)total[c] * open * (1.0f - open);
                sum_dsilu[n * size + c] = (float)total[size + c];
                sum_dsilu_centred[n * size + c] = (float)(total[2 * size + c] * norm.rstd[c]);
                wide_pooled[n * size + c] = pooled[n * channels + c];
            }
        }
        small_product<false>(images, channels, du, size, w_expand, squeezed, squeezed, product,
                             [&](int n, int s, vf v, int lanes) {
                                 const Silu act = silu<float>(load(hidden + n * squeezed + s, lanes));
                                 const vf kept = v * act.dsilu;
                                 store(dv + n * narrow + s, kept, lanes);
                                 store(active + n * narrow + s, act.value, lanes);
                             });
        small_product<false>(images, squeezed, dv, narrow, w_reduce, channels, channels, product,
                             [&](int n, int c, vf v, int lanes) {
                                 store(q + n * channels + c, v * (1.0f / (float)area), lanes);
                             });
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++) {
            double s = 0, x = 0, b = 0;
            for (int n = 0; n < images; n++) {
                const double open = gate[n * channels + c], mine = q[n * channels + c];
                s += open * sum_dsilu[n * size + c] + mine * dsilu_sums[n * channels + c];
                x += open * sum_dsilu_centred[n * size + c] + mine * dsilu_sums[(images + n) * channels + c];
                b += du[n * size + c];
            }
            d_sums[c] = (float)s, d_sums[channels + c] = (float)x, db_expand[c] = (float)b;
        }
#pragma omp for schedule(static)
        for (int c = 0; c < size; c += STRIP) {
            const int wide = std::min<int>(STRIP, size - c), lanes = std::min<int>(STRIP, channels - c);
            add_across<float>(images, squeezed, dv, narrow, wide, wide_pooled + c, size, reduce + c, size);
            add_across<float>(images, lanes, du + c, size, narrow, active, narrow, expand + c * narrow, narrow);
            for (int s = 0; s < squeezed; s++) {
                memcpy(dw_reduce + s * channels + c, reduce + s * size + c, lanes * sizeof(float));
                for (int k = c; k < c + lanes; k++) dw_expand[k * squeezed + s] = expand[k * narrow + s];
            }
        }
#pragma omp for schedule(static)
        for (int s = 0; s < squeezed; s++) {
            double b = 0;
            for (int n = 0; n < images; n++) b += dv[n * narrow + s];
            db_reduce[s] = (float)b;
        }
#pragma omp for schedule(static)
        for (int o = 0; o < out; o++)
            for (int c = 0; c < channels; c += LANES) {
                vf v{};
                for (int g = 0; g < groups.count; g++) v += load(gradients + g * gradient + o * size + c);
                store(dw + o * channels + c, v, channels - c);
            }
    }
}

OPERATION(project)
OPERATION(project_backward)
