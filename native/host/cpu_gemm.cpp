// FP8 GEMM on the CPU. A worker takes one tile of D at a time (kTileRows x tile_n) and, for each 128 of K, decodes the tile's
// share of A and B into FP32 scratch that stays in its L2, multiplies, and adds the scaled block products to the tile's
// sums. The kernels are templates of GCC vectors, inlined into one function per instruction set, picked at run time.
#include "cpu.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace fp8gemm {
namespace {

#define INLINE [[gnu::always_inline]] static inline   // a template takes the instruction set of the function it lands in

constexpr int kBlock = 128;         // K per scale
constexpr int kTileRows = 256;      // a decoded weight is used this often at most: enough to hide the decoding
constexpr int kTileColumns = 128;   // likewise for A; with kTileRows it makes 320 KiB of scratch
constexpr int kStep = 16;           // K is a multiple of it; bytes are transposed in squares of it
constexpr int kMaxThreads = 1024;

// Lives on each worker's stack: nothing to allocate, so nothing that can fail.
struct alignas(64) Scratch {
    float a[kTileRows * kBlock];               // [row][k]
    float b[32 * kBlock];                    // [k][column]: one strip
    float sums[kTileColumns * kTileRows];      // [strip][row][column in strip]
    float scale_a[kTileRows];
};

template <int LANES> struct Simd {
    typedef float Floats __attribute__((vector_size(4 * LANES)));
    typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
    typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
};
template <int LANES> using Floats = typename Simd<LANES>::Floats;
template <int LANES> using Ints = typename Simd<LANES>::Ints;
template <int LANES> using Sequence = std::make_integer_sequence<int, LANES>;

// What a register file holds: ROWS x 2 vectors of products, two vectors of B and one of A.
template <int LANES, int ROWS> struct Shape {
    static constexpr int kLanes = LANES, kRows = ROWS, kStrip = 2 * LANES;
};

template <class T> INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T> INLINE void store(void* to, const T& value) { std::memcpy(to, &value, sizeof value); }

// The e4m3 in each lane's top byte -> FP32, without subnormal operands, which are slow on some CPUs and zero for a caller
// who flushes them. Moving exponent and mantissa into place is right for normal numbers; a subnormal m * 2^-9 comes out as
// w = 2^-7 + m * 2^-10, and 2w - 2^-6 puts it right. As that is below w for just those, the smaller is right for all. The
// NaN code comes out as 480, as no other does: `peak` notes it for patch_nan(), so that the usual case pays one max.
template <int LANES> INLINE Floats<LANES> decode(Ints<LANES> x, Floats<LANES>& peak) {
    Floats<LANES> w = (Floats<LANES>)(((x >> 4) & 0x07f00000) + 0x3c000000);
    Floats<LANES> subnormal = 2 * w - 0x1p-6f;
    w = subnormal < w ? subnormal : w;
    peak = peak > w ? peak : w;
    return (Floats<LANES>)((Ints<LANES>)w | (x & INT32_MIN));
}

template <int LANES> INLINE void patch_nan(const Floats<LANES>& peak, float* values, int64_t count) {
    float highest = 0;
    for (int i = 0; i < LANES; ++i) highest = std::max(highest, peak[i]);
    if (highest < 480) return;
    for (int64_t i = 0; i < count; ++i)
        if (values[i] == 480 || values[i] == -480) values[i] = __builtin_nanf("");
}

template <int LANES> INLINE void decode_a(const uint8_t* a, int64_t a_row, int rows, int depth, float* out) {
    Floats<LANES> peak = {};
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < depth; k += LANES) {
            auto bytes = load<typename Simd<LANES>::Bytes>(a + r * a_row + k);
            auto shorts = __builtin_convertvector(bytes, typename Simd<LANES>::Shorts);   // GCC widens well one step a time
            store(out + r * kBlock + k, decode<LANES>(__builtin_convertvector(shorts, Ints<LANES>) << 24, peak));
        }
    patch_nan<LANES>(peak, out, int64_t(rows) * kBlock);
}

template <class To, class From, int... i> INLINE To concatenate(From a, From b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, i...);
}
// Within each four lanes: a[OFFSET], b[OFFSET], a[OFFSET + 1], b[OFFSET + 1].
template <int OFFSET, class Vector, int... i> INLINE Vector zip(Vector a, Vector b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (OFFSET + i / 4 * 4 + i % 4 / 2 + i % 2 * int(sizeof...(i)))...);
}

// A block of LANES rows of B.
template <int LANES> using Rows = uint8_t[LANES][kBlock];

