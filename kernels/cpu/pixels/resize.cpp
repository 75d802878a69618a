// Windows of 8-bit RGB pixels, resized with antialiasing, mirrored and normalised in one pass over each.
//
// The triangle filter of width max(1, scale) in integers, first along rows, then along columns, each rounded to eight
// bits: bit for bit what torch's interpolate(mode="bilinear", antialias=True) makes of 8-bit pixels on a CPU with AVX2.
// There the window is copied, spread to four bytes a pixel, filtered twice, packed and normalised in three more passes;
// here its rows are read where they lie, and a row that is filtered along columns leaves as floats.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr long kGroup = 4;  // taps of a row that one vector holds

// The filter of one axis: for each output its first input, and as many weights as every output has.
struct Axis {
    long taps = 0;
    int precision = 0;  // weights are multiples of 2^-precision
    std::vector<int> first;
    std::vector<int16_t> weights;  // [outputs, taps], zeros behind an output's own
    std::vector<double> real;

    void make(long input, long output, long multiple) {
        const double scale = double(input) / double(output), width = scale >= 1.0 ? scale : 1.0;
        const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
        const long most = long(std::ceil(width)) * 2 + 1;
        first.resize(output);
        real.assign(output * most, 0.0);
        double largest = 0.0;
        taps = 1;
        for (long at = 0; at < output; ++at) {
            const double center = scale * (double(at) + 0.5);
            const long low = std::max(long(center - width + 0.5), 0L);
            const long high = std::min(long(center + width + 0.5), input);
            const long count = std::min(std::max(high - low, 0L), most);
            double total = 0.0, *own = &real[at * most];
            for (long tap = 0; tap < count; ++tap) {
                const double x = std::fabs((double(tap + low) - center + 0.5) * inverse);
                own[tap] = x < 1.0 ? 1.0 - x : 0.0;
                total += own[tap];
            }
            for (long tap = 0; tap < count && total != 0.0; ++tap) {
                own[tap] /= total;
                largest = std::max(largest, own[tap]);
            }
            first[at] = int(low);
            taps = std::max(taps, count);
        }
        const long used = taps;
        taps = (taps + multiple - 1) / multiple * multiple;
        precision = 0;
        while (precision < 22 && int(0.5 + largest * (1 << (precision + 1))) < (1 << 15)) ++precision;
        weights.assign(output * taps, 0);
        for (long at = 0; at < output; ++at)
            for (long tap = 0; tap < used; ++tap)
                weights[at * taps + tap] = int16_t(0.5 + real[at * most + tap] * (1 << precision));
    }
};

// Two neighbouring weights, for all channels of a pixel.
inline int pair(const int16_t* weights) {
    int both;
    std::memcpy(&both, weights, sizeof both);
    return both;
}

// Columns of the output as a row is filtered for them, last to first where the picture is mirrored.
struct Columns {
    std::vector<int> from;     // byte of the row at which the filter starts
    std::vector<int> factors;  // [columns, groups, 8]: weights 0 and 1 four times, 2 and 3 four times
    long groups = 0, reach = 0;  // bytes of a row that are read, at most

    void make(const Axis& axis, long skip, long columns, bool mirrored) {
        groups = axis.taps / kGroup;
        from.resize(columns + 1);
        factors.assign((columns + 1) * groups * 8, 0);  // one more, as two are made at a time
        reach = 0;
        for (long at = 0; at < columns; ++at) {
            const long own = skip + (mirrored ? columns - 1 - at : at);
            from[at] = 3 * axis.first[own];
            reach = std::max(reach, from[at] + 3 * kGroup * (groups - 1) + 16);
            for (long tap = 0; tap < axis.taps; ++tap)
                if (tap % 2 == 0)
                    for (long lane = 0; lane < 4; ++lane)
                        factors[at * groups * 8 + tap / 2 * 4 + lane] = pair(&axis.weights[own * axis.taps + tap]);
        }
        from[columns] = 0;
    }
};

// Of sixteen bytes of a row, four pixels as pairs of 16-bit neighbours: r0 r1 g0 g1 b0 b1 0 0, and the same of 2 and 3.
inline __m256i spread(const uint8_t* row) {
    const __m256i order = _mm256_setr_epi8(
        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
        6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), order);
}

template <int kGroups>
inline __m256i filtered(const uint8_t* row, const int* factors, long groups) {
    __m256i sum = _mm256_setzero_si256();
    for (long group = 0; group < (kGroups ? kGroups : groups); ++group)
        sum = _mm256_add_epi32(
            sum, _mm256_madd_epi16(
                     spread(row + 3 * kGroup * group),
                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors + 8 * group))));
    return sum;
}

// One row along x, two pixels of three bytes at a time; of `out`, 3 * count + 5 bytes are written.
template <int kGroups>
void along_row(const uint8_t* row, uint8_t* out, const Columns& columns, int precision, long count) {
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1)), top = _mm256_set1_epi32(255);
    const __m256i bytes = _mm256_setr_epi8(
        0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
        -1, -1, -1, 0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const long groups = columns.groups;
    const int *from = columns.from.data(), *factors = columns.factors.data();
    for (long at = 0; at < count; at += 2) {
        const __m256i a = filtered<kGroups>(row + from[at], factors + at * groups * 8, groups);
        const __m256i b = filtered<kGroups>(row + from[at + 1], factors + (at + 1) * groups * 8, groups);
        __m256i both = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
        // Weights are positive and add up to one, give or take their rounding: only the top can be passed.
        both = _mm256_min_epi32(_mm256_srai_epi32(_mm256_add_epi32(both, half), precision), top);
        both = _mm256_shuffle_epi8(both, bytes);
        const __m128i six = _mm_or_si128(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 3 * at), six);
    }
}

