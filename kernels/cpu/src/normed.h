// A product whose output a batch norm follows: its statistics come with it.
#pragma once

#include "common.h"

// e [rows x channels] = a wᵀ and its statistics, a's rows from `source(row, rows, scratch, &a, &lda)`.
template <class T, class Source>
static void product_with_statistics(Call& call, const Source& source, long rows, int depth, const T* w, int channels,
                                    T* e, float* mean, float* var) {
    using O = Operand<T>;
    const int count = strips(channels), height = block_rows<O>(depth);
    const long size = strip_size<O>(depth), each = (long)height * leading<O>(depth);
    const Groups groups(rows, 2 * channels);
    Statistics found(call.arena, groups.count, channels);
    const Store how = store_of(e, rows * channels, channels);
    O *packed = call.arena.take<O>(count * size), *blocks = call.per_thread<O>(each);
    float* products = call.per_thread<float>(height * STRIP);
#pragma omp parallel num_threads(call.threads)
    {
        const TileUse use;
        O* scratch = blocks + each * thread();
        float* product = products + (long)height * STRIP * thread();
#pragma omp for schedule(static)
        for (int s = 0; s < count; s++) pack_strip<true>(w, depth, depth, channels, s, packed + s * size);
#pragma omp for schedule(dynamic)
        for (int g = 0; g < groups.count; g++) {
            const long start = groups.start(g), end = groups.start(g + 1);
            found.rows[g] = end - start;
            for (long r = start; r < end; r += height) {
                const int n = (int)std::min<long>(height, end - r);
                const O* a;
                long lda;
                source(r, n, scratch, &a, &lda);
                for (int s = 0, from = 0; s < count; s++, from += STRIP) {
                    const int vectors = vectors_of(channels, from);
                    times_strip(n, depth, a, lda, packed + s * size, vectors, product);
                    T* out = e + r * channels + from;
                    keep_strip(found, vectors, g, r == start, product, n, from, out, channels, how);
                }
            }
        }
    }
    found.merge(mean, var);
}
