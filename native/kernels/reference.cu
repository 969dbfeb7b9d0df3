// The GEMM again, plainly: FP32 FMAs from shared-memory tiles, no tensor core, no TMA, any stride and alignment.
//
// What gemm.cu is checked against on the GPU (tests, tuner), and the slow path for strides that TMA can't take.
// Grid: (64-row tiles, 64-column tiles, groups). A thread computes 4 x 4 elements.
#include "params.h"
#include "ptx.cuh"
#include "e4m3.cuh"

#ifndef KIND
#define KIND 0
#endif
#ifndef OUTPUT_FP32                              // 1: D is FP32, for the tuner, which asks what rounding to bf16 costs
#define OUTPUT_FP32 0
#endif

namespace fp8gemm {

constexpr int kTile = 64, kDepth = 32, kThreads = 256;           // 128 is a multiple of kDepth: a step has one scale

__device__ int clamped(int value, int limit) { return min(max(value, 0), limit); }

// Transposes 64 rows x 32 of K into tile[k][row] as FP32; zeros beyond the edges.
__device__ void load_tile(float (&tile)[kDepth][kTile + 1], const u8* from, long long row_stride, int rows, int depth) {
    for (int i = threadIdx.x; i < kTile * kDepth / 2; i += kThreads) {
        const int row = i / (kDepth / 2), k = i % (kDepth / 2) * 2;
        float low = 0, high = 0;
        if (row < rows && k < depth) {           // K is a multiple of 16, so pairs never straddle the edge
            const u8* pair = from + row * row_stride + k;
            e4m3x2_to_float(static_cast<u16>(pair[0] | pair[1] << 8), low, high);
        }
        tile[k][row] = low, tile[k + 1][row] = high;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) fp8gemm_reference(const __grid_constant__ GemmParams p) {
    __shared__ float a_tile[kDepth][kTile + 1], b_tile[kDepth][kTile + 1];

    int group = blockIdx.z, start = 0, rows = p.m;
    if (KIND == kRagged) {
        start = group ? clamped(p.layout[group - 1], p.m) : 0;
        rows = clamped(p.layout[group], p.m) - start;
    }
    if (KIND == kMasked) rows = clamped(p.layout[group], p.m);
    const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile;
    if (m0 >= rows) return;
    if (KIND == kContiguous) group = p.layout[m0];
    if (group < 0 || group >= p.groups) return;

    const int group_a = KIND == kMasked ? group : 0;
    const u8* a = p.a_data + group_a * p.a_group + (start + m0) * p.a_row;
    const u8* b = p.b_data + group * p.b_group + n0 * p.b_row;
    const float* sa = p.sa + group_a * p.sa_group + (start + m0) * p.sa_row;
    const float* sb = p.sb + group * p.sb_group + n0 / 128 * p.sb_row;   // 64 divides 128: one scale a tile

    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int kb = 0; kb * 128 < p.k; ++kb) {
        float partial[4][4] = {};
        for (int k0 = kb * 128; k0 < min(kb * 128 + 128, p.k); k0 += kDepth) {
            load_tile(a_tile, a + k0, p.a_row, rows - m0, p.k - k0);
            load_tile(b_tile, b + k0, p.b_row, p.n - n0, p.k - k0);
            __syncthreads();
            for (int k = 0; k < kDepth; ++k)
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j) partial[i][j] += a_tile[k][row + i] * b_tile[k][column + j];
            __syncthreads();
        }
        for (int i = 0; i < 4; ++i) {
            const float scale = m0 + row + i < rows ? sa[(row + i) * p.sa_row + kb * p.sa_k] * sb[kb * p.sb_k] : 0;
            for (int j = 0; j < 4; ++j) sum[i][j] += scale * partial[i][j];
        }
    }
    const long long d0 = group_a * p.d_group + (start + m0) * p.d_row + n0;
    for (int i = 0; i < 4; ++i) {
        if (m0 + row + i >= rows) return;
        if (KIND == kContiguous && p.layout[m0 + row + i] != group) continue;
        for (int j = 0; j < 4 && n0 + column + j < p.n; ++j) {
            const long long at = d0 + (row + i) * p.d_row + column + j;
            if (OUTPUT_FP32) reinterpret_cast<float*>(p.d_data)[at] = sum[i][j];
            else p.d_data[at] = static_cast<u16>(pack_bf16(sum[i][j], 0));
        }
    }
}

}  // namespace fp8gemm
