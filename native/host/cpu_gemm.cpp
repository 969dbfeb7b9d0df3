// FP8 GEMM on the CPU. A worker computes one tile of D at a time. For each 128 of K it decodes the rows of A into FP32,
// then strip by strip decodes B, transposed, into the L1, multiplies, and adds the scaled products to the sums.
// The same templates over GCC vectors serve every instruction set: inlined into one function per set, they take that
// function's registers and instructions. Few rows and many run the same code, so that a row's bits cannot differ.
#include "cpu.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"    // only inlined functions take vectors: there is no ABI to change

namespace fp8gemm {
namespace {

#define INLINE [[gnu::always_inline]] static inline

constexpr int kBlock = 128;          // K per scale
constexpr int kTileRows = 256;       // a tile uses a decoded weight this often at most: decoding is then 3% of the work
constexpr int kTileColumns = 256;    // likewise for A; its block and the sums together, 384 KiB, fit an L2
constexpr int kStep = 16;            // K and tile_n are multiples of it
constexpr int kPrefetch = 512;       // bytes ahead in each row of B: hardware follows fewer streams than there are rows
constexpr int kMaxThreads = 1024;

template <class T, int LANES> struct VectorOf { typedef T Type __attribute__((vector_size(sizeof(T) * LANES))); };
template <class T, int LANES> using Vector = typename VectorOf<T, LANES>::Type;
template <int LANES> using Floats = Vector<float, LANES>;
template <int LANES> using Ints = Vector<int32_t, LANES>;
template <int LANES> using Lanes = std::make_integer_sequence<int, LANES>;

// The register tile: ROWS x 2 vectors of sums, which leaves two for B and one or two for A.
template <int LANES, int ROWS> struct Shape {
    static constexpr int kLanes = LANES, kStrip = 2 * LANES, kRows = ROWS;
};

// On the stack of the worker: nothing to allocate is nothing that can fail. Few rows or columns touch little of it. A caller
// with little stack leaves the work to others, see cpu_parallel_for.
template <class S> struct alignas(64) Scratch {
    float b[kBlock * S::kStrip];               // [k][column]: one strip
    float a[kTileRows * kBlock];               // [row][k]
    float scale_a[kTileRows];
    float sums[kTileColumns * kTileRows];      // [strip][row][column]
};

template <class T> INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T> INLINE void store(void* to, const T& value) { std::memcpy(to, &value, sizeof value); }

// The e4m3 in the top byte of each lane -> FP32, without subnormal operands, which some CPUs take slowly and which are
// zero to a caller who flushes them. Exponent and mantissa moved into place are right for normal numbers; a subnormal
// m * 2^-9 comes out as w = 2^-7 + m * 2^-10, and 2w - 2^-6 is right. For just those that is the smaller of the two.
// The NaN code comes out as 480, as no other does: `peak` notes it for patch_nan(), so that the usual case pays a max.
template <int LANES> INLINE Floats<LANES> decode(const Ints<LANES>& x, Floats<LANES>& peak) {
    Floats<LANES> w = (Floats<LANES>)(((x >> 4) & 0x07f00000) + 0x3c000000);
    Floats<LANES> subnormal = 2 * w - 0x1p-6f;
    w = subnormal < w ? subnormal : w;
    peak = peak > w ? peak : w;
    return (Floats<LANES>)((Ints<LANES>)w | (x & INT32_MIN));
}

template <int LANES> INLINE void patch_nan(const Floats<LANES>& peak, float* values, int count) {
    float highest = 0;
    for (int i = 0; i < LANES; ++i) highest = std::max(highest, peak[i]);
    if (highest < 480) return;
    for (int i = 0; i < count; ++i)
        if (values[i] == 480 || values[i] == -480) values[i] = __builtin_nanf("");
}

// One block of A.
template <int LANES> INLINE void decode_a(const uint8_t* a, int64_t a_row, int rows, int depth, float* out) {
    Floats<LANES> peak = {};
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < depth; k += LANES) {
            auto bytes = load<Vector<int8_t, LANES>>(a + r * a_row + k);
            auto shorts = __builtin_convertvector(bytes, Vector<int16_t, LANES>);    // in two steps: one fourfold
            auto ints = __builtin_convertvector(shorts, Ints<LANES>);               // step GCC 12 takes by lane
            store(out + r * kBlock + k, decode<LANES>(ints << 24, peak));
        }
    for (int r = 0; r < rows; ++r) patch_nan<LANES>(peak, out + r * kBlock, depth);
}

template <class To, class V, int... i> INLINE To join(const V& a, const V& b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, i...);
}

// In each four lanes: a[FIRST], b[FIRST], a[FIRST + 1], b[FIRST + 1].
template <int FIRST, class V, int... i> INLINE V zip(const V& a, const V& b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i / 4 * 4 + FIRST + i % 4 / 2 + i % 2 * int(sizeof...(i)))...);
}

