// What the operations share: scratch memory, how rows are cut, batch norm's coefficients and statistics.
#pragma once

#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "product.h"

// --- scratch ---------------------------------------------------------------------------------------------------------

// Memory of one calling thread, handed out in 64-byte steps and taken back as a whole when the operation ends. It keeps
// what the largest operation so far has needed.
class Arena {
  public:
    ~Arena() {
        for (const Chunk& chunk : chunks) free(chunk.memory);
    }

    template <class T>
    T* take(size_t count) {
        const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;  // at least a vector more than asked for
        if (chunks.empty() || chunks.back().used + bytes > chunks.back().size) add(bytes);
        Chunk& chunk = chunks.back();
        char* start = chunk.memory + chunk.used;
        chunk.used += bytes;
#ifdef FASTNET_POISON
        memset(start, 0xff, bytes);  // NaN: what is read before it was written shows
#endif
        return (T*)start;
    }

    template <class T>
    T* zeros(size_t count) {
        T* start = take<T>(count);
        memset((void*)start, 0, count * sizeof(T));
        return start;
    }

    void release() {
        size_t total = 0;
        for (const Chunk& chunk : chunks) total += chunk.size;
        if (chunks.size() > 1) {
            for (const Chunk& chunk : chunks) free(chunk.memory);
            chunks.clear();
            add(total);
        }
        if (!chunks.empty()) chunks.back().used = 0;
    }

  private:
    struct Chunk {
        char* memory;
        size_t size, used;
    };
    std::vector<Chunk> chunks;

    void add(size_t bytes) {
        const size_t size = std::max(bytes, (size_t)1 << 20);
        char* memory = (char*)aligned_alloc(64, (size + 63) / 64 * 64);
        if (!memory) throw std::bad_alloc();
        chunks.push_back({memory, size, 0});
    }
};

// One operation: its scratch and its threads. The pieces that it cuts its work into never depend on the threads.
struct Call {
    Arena& arena;
    const int threads;
    explicit Call(long threads) : arena(mine()), threads((int)threads) {}
    ~Call() { arena.release(); }
    static Arena& mine() {
        static thread_local Arena arena;
        return arena;
    }
    // Scratch of each thread: `each` elements apart.
    template <class T>
    T* per_thread(size_t each) {
        return arena.take<T>(each * threads);
    }
};

// An operation as it is called from outside: 0, or 1 where there was no memory.
template <auto F>
struct Guarded;
template <class... A, void (*F)(A...)>
struct Guarded<F> {
    static int run(A... arguments) {
        try {
            F(arguments...);
            return 0;
        } catch (const std::bad_alloc&) {
            return 1;
        }
    }
};

// `fastnet_<name>`: the operation's address for fp32 images, then for bf16. Whole numbers are passed as long.
#define OPERATION(name)                                                                                    \
    extern "C" {                                                                                           \
    __attribute__((visibility("default"))) void* fastnet_##name[] = {(void*)Guarded<name<float>>::run,     \
                                                                     (void*)Guarded<name<bf16>>::run};     \
    }

// One that has fp32 alone.
#define ON_FP32(name)                                                                                      \
    extern "C" {                                                                                           \
    __attribute__((visibility("default"))) void* fastnet_##name[] = {(void*)Guarded<name>::run, nullptr};  \
    }

INLINE int thread() { return omp_get_thread_num(); }

// --- how rows are cut ------------------------------------------------------------------------------------------------

constexpr int MOST_GROUPS = 32;
constexpr long LEAST_ROWS = 192;                        // of a group, so that its sums cost little beside its products
constexpr size_t ACCUMULATORS = (size_t)8 << 20;        // elements, over all groups

// Rows in groups that are summed each by itself: by shape alone, so that sums have the same bits for any number of
// threads. `accumulators` is what a group's sums take, in elements.
struct Groups {
    long rows;
    int count;
    Groups(long rows, size_t accumulators) : rows(rows) {
        const long wanted = std::min<long>(MOST_GROUPS, std::max(1L, rows / LEAST_ROWS));
        const long allowed = std::max<long>(4, (long)(ACCUMULATORS / std::max<size_t>(accumulators, 1)));
        count = (int)std::min(wanted, allowed);
    }
    long start(int g) const { return rows * g / count; }
};

// Sums of each image of which a group has rows: slots in order, first by group.
struct Slots {
    std::vector<int> first, image;  // of a group's images: slot of the first; of a slot: the image
    Slots(const Groups& groups, long area) {
        for (int g = 0; g < groups.count; g++) {
            first.push_back((int)image.size());
            for (long n = groups.start(g) / area; n * area < groups.start(g + 1); n++) image.push_back((int)n);
        }
    }
    int of(int g, const Groups& groups, long area, long n) const {
        return first[g] + (int)(n - groups.start(g) / area);
    }
    int count() const { return (int)image.size(); }
};