// Bytes k .. k + 15 of row FIRST, FIRST + 4, FIRST + 8.., side by side: one row for each four lanes.
template <int LANES, int FIRST, class R> INLINE Ints<LANES> every_fourth_row(const R& rows, int k) {
    if constexpr (LANES == 4) return load<Ints<4>>(rows[FIRST] + k);
    else return concatenate<Ints<LANES>>(every_fourth_row<LANES / 2, FIRST>(rows, k),
                                         every_fourth_row<LANES / 2, FIRST + LANES / 2>(rows, k), Sequence<LANES>());
}

// words[i], lane n: bytes k + 4i .. k + 4i + 3 of row n.
template <int LANES> INLINE void transpose(const Rows<LANES>& rows, int k, Ints<LANES> (&words)[4]) {
    constexpr Sequence<LANES> lanes;
    auto a = every_fourth_row<LANES, 0>(rows, k), b = every_fourth_row<LANES, 1>(rows, k);
    auto c = every_fourth_row<LANES, 2>(rows, k), d = every_fourth_row<LANES, 3>(rows, k);
    auto ac = zip<0>(a, c, lanes), bd = zip<0>(b, d, lanes);
    words[0] = zip<0>(ac, bd, lanes), words[1] = zip<2>(ac, bd, lanes);
    ac = zip<2>(a, c, lanes), bd = zip<2>(b, d, lanes);
    words[2] = zip<0>(ac, bd, lanes), words[3] = zip<2>(ac, bd, lanes);
}

// One strip of B: rows become the lanes of vectors. Rows past the last one repeat it: their products are not stored.
template <int LANES> INLINE void decode_b(const uint8_t* b, int64_t b_row, int valid, int depth, float* out) {
    constexpr int kStrip = 2 * LANES;
    Floats<LANES> peak = {};
    for (int n = 0; n < kStrip; n += LANES) {
        // Rows a power of two apart share a few sets of the L1: take all that is wanted of a row before the next evicts it.
        alignas(64) Rows<LANES> rows;
        for (int i = 0; i < LANES; ++i) {
            const uint8_t* row = b + std::min(n + i, valid - 1) * b_row;
            if (depth == kBlock) std::memcpy(rows[i], row, kBlock);
            else std::memcpy(rows[i], row, depth);
            if (PF) {__builtin_prefetch(row + kBlock*PD, 0, PF);        // the next block: the hardware follows fewer streams than this
            __builtin_prefetch(row + kBlock*PD + 64, 0, PF);}
        }
        for (int k = 0; k < depth; k += kStep) {
            Ints<LANES> words[4];
            transpose<LANES>(rows, k, words);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    store(out + (k + 4 * i + j) * kStrip + n, decode<LANES>(words[i] << (24 - 8 * j), peak));
        }
    }
    patch_nan<LANES>(peak, out, kBlock * kStrip);
}

