// FP32, FP16 and BF16 -> e4m3 with one FP32 scale per block of 1 x 128 or 128 x 128. Plain loops over bits, which the
// compiler vectorises for each instruction set that they are inlined for; the results are the same on all.
#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fp8gemm {

namespace {

#define INLINE [[gnu::always_inline]] static inline

constexpr int64_t kBlock = 128;
constexpr uint32_t kInfinity = 0x7f800000;

struct Cast {
    int64_t rows, k;
    FloatType type; const void* x; int64_t x_row;
    uint8_t* q; int64_t q_row;
    float* s; int64_t s_row, s_k;
    int64_t block_rows;      // rows that share a scale: 1 or 128
    int64_t item_blocks;     // blocks along K that a thread takes at a time
};

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Without a branch, which GCC would make of ?: around arithmetic that may trap, and then not vectorise.
INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) { return no ^ ((yes ^ no) & -uint32_t(condition)); }

// Subnormal FP16 as cpu_gemm.cpp does e4m3: right after doubling and taking 2^-14 away, which makes it the smaller.
INLINE float from_f16(uint32_t x) {
    uint32_t magnitude = (x & 0x7fff) << 13;
    float w = from_bits(magnitude + 0x38000000), subnormal = 2 * w - 0x1p-14f;
    uint32_t bits = select(subnormal < w, to_bits(subnormal), to_bits(w));
    bits = select(magnitude < 0x0f800000, bits, magnitude | kInfinity);
    return from_bits(bits | (x & 0x8000) << 16);
}

template <FloatType TYPE> using Element = std::conditional_t<TYPE == FloatType::f32, float, uint16_t>;

template <FloatType TYPE> INLINE float to_float(Element<TYPE> x) {
    if constexpr (TYPE == FloatType::f32) return x;
    else return TYPE == FloatType::f16 ? from_f16(x) : from_bits(uint32_t(x) << 16);
}

// Nearest even, NaN as 0x7f. Normal results round in the integer domain; subnormal ones are multiples of 2^-9, the
// spacing of FP32 at 2^14, so that adding 2^14 rounds them. Divided by their block's scale, numbers exceed 448 by the
// rounding of the division at most, and that rounds to 448: saturation has nothing left to do.
INLINE uint8_t to_e4m3(float value) {
    uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
    uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    uint32_t subnormal = to_bits(from_bits(magnitude) + 0x1p14f) - to_bits(0x1p14f);
    uint32_t code = select(magnitude < to_bits(0x1p-6f), subnormal, normal);
    return uint8_t(select(magnitude > kInfinity, 0x7f, code | (bits >> 24 & 0x80)));
}

// The largest magnitude's bits: they compare as the numbers do, with NaN above all.
template <FloatType TYPE> INLINE uint32_t largest_of(const Element<TYPE>* x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t magnitude = to_bits(to_float<TYPE>(x[i])) & 0x7fffffff;
        largest = largest > magnitude ? largest : magnitude;
    }
    return largest;
}

template <FloatType TYPE>
INLINE void cast_run(const Element<TYPE>* x, int64_t count, float scale, uint8_t* __restrict q) {
    for (int64_t i = 0; i < count; ++i) q[i] = to_e4m3(to_float<TYPE>(x[i]) / scale);
}

template <FloatType TYPE> INLINE void cast_block(const Cast& c, int64_t row, int64_t k) {
    int64_t rows = std::min(c.block_rows, c.rows - row), columns = std::min(kBlock, c.k - k);
    const auto* x = static_cast<const Element<TYPE>*>(c.x) + row * c.x_row + k;
    uint32_t largest = 0;
    for (int64_t r = 0; r < rows; ++r) largest = std::max(largest, largest_of<TYPE>(x + r * c.x_row, columns));
    float scale = std::max(from_bits(largest), 1e-4f) / 448.0f;      // in this order max() keeps a NaN
    c.s[row / c.block_rows * c.s_row + k / kBlock * c.s_k] = scale;
    for (int64_t r = 0; r < rows; ++r)
        cast_run<TYPE>(x + r * c.x_row, columns, scale, c.q + (row + r) * c.q_row + k);
}

INLINE void cast_blocks(const Cast& c, int64_t row, int64_t k_begin, int64_t k_end) {
    for (int64_t k = k_begin; k < k_end; k += kBlock) {
        if (c.type == FloatType::f32) cast_block<FloatType::f32>(c, row, k);
        else if (c.type == FloatType::f16) cast_block<FloatType::f16>(c, row, k);
        else cast_block<FloatType::bf16>(c, row, k);
    }
}

void cast_baseline(const Cast& c, int64_t row, int64_t k_begin, int64_t k_end) { cast_blocks(c, row, k_begin, k_end); }
#ifdef __x86_64__
[[gnu::target("avx2")]] void cast_avx2(const Cast& c, int64_t row, int64_t k_begin, int64_t k_end) {
    cast_blocks(c, row, k_begin, k_end);
}
[[gnu::target("avx512f,prefer-vector-width=512")]] void cast_avx512(const Cast& c, int64_t row, int64_t k_begin,
                                                                    int64_t k_end) {
    cast_blocks(c, row, k_begin, k_end);
}
#endif

void cast_item(void* context, int64_t item) {
    const Cast& c = *static_cast<const Cast*>(context);
    int64_t step = c.item_blocks * kBlock, steps = (c.k + step - 1) / step;
    int64_t row = item / steps * c.block_rows, k = item % steps * step;
    auto cast = cast_baseline;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) cast = cast_avx2;
    if (__builtin_cpu_supports("avx512f")) cast = cast_avx512;
#endif
    cast(c, row, k, std::min(k + step, c.k));
}

void cast(Cast c, int threads) {
    if (c.rows <= 0 || c.k <= 0) return;
    int64_t step = c.item_blocks * kBlock;
    int64_t items = (c.rows + c.block_rows - 1) / c.block_rows * ((c.k + step - 1) / step);
    int64_t worth = 1 + c.rows * c.k / (1 << 17);     // elements that take longer than starting a thread
    cpu_parallel_for(int(std::min<int64_t>(threads, worth)), items, cast_item, &c);
}

}  // namespace

void cpu_cast_per_token(int64_t m, int64_t k, FloatType type, const void* x, int64_t x_row,
                        uint8_t* q, int64_t q_row, float* s, int64_t s_row, int64_t s_k, int threads) {
    cast({m, k, type, x, x_row, q, q_row, s, s_row, s_k, 1, 64}, threads);
}

void cpu_cast_per_block(int64_t n, int64_t k, FloatType type, const void* x, int64_t x_row,
                        uint8_t* q, int64_t q_row, float* s, int64_t s_row, int64_t s_k, int threads) {
    cast({n, k, type, x, x_row, q, q_row, s, s_row, s_k, kBlock, 1}, threads);
}

}  // namespace fp8gemm
