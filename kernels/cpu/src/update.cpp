// What follows backward: an optimizer's step, the moving average and the gradients' norm, each in one pass over all
// tensors of a model, a piece at a time. Pieces are cut by shape, so sums have the same bits for any number of threads.
#include "common.h"

constexpr long PIECE = 1 << 14;  // elements

// Tensors as rows of addresses with a count at the end, cut into pieces.
struct Pieces {
    struct Piece {
        long tensor, start, count;
    };
    std::vector<Piece> all;
    Pieces(long tensors, const long* rows, long columns) {
        for (long t = 0; t < tensors; t++)
            for (long i = 0, n = rows[t * columns + columns - 1]; i < n; i += PIECE)
                all.push_back({t, i, std::min(PIECE, n - i)});
    }
    long count() const { return (long)all.size(); }
};

template <class F>
static void each_piece(long threads, const Pieces& pieces, const F& then) {
#pragma omp parallel for schedule(dynamic, 4) num_threads((int)threads)
    for (long i = 0; i < pieces.count(); i++) then(i, pieces.all[i]);
}

// v <- decay v + (1 - decay) g²; m <- momentum m + g / (√v + eps), p <- p - lr m; or, as TensorFlow has it, m <- momentum m
// + lr g / √(v + eps), p <- p - m. g is the gradient plus weight_decay p. Rows: p, g, v, m and their size.
static void rmsprop_step(long threads, long tensors, const long* rows, double lr, double weight_decay, long tensorflow,
                         double decay, double momentum, double eps) {
    const float rate = (float)lr, pull = (float)weight_decay, kept = (float)decay, added = (float)(1 - decay);
    const float inertia = (float)momentum, small = (float)eps;
    each_piece(threads, Pieces(tensors, rows, 5), [=](long, const Pieces::Piece& piece) {
        const long* row = rows + piece.tensor * 5;
        float *p = (float*)row[0] + piece.start, *v = (float*)row[2] + piece.start, *m = (float*)row[3] + piece.start;
        const float* gradient = (const float*)row[1] + piece.start;
        for (long i = 0; i < piece.count; i += LANES) {
            const int n = (int)std::min<long>(LANES, piece.count - i);
            const vf x = load(p + i, n), g = load(gradient + i, n) + pull * x;
            const vf square = kept * load(v + i, n) + added * (g * g);
            const vf moved = tensorflow ? rate * g / root(square + small) : g / (root(square) + small);
            const vf moment = inertia * load(m + i, n) + moved;
            store(v + i, square, n);
            store(m + i, moment, n);
            store(p + i, tensorflow ? x - moment : x - rate * moment, n);
        }
    });
}

// a <- a + weight (x - a). Rows: a, x and their size.
static void move_average(long threads, long tensors, const long* rows, double weight) {
    const float share = (float)weight;
    each_piece(threads, Pieces(tensors, rows, 3), [=](long, const Pieces::Piece& piece) {
        const long* row = rows + piece.tensor * 3;
        float* a = (float*)row[0] + piece.start;
        const float* x = (const float*)row[1] + piece.start;
        for (long i = 0; i < piece.count; i += LANES) {
            const int n = (int)std::min<long>(LANES, piece.count - i);
            const vf before = load(a + i, n);
            store(a + i, before + share * (load(x + i, n) - before), n);
        }
    });
}

// √Σ x² over all tensors. Rows: x and its size.
static void norm_of(long threads, long tensors, const long* rows, float* norm) {
    const Pieces pieces(tensors, rows, 2);
    std::vector<double> sums(pieces.count());
    each_piece(threads, pieces, [&](long i, const Pieces::Piece& piece) {
        const float* x = (const float*)rows[piece.tensor * 2] + piece.start;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < piece.count; j++) sum += (double)x[j] * x[j];
        sums[i] = sum;
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    *norm = (float)std::sqrt(total);
}

ON_FP32(rmsprop_step)
ON_FP32(move_average)
ON_FP32(norm_of)