template <int LANES> using Rows = uint8_t[LANES][kBlock];

// Bytes k .. k + 15 of rows FIRST, FIRST + 4, FIRST + 8.. side by side, each in four lanes.
template <int LANES, int FIRST, class R> INLINE Ints<LANES> load_rows(const R& rows, int k) {
    if constexpr (LANES == 4) {
        return load<Ints<4>>(rows[FIRST] + k);
    } else {
        constexpr int kHalf = LANES / 2;
        auto low = load_rows<kHalf, FIRST>(rows, k), high = load_rows<kHalf, FIRST + kHalf>(rows, k);
        return join<Ints<LANES>>(low, high, Lanes<LANES>());
    }
}

// words[i], lane n: bytes k + 4i .. k + 4i + 3 of row n.
template <int LANES> INLINE void transpose(const Rows<LANES>& rows, int k, Ints<LANES> (&words)[4]) {
    constexpr Lanes<LANES> lanes;
    auto a = load_rows<LANES, 0>(rows, k), b = load_rows<LANES, 1>(rows, k);
    auto c = load_rows<LANES, 2>(rows, k), d = load_rows<LANES, 3>(rows, k);
    auto ac = zip<0>(a, c, lanes), bd = zip<0>(b, d, lanes);
    words[0] = zip<0>(ac, bd, lanes), words[1] = zip<2>(ac, bd, lanes);
    ac = zip<2>(a, c, lanes), bd = zip<2>(b, d, lanes);
    words[2] = zip<0>(ac, bd, lanes), words[3] = zip<2>(ac, bd, lanes);
}