// --- batch norm ------------------------------------------------------------------------------------------------------

// z = (x - mean) bn_scale + bias, x̂ = (x - mean) rstd: each up to a whole vector, zero past the channels. Without a
// norm all are null.
struct Norm {
    float *mean = nullptr, *rstd = nullptr, *bn_scale = nullptr, *bias = nullptr;
    Norm() = default;
    Norm(Arena& arena, int channels, const float* m, const float* v, const float* w, const float* b, double eps) {
        if (!m) return;
        const int size = padded(channels);
        mean = arena.zeros<float>(size), rstd = arena.zeros<float>(size);
        bn_scale = arena.zeros<float>(size), bias = arena.zeros<float>(size);
        for (int c = 0; c < channels; c++) {
            const double r = 1.0 / std::sqrt((double)v[c] + eps);
            mean[c] = m[c], rstd[c] = (float)r;
            bn_scale[c] = w ? (float)(w[c] * r) : 0.0f, bias[c] = b ? b[c] : 0.0f;
        }
    }
    Norm(Arena& arena, int channels, const float* vectors) {  // [4, channels] as `project` leaves them
        float** const all[] = {&mean, &rstd, &bn_scale, &bias};
        for (int i = 0; i < 4; i++) {
            *all[i] = arena.zeros<float>(padded(channels));
            memcpy(*all[i], vectors + (long)i * channels, channels * sizeof(float));
        }
    }
    explicit operator bool() const { return mean; }
    __attribute__((always_inline)) inline vf z(vf x, int c) const {
        return (x - load(mean + c)) * load(bn_scale + c) + load(bias + c);
    }
};

// A norm's backward: dx = dz bn_scale + (x - mean) grad_slope + grad_offset, of Σ dz and Σ dz x̂ over `rows` rows.
struct NormBackward {
    float *grad_slope, *grad_offset;
    NormBackward(Arena& arena, int channels, const Norm& norm, const float* sums, long rows) {
        grad_slope = arena.zeros<float>(padded(channels)), grad_offset = arena.zeros<float>(padded(channels));
        for (int c = 0; c < channels; c++) {
            const double bn_scale = norm.bn_scale[c];
            grad_offset[c] = (float)(-bn_scale * sums[c] / (double)rows);
            grad_slope[c] = (float)(-bn_scale * norm.rstd[c] * sums[channels + c] / (double)rows);
        }
    }
    __attribute__((always_inline)) inline vf dx(const Norm& norm, vf dz, vf x, int c) const {
        return dz * load(norm.bn_scale + c) + (x - load(norm.mean + c)) * load(grad_slope + c) + load(grad_offset + c);
    }
};

// Tensors larger than this are stored past the caches; in the tests' builds all that can be.
#ifdef FASTNET_POISON
constexpr long STREAMED_BYTES = 0;
#else
constexpr long STREAMED_BYTES = (long)8 << 20;
#endif
constexpr int FEW = 16;  // values that are summed in fp32 before they join a sum in fp64

// The mean of the first few of `count` vectors, `step` apart.
INLINE vf mean_of(const float* values, long count, long step) {
    const long few = std::min<long>(count, FEW);
    vf sum{};
    for (long i = 0; i < few; i++) sum += load(values + i * step);
    return sum * (1.0f / (float)few);
}

// Mean and M2 of each group's values, about the mean of the group's first few, so that neither a large mean nor a first
// value that lies far out costs digits.
struct Statistics {
    int channels, size;
    float* pivot;
    double *sum, *square;  // [groups][size], of what lies beyond the pivot
    std::vector<long> rows;
    Statistics(Arena& arena, int groups, int channels)
        : channels(channels), size(padded(channels)), pivot(arena.take<float>((size_t)groups * size)),
          sum(arena.zeros<double>((size_t)groups * size)), square(arena.zeros<double>((size_t)groups * size)),
          rows(groups) {}

    __attribute__((always_inline)) inline void add(int g, int c, vf s, vf q) {
        add_to(sum + (size_t)g * size + c, s);
        add_to(square + (size_t)g * size + c, q);
    }

    // Chan, Golub and LeVeque 1979, in the order of the groups: mean and biased variance [channels].
    void merge(float* mean, float* var) const {
        for (int c = 0; c < channels; c++) {
            double n = 0, m = 0, m2 = 0;
            for (size_t g = 0; g < rows.size(); g++) {
                if (!rows[g]) continue;
                const double k = (double)rows[g], s = sum[g * size + c];
                const double delta = pivot[g * size + c] + s / k - m;
                m2 += square[g * size + c] - s * s / k + delta * delta * n * k / (n + k);
                m += delta * k / (n + k);
                n += k;
            }
            mean[c] = (float)m, var[c] = (float)(std::max(m2, 0.0) / n);
        }
    }
};

