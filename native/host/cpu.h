// The CPU backend: what the host library calls. Plain structs, no state, no exceptions.
#pragma once
#include <cstdint>

namespace fp8gemm {

// D[m, n] = bf16( sum over kb of  sa[m, kb] * sb[n / 128, kb] * (A[m, kb] . B[n, kb]) ), sums in FP32, kb: blocks of 128.
struct CpuGemm {
    int64_t m, n, k;
    const uint8_t* a; int64_t a_row;             // e4m3, row stride in elements (= bytes); k contiguous
    const uint8_t* b; int64_t b_row;
    const float* sa; int64_t sa_row, sa_k;       // strides in elements, any
    const float* sb; int64_t sb_row, sb_k;       // one row per 128 of N
    uint16_t* d; int64_t d_row;                  // bf16, row stride in elements; n contiguous
    int threads;                                 // plan: worker threads, >= 1
    int tile_n;                                  // plan: columns of D a worker takes at a time, a multiple of 16
};

// Rows are independent: a row's bits depend neither on m, threads nor tile_n.
void cpu_gemm(const CpuGemm& problem);

// Runs body(context, i) for i in [0, count) on at most `threads` threads, the caller among them.
void cpu_parallel_for(int threads, int64_t count, void (*body)(void* context, int64_t i), void* context);

enum class FloatType { bf16, f16, f32 };

// 1x128 blocks: x (m, k) -> q e4m3 (m, k), s FP32 (m, ceil(k / 128)).  s = max(amax, 1e-4) / 448,  q = e4m3(x / s): IEEE
// division in FP32, round to nearest even, saturating. A NaN in a block makes its scale and the whole block NaN.
void cpu_cast_per_token(int64_t m, int64_t k, FloatType type, const void* x, int64_t x_row,
                        uint8_t* q, int64_t q_row, float* s, int64_t s_row, int64_t s_k, int threads);
// 128x128 blocks: x (n, k) -> q e4m3 (n, k), s FP32 (ceil(n / 128), ceil(k / 128)).
void cpu_cast_per_block(int64_t n, int64_t k, FloatType type, const void* x, int64_t x_row,
                        uint8_t* q, int64_t q_row, float* s, int64_t s_row, int64_t s_k, int threads);

const char* cpu_features();                      // what was picked at run time: "avx512f", "avx2", "baseline"

}  // namespace fp8gemm
