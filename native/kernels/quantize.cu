// bf16, fp16 or fp32 -> e4m3 with FP32 scales, by the recipe of DeepSeek-V3: s = max(amax, 1e-4) / 448, q = e4m3(x / s)
// per block, IEEE division in FP32, round to nearest even, saturating. A NaN makes its whole block NaN.
#include "params.h"
#include "ptx.cuh"
#include "e4m3.cuh"

#ifndef INPUT
#define INPUT 0                                                 // 0 bf16, 1 fp16, 2 fp32: see host/cpu.h
#endif

namespace fp8gemm {

constexpr int kRowsPerStep = 8;                                  // warps a CTA; a warp takes 128 of a row

#if INPUT == 2
using Element = float;
__device__ float to_float(Element x) { return x; }
#else
using Element = u16;
__device__ float to_float(Element x) {
    float r;
    if (INPUT == 0) asm("{ .reg .b32 t; mov.b32 t, {0, %1}; mov.b32 %0, t; }" : "=f"(r) : "h"(x));
    else asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}
#endif

__device__ float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = max_nan(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}
__device__ float scale_of(float amax) { return __fdiv_rn(max_nan(amax, 1e-4f), 448.0f); }

__device__ void load_row(float (&v)[4], const Element* x, int columns) {     // lane l holds columns 4 * l ... + 3
    const int c = threadIdx.x % 32 * 4;
    for (int i = 0; i < 4; ++i) v[i] = c + i < columns ? to_float(x[c + i]) : 0;
}
__device__ float row_max(const float (&v)[4]) {
    float amax = 0;
    for (int i = 0; i < 4; ++i) amax = max_nan(amax, fabsf(v[i]));
    return amax;
}
__device__ void store_row(u8* q, const float (&v)[4], float s, int columns) {
    const int c = threadIdx.x % 32 * 4;
    for (int i = 0; i < 4; i += 2) {
        const u16 pair = float_to_e4m3x2(__fdiv_rn(v[i], s), __fdiv_rn(v[i + 1], s));
        if (c + i < columns) q[c + i] = static_cast<u8>(pair);
        if (c + i + 1 < columns) q[c + i + 1] = static_cast<u8>(pair >> 8);
    }
}

// 1 x 128 blocks. Grid: (row steps, blocks of K).
extern "C" __global__ void fp8gemm_cast_per_token(const __grid_constant__ CastParams p) {
    const long long row = static_cast<long long>(blockIdx.x) * kRowsPerStep + threadIdx.x / 32;
    const long long kb = blockIdx.y;
    if (row >= p.rows) return;
    const int columns = static_cast<int>(p.columns - kb * 128);
    float v[4];
    load_row(v, static_cast<const Element*>(p.x) + row * p.x_row + kb * 128, columns);
    const float s = scale_of(warp_max(row_max(v)));
    store_row(p.q + row * p.q_row + kb * 128, v, s, columns);
    if (threadIdx.x % 32 == 0) p.s[row * p.s_row + kb * p.s_k] = s;
}

// 128 x 128 blocks. Grid: (blocks of rows, blocks of K); the block is read twice, the second time from L2.
extern "C" __global__ void fp8gemm_cast_per_block(const __grid_constant__ CastParams p) {
    __shared__ float maxima[kRowsPerStep];
    const int warp = threadIdx.x / 32;
    const long long first = static_cast<long long>(blockIdx.x) * 128, last = min(first + 128, p.rows), kb = blockIdx.y;
    const int columns = static_cast<int>(p.columns - kb * 128);
    const Element* x = static_cast<const Element*>(p.x) + kb * 128;
    float v[4], amax = 0;
    for (long long row = first + warp; row < last; row += kRowsPerStep) {
        load_row(v, x + row * p.x_row, columns);
        amax = max_nan(amax, row_max(v));
    }
    amax = warp_max(amax);
    if (threadIdx.x % 32 == 0) maxima[warp] = amax;
    __syncthreads();
    for (int i = 0; i < kRowsPerStep; ++i) amax = max_nan(amax, maxima[i]);
    const float s = scale_of(amax);
    for (long long row = first + warp; row < last; row += kRowsPerStep) {
        load_row(v, x + row * p.x_row, columns);
        store_row(p.q + row * p.q_row + kb * 128, v, s, columns);
    }
    if (threadIdx.x == 0) p.s[blockIdx.x * p.s_row + kb * p.s_k] = s;
}

// Grid: (row steps of 256, columns, groups).
extern "C" __global__ void fp8gemm_copy_scales(const __grid_constant__ CopyParams p) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, k = blockIdx.y, g = blockIdx.z;
    if (row < p.rows) p.s[g * p.s_group + row * p.s_row + k * p.s_k] = p.x[g * p.x_group + row * p.x_row + k * p.x_k];
}

}  // namespace fp8gemm