// Sixteen bytes along y, as 32-bit numbers 0 to 255.
inline void along_column(
    const uint8_t* rows, long pitch, const int16_t* weights, long taps, int precision, __m256i& low, __m256i& high) {
    low = high = _mm256_set1_epi32(1 << (precision - 1));
    for (long tap = 0; tap < taps; tap += 2) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + tap * pitch));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (tap + 1) * pitch));
        const __m256i factors = _mm256_set1_epi32(pair(weights + tap));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), factors));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), factors));
    }
    const __m256i top = _mm256_set1_epi32(255);
    low = _mm256_min_epi32(_mm256_srai_epi32(low, precision), top);
    high = _mm256_min_epi32(_mm256_srai_epi32(high, precision), top);
}

struct Work {
    Axis across, down;
    Columns columns;
    std::vector<uint8_t> rows;  // those of the window after the first filter
    std::vector<uint8_t> last;  // the picture's last row, with room behind it
    std::vector<float> scale, offset;  // of a line's values
};

void window(
    const uint8_t* picture, long picture_width, long picture_height, const int64_t* box, long side, long margin,
    bool mirrored, const float* scale, const float* offset, uint8_t* bytes, float* floats, Work& work) {
    const long x = box[0], y = box[1], width = box[2], height = box[3], whole = side + 2 * margin, line = 3 * side;
    const long pitch = (line + 8 + 15) / 16 * 16;
    work.across.make(width, whole, kGroup);
    work.down.make(height, whole, 2);
    work.columns.make(work.across, margin, side, mirrored);
    const Axis& down = work.down;
    const long top = down.first[margin], end = std::min(down.first[margin + side - 1] + down.taps, height);
    // Rows behind the last one meet weights of zero.
    work.rows.resize((end - top + down.taps) * pitch);
    const uint8_t* limit = picture + 3 * picture_width * picture_height;
    const auto filter = work.columns.groups == 1 ? along_row<1> : work.columns.groups == 2 ? along_row<2> : along_row<0>;
    for (long row = top; row < end; ++row) {
        const uint8_t* from = picture + 3 * ((y + row) * picture_width + x);
        if (from + work.columns.reach > limit) {  // nothing behind the picture is read
            work.last.assign(work.columns.reach, 0);
            std::memcpy(work.last.data(), from, limit - from);
            from = work.last.data();
        }
        filter(from, &work.rows[(row - top) * pitch], work.columns, work.across.precision, side);
    }
    if (floats && long(work.scale.size()) < pitch) {
        work.scale.resize(pitch);
        work.offset.resize(pitch);
    }
    if (floats)
        for (long at = 0; at < pitch; ++at) work.scale[at] = scale[at % 3], work.offset[at] = offset[at % 3];
    for (long row = 0; row < side; ++row) {
        const uint8_t* from = &work.rows[(down.first[margin + row] - top) * pitch];
        const int16_t* weights = &down.weights[(margin + row) * down.taps];
        for (long at = 0; at < line; at += 16) {
            __m256i low, high;
            along_column(from + at, pitch, weights, down.taps, down.precision, low, high);
            const long left = line - at;
            if (floats) {
                float* to = floats + row * line + at;
                float last[16];
                float* target = left < 16 ? last : to;
                for (int half = 0; half < 2; ++half) {
                    const __m256 value = _mm256_cvtepi32_ps(half ? high : low);
                    const __m256 scaled = _mm256_mul_ps(value, _mm256_loadu_ps(&work.scale[at + 8 * half]));
                    _mm256_storeu_ps(
                        target + 8 * half, _mm256_add_ps(scaled, _mm256_loadu_ps(&work.offset[at + 8 * half])));
                }
                if (left < 16) std::memcpy(to, last, left * sizeof(float));
            } else {
                const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
                const __m128i packed =
                    _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
                uint8_t last[16];
                _mm_storeu_si128(reinterpret_cast<__m128i*>(left < 16 ? last : bytes + row * line + at), packed);
                if (left < 16) std::memcpy(bytes + row * line + at, last, left);
            }
        }
    }
}

}  // namespace

// count windows. pictures: addresses of their pixels [height, width, 3]; sizes: [count, 2] width, height; boxes:
// [count, 4] x, y, width, height; mirrored: [count]; outs: addresses of [side, side, 3] floats where there are a scale
// and an offset of the three channels, else bytes. Returns 1 where memory ended.
extern "C" __attribute__((visibility("default"))) int fastnet_resize(
    long count, const uint64_t* pictures, const int64_t* sizes, const int64_t* boxes, const uint8_t* mirrored,
    const uint64_t* outs, long side, long margin, const float* scale, const float* offset) {
    try {
        Work work;
        for (long at = 0; at < count; ++at) {
            void* out = reinterpret_cast<void*>(outs[at]);
            window(
                reinterpret_cast<const uint8_t*>(pictures[at]), sizes[2 * at], sizes[2 * at + 1], boxes + 4 * at, side,
                margin, mirrored[at], scale, offset, scale ? nullptr : static_cast<uint8_t*>(out),
                scale ? static_cast<float*>(out) : nullptr, work);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