// Store a strip of a product as T and take its statistics.
enum class Store { part, whole, stream };

// How rows of `channels` are stored: past the caches where the tensor of `count` is too large to stay there.
template <class T>
INLINE Store store_of(const T* out, long count, long channels) {
    const bool aligned = (uintptr_t)out % 64 == 0 && channels * sizeof(T) % 64 == 0;  // whole cache lines
    return aligned && count * (long)sizeof(T) > STREAMED_BYTES ? Store::stream : Store::whole;
}

// Whether one vector of channels at a time can be stored past the caches: it has to fill a cache line.
template <class T>
INLINE bool streams_blocks(const T* out, long count, long channels) {
    return LANES * sizeof(T) == 64 && store_of(out, count, channels) == Store::stream;
}

template <int N, Store HOW, class T>
static void keep_strip_of(Statistics& found, int g, bool first, const float* c, int rows, int from, T* out, long ldo) {
    float* pivots = found.pivot + (size_t)g * found.size + from;
    vf pivot[N], s[N], q[N];
    int lanes[N];
    UNROLL for (int j = 0; j < N; j++) {
        if (first) store(pivots + j * LANES, mean_of(c + j * LANES, rows, STRIP));
        pivot[j] = load(pivots + j * LANES);
        lanes[j] = found.channels - from - j * LANES;
    }
    for (int i = 0; i < rows;) {
        UNROLL for (int j = 0; j < N; j++) s[j] = q[j] = vf{};
        for (const int until = std::min(rows, i + FEW); i < until; i++)
            UNROLL for (int j = 0; j < N; j++) {
                const vf v = load(c + i * STRIP + j * LANES), beyond = v - pivot[j];
                if constexpr (HOW == Store::stream)
                    stream(out + i * ldo + j * LANES, v);
                else if constexpr (HOW == Store::whole)
                    store(out + i * ldo + j * LANES, v);
                else
                    store(out + i * ldo + j * LANES, v, lanes[j]);
                s[j] += beyond, q[j] += beyond * beyond;
            }
        UNROLL for (int j = 0; j < N; j++) found.add(g, from + j * LANES, s[j], q[j]);
    }
}

template <class T>
INLINE void keep_strip(Statistics& found, int vectors, int g, bool first, const float* c, int rows, int from, T* out,
                       long ldo, Store how) {
    constexpr auto part = Store::part, whole = Store::whole, past = Store::stream;
    if (found.channels - from < vectors * LANES) how = part;
    const auto two = how == past ? keep_strip_of<2, past, T>
                                 : how == whole ? keep_strip_of<2, whole, T> : keep_strip_of<2, part, T>;
    const auto one = how == past ? keep_strip_of<1, past, T>
                                 : how == whole ? keep_strip_of<1, whole, T> : keep_strip_of<1, part, T>;
    (vectors == 2 ? two : one)(found, g, first, c, rows, from, out, ldo);
}

// A block of rows as a product's operand, zeros past the channels.
template <class O, class T>
INLINE void copy_rows(const T* x, int rows, int channels, O* scratch) {
    const int ld = leading<O>(channels);
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < ld; c += LANES)
            store(scratch + (long)i * ld + c, c < channels ? load(x + (long)i * channels + c, channels - c) : vf{});
}

// Whether a product can read rows of T where they lie.
template <class T>
INLINE bool read_in_place(int rows, int channels) {
    if (sizeof(Operand<T>) != sizeof(T)) return false;
    return !PAIRS<T> || (cells<T>(channels) * CELL<T> == channels && (!AMX || rows % 16 == 0));
}

// --- products of vectors of images -----------------------------------------------------------------------------------

// c [rows x columns] = a b for vectors of images; b as in `pack_strip`. Inside a parallel region; `then(row, c, v, n)`
// gets n columns of a row from column c.
template <bool TURNED, class F>
static void small_product(int rows, int depth, const float* a, long lda, const float* w, long ldw, int columns,
                          float* scratch, const F& then) {
#pragma omp for schedule(static)
    for (int s = 0; s < strips(columns); s++) {
        float* product = scratch + strip_size<float>(depth);
        pack_strip<TURNED>(w, ldw, depth, columns, s, scratch);
        times_strip(rows, depth, a, lda, scratch, vectors_of(columns, s * STRIP), product);
        for (int i = 0; i < rows; i++)
            for (int c = s * STRIP; c < std::min(columns, (s + 1) * STRIP); c += LANES)
                then(i, c, load(product + i * STRIP + c - s * STRIP), columns - c);
    }
}

INLINE long small_scratch(long images, long depth) { return (depth + images) * STRIP; }