// One block of one strip of B: its rows become lanes. Past D's end the last row repeats: the products are not stored.
template <int LANES> INLINE void decode_b(const uint8_t* b, int64_t b_row, int valid, int depth, float* out) {
    constexpr int kStrip = 2 * LANES;
    Floats<LANES> peak = {};
    for (int n = 0; n < kStrip; n += LANES) {
        // Rows a power of two apart share a few sets of the L1: take all that is wanted of one before the next one.
        alignas(64) Rows<LANES> rows;
        for (int i = 0; i < LANES; ++i) {
            const uint8_t* row = b + std::min(n + i, valid - 1) * b_row;
            if (depth == kBlock) std::memcpy(rows[i], row, kBlock);    // a few vector moves, and no call
            else std::memcpy(rows[i], row, depth);
            __builtin_prefetch(row + kPrefetch, 0, 2);
            __builtin_prefetch(row + kPrefetch + 64, 0, 2);
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
    patch_nan<LANES>(peak, out, depth * kStrip);
}

// sums[row] += (scale_a[row] * scale_b) * (A[row] . B): a block is summed from zero in FP32, in the order of K whatever
// ROWS is, and scaled once. A strip may lie across two rows of sb, one of its vectors does not.
template <class S, int ROWS>
INLINE void multiply(const float* a, const float* b, int depth, const float* scale_a, const float* scale_b,
                     float* sums) {
    using V = Floats<S::kLanes>;
    V products[ROWS][2] = {};
    for (int k = 0; k < depth; ++k) {
        V b0 = load<V>(b + k * S::kStrip), b1 = load<V>(b + k * S::kStrip + S::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            products[r][0] += a[r * kBlock + k] * b0;
            products[r][1] += a[r * kBlock + k] * b1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float* sum = sums + r * S::kStrip + v * S::kLanes;
            store(sum, load<V>(sum) + scale_a[r] * scale_b[v] * products[r][v]);
        }
}

template <class S, int ROWS, class... Args> INLINE void multiply_rows(int rows, const Args&... args) {
    if (rows == ROWS) return multiply<S, ROWS>(args...);
    if constexpr (ROWS > 1) multiply_rows<S, ROWS - 1>(rows, args...);
}

template <class S> INLINE void multiply_strip(int rows, int depth, const float* scale_b, Scratch<S>& s, float* sums) {
    int groups = (rows + S::kRows - 1) / S::kRows;
    int group = (rows + groups - 1) / groups;    // 13 rows: 7 + 6, not 12 + 1
    for (int r = 0; r < rows; r += group)
        multiply_rows<S, S::kRows>(std::min(group, rows - r), s.a + r * kBlock, s.b, depth, s.scale_a + r, scale_b,
                                   sums + r * S::kStrip);
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = load<uint32_t>(&value), even = bits >> 16 & 1;
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return uint16_t(nan ? bits >> 16 : (bits + 0x7fff + even) >> 16);    // arithmetic leaves a NaN's top bit set
}

template <class S> INLINE void compute_tile(const CpuGemm& p, int64_t m0, int64_t n0, int rows, int columns) {
    constexpr int kStrip = S::kStrip;
    Scratch<S> scratch;
    std::memset(scratch.sums, 0, sizeof(float) * rows * ((columns + kStrip - 1) / kStrip * kStrip));
    for (int64_t k = 0; k < p.k; k += kBlock) {
        int depth = int(std::min<int64_t>(kBlock, p.k - k));
        const float *sa = p.sa + k / kBlock * p.sa_k, *sb = p.sb + k / kBlock * p.sb_k;
        decode_a<S::kLanes>(p.a + m0 * p.a_row + k, p.a_row, rows, depth, scratch.a);
        for (int r = 0; r < rows; ++r) scratch.scale_a[r] = sa[(m0 + r) * p.sa_row];
        for (int n = 0; n < columns; n += kStrip) {
            decode_b<S::kLanes>(p.b + (n0 + n) * p.b_row + k, p.b_row, columns - n, depth, scratch.b);
            int64_t second = std::min(n0 + n + S::kLanes, p.n - 1);
            float scale_b[2] = {sb[(n0 + n) / kBlock * p.sb_row], sb[second / kBlock * p.sb_row]};
            multiply_strip<S>(rows, depth, scale_b, scratch, scratch.sums + n * rows);
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

// FP8GEMM_CPU=avx2 or baseline keeps to less than the machine has, which is how one machine tests them all.
Target pick_target() {
#ifdef __x86_64__
    const char* limit = std::getenv("FP8GEMM_CPU");
    bool avx2 = !limit || std::strcmp(limit, "baseline") != 0;
    bool avx512 = avx2 && (!limit || std::strcmp(limit, "avx2") != 0);
    if (avx512 && __builtin_cpu_supports("avx512f")) return {"avx512f", tile_avx512};
    if (avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", tile_avx2};
#endif
    return {"baseline", tile_baseline};
}

struct Tiles {
    const CpuGemm& problem;
    TileFunction* compute;
    int64_t tile_n, row_tiles;
};

// Tiles of the same columns follow one another: the later find those rows of B in a cache.
void compute_nth_tile(void* context, int64_t i) {
    const Tiles& tiles = *static_cast<const Tiles*>(context);
    const CpuGemm& p = tiles.problem;
    int64_t m0 = i % tiles.row_tiles * kTileRows, n0 = i / tiles.row_tiles * tiles.tile_n;
    tiles.compute(p, m0, n0, int(std::min<int64_t>(kTileRows, p.m - m0)), int(std::min(tiles.tile_n, p.n - n0)));
}

struct Loop {
    void (*body)(void* context, int64_t i);
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
};

void* run_loop(void* argument) {
    Loop& loop = *static_cast<Loop*>(argument);
    for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.body(loop.context, i);
    return nullptr;
}

constexpr size_t kStack = 2 << 20;             // of a worker: Scratch and to spare, whatever the process's default

// Whether this thread's stack has room for a tile. The system is asked once a thread: of the first one it reads a file.
bool has_room() {
    static thread_local char* const end = [] {
        pthread_attr_t attributes;
        void* lowest = nullptr;
        size_t size = 0;
        if (pthread_getattr_np(pthread_self(), &attributes)) return static_cast<char*>(nullptr);
        pthread_attr_getstack(&attributes, &lowest, &size);
        pthread_attr_destroy(&attributes);
        return static_cast<char*>(lowest);
    }();
    return end && static_cast<char*>(__builtin_frame_address(0)) - end > int64_t(kStack / 4);
}

}  // namespace

// body(context, i) for each i below count, on up to `threads` threads, the caller's among them if its stack has room. The
// others start and end here, so that a process may fork between calls. Where the system refuses one, those that there are
// do the work.
void cpu_parallel_for(int threads, int64_t count, void (*body)(void* context, int64_t i), void* context) {
    Loop loop{body, context, count};
    pthread_t workers[kMaxThreads];
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStack);
    const bool helps = has_room();
    int wanted = int(std::min<int64_t>({threads, count, kMaxThreads})) - helps, started = 0;
    while (started < wanted && pthread_create(&workers[started], &attributes, run_loop, &loop) == 0) ++started;
    pthread_attr_destroy(&attributes);
    if (helps || !started) run_loop(&loop);
    for (int i = 0; i < started; ++i) pthread_join(workers[i], nullptr);
}

void cpu_gemm(const CpuGemm& p) {
    if (p.m <= 0 || p.n <= 0) return;
    int64_t tile_n = std::clamp(p.tile_n / kStep * kStep, kStep, kTileColumns);
    Tiles tiles{p, pick_target().tile, tile_n, (p.m + kTileRows - 1) / kTileRows};
    // Decoding a weight takes as long as about 7 products; 6e6 products, longer than starting a thread.
    double worth = 1 + double(p.m + 7) * double(p.n) * double(p.k) / 6e6;
    int threads = int(std::min(double(p.threads), worth));
    cpu_parallel_for(threads, tiles.row_tiles * ((p.n + tile_n - 1) / tile_n), compute_nth_tile, &tiles);
}

const char* cpu_features() { return pick_target().name; }

}  // namespace fp8gemm