// sums[row] += (sa[row] * sb) * (A[row] . B), one strip of columns: a block's product is summed from zero in FP32, in the
// order of K whatever ROWS is, and scaled once.
template <class S, int ROWS>
INLINE void multiply(const float* a, const float* b, int depth, const float* sa, const float (&sb)[2], float* sums) {
    using Vector = Floats<S::kLanes>;
    Vector product[ROWS][2] = {};
    for (int k = 0; k < depth; ++k) {
        Vector b0 = load<Vector>(b + k * S::kStrip), b1 = load<Vector>(b + k * S::kStrip + S::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            product[r][0] += a[r * kBlock + k] * b0;
            product[r][1] += a[r * kBlock + k] * b1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float* sum = sums + r * S::kStrip + v * S::kLanes;
            store(sum, load<Vector>(sum) + sa[r] * sb[v] * product[r][v]);
        }
}

template <class S, int ROWS, class... Args> INLINE void multiply_rows(int rows, Args&... args) {
    if (rows == ROWS) return multiply<S, ROWS>(args...);
    if constexpr (ROWS > 1) multiply_rows<S, ROWS - 1>(rows, args...);
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = load<uint32_t>(&value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

template <class S> INLINE void compute_tile(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns) {
    constexpr int kStrip = S::kStrip;
    Scratch scratch;
    int padded = (columns + 31) / 32 * 32;
    int groups = (rows + S::kRows - 1) / S::kRows, group = (rows + groups - 1) / groups;   // 13 rows: 7 + 6, not 12 + 1
    std::memset(scratch.sums, 0, sizeof(float) * rows * padded);
    for (int64_t k = 0; k < p.k; k += kBlock) {
        int depth = int(std::min<int64_t>(kBlock, p.k - k));
        decode_a<S::kLanes>(p.a + m0 * p.a_row + k, p.a_row, rows, depth, scratch.a);
        for (int r = 0; r < rows; ++r) scratch.scale_a[r] = p.sa[(m0 + r) * p.sa_row + k / kBlock * p.sa_k];
        for (int n = 0; n < columns; n += kStrip) {
            if (!NODEC) decode_b<S::kLanes>(p.b + (n0 + n) * p.b_row + k, p.b_row, columns - n, depth, scratch.b);
            const float* sb = p.sb + k / kBlock * p.sb_k;    // a strip may lie across two rows of sb, a vector does not
            auto last = (p.n - 1) / kBlock;
            float scale_b[2] = {sb[(n0 + n) / kBlock * p.sb_row], sb[std::min((n0 + n + S::kLanes) / kBlock, last) * p.sb_row]};
            for (int r = 0; r < rows; r += group) {
                const float *a = scratch.a + r * kBlock, *b = scratch.b, *sa = scratch.scale_a + r;
                float* sums = scratch.sums + n * rows + r * kStrip;
               if (!NOMUL) multiply_rows<S, S::kRows>(std::min(group, rows - r), a, b, depth, sa, scale_b, sums);
            }
        }
    }
    for (int n = 0; n < columns; n += kStrip)
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < std::min(kStrip, columns - n); ++i)
                p.d[(m0 + r) * p.d_row + n0 + n + i] = to_bf16(scratch.sums[n * rows + r * kStrip + i]);
}

using TileFunction = void(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns);

void tile_baseline(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns) {
    compute_tile<Shape<4, 6>>(p, m0, n0, rows, columns);
}
#ifdef __x86_64__
[[gnu::target("avx2,fma")]] void tile_avx2(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns) {
    compute_tile<Shape<8, 6>>(p, m0, n0, rows, columns);
}
[[gnu::target("avx512f")]] void tile_avx512(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns) {
    compute_tile<Shape<16, 12>>(p, m0, n0, rows, columns);
}
#endif

struct Target { const char* name; TileFunction* tile; };

Target pick_target() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return {"avx512f", tile_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", tile_avx2};
#endif
    return {"baseline", tile_baseline};
}

struct Tiles {
    const CpuGemm& problem;
    TileFunction* tile;
    int64_t tile_n, row_tiles;
};

void compute_item(void* context, int64_t item) {
    const Tiles& tiles = *static_cast<const Tiles*>(context);
    const CpuGemm& p = tiles.problem;
    int64_t m0 = item % tiles.row_tiles * kTileRows, n0 = item / tiles.row_tiles * tiles.tile_n;
    tiles.tile(p, m0, n0, int(std::min<int64_t>(kTileRows, p.m - m0)), int(std::min(tiles.tile_n, p.n - n0)));
}

struct Loop {
    void (*body)(void*, int64_t);
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
};

void* run_loop(void* argument) {
    Loop& loop = *static_cast<Loop*>(argument);
    for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.body(loop.context, i);
    return nullptr;
}

}  // namespace

// body(context, i) for i in [0, count), on up to `threads` threads, the caller's among them. They are started and joined
// here: a process may fork between calls. Where the system refuses a thread, those that there are do the work.
void cpu_parallel_for(int threads, int64_t count, void (*body)(void*, int64_t), void* context) {
    Loop loop{body, context, count};
    pthread_t workers[kMaxThreads];
    int wanted = int(std::min<int64_t>({threads, count, kMaxThreads})) - 1, started = 0;
    while (started < wanted && pthread_create(&workers[started], nullptr, run_loop, &loop) == 0) ++started;
    run_loop(&loop);
    for (int i = 0; i < started; ++i) pthread_join(workers[i], nullptr);
}

void cpu_gemm(const CpuGemm& p) {
    if (p.m <= 0 || p.n <= 0) return;
    int64_t tile_n = std::clamp(p.tile_n / kStep * kStep, kStep, kTileColumns);
    Tiles tiles{p, pick_target().tile, tile_n, (p.m + kTileRows - 1) / kTileRows};
    bool tiny = double(p.m + 4) * double(p.n) * double(p.k) < 4e6;     // less than what starting a thread takes
    cpu_parallel_for(tiny ? 1 : p.threads, tiles.row_tiles * ((p.n + tile_n - 1) / tile_n), compute_item, &tiles);
}

const char* cpu_features() { return pick_target().name; }

}  // namespace fp8gemm
