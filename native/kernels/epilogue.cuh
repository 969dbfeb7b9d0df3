// A consumer's sums to D: 64 rows at a time, in the registers where wgmma leaves them (wgmma.cuh), rounded to bf16.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

// Position of (row, column) in a panel of D: 16-byte chunks, swizzled as TMA expects for rows of kPanel columns.
__device__ u32 panel_offset(int row, int column) {
    const u32 offset = (row * kPanel + column) * sizeof(u16);
    return offset ^ ((offset >> 3) & (kPanel * sizeof(u16) - 16));
}

// 64 rows of sums, as wgmma leaves them, to bf16 in shared memory, below `first` others.
__device__ void stage_wave(u16 (&panels)[kPanels][kPanelSize], const float (&sum)[kTileN / 2], int first) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, row = first + warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {    // 16 x 16 a warp: lane l addresses row l % 16, columns l / 16 * 8 ...
        const int panel = j * 16 / kPanel, column = j * 16 % kPanel + lane / 16 * 8;
        const float* v = &sum[j * 8];
        store_matrix_x4(shared_address(panels[panel]) + panel_offset(row, column), pack_bf16(v[0], v[1]),
                        pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}

// Straight from registers: what TMA can't store (strides off 16 bytes; a group's tail, below which another group's rows
// begin), and tiles so small that its detour takes longer.
__device__ void store_wave(const GemmParams& p, const float (&sum)[kTileN / 2], u16* d, int rows, int columns) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool pairs = (reinterpret_cast<u64>(d) | p.d_row * sizeof(u16)) % sizeof(u32) == 0;
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + lane / 4;
        if (row >= rows) break;
        u16* to = d + row * p.d_row + lane % 4 * 2;
        if (pairs && columns >= kColumns) {
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j)
                *reinterpret_cast<u32*>(to + j * 8) = pack_bf16(sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns / 4; ++i)
                if (i / 2 * 8 + lane % 4 * 2 + i % 2 < columns)
                    to[i / 2 * 8 + i % 2] = static_cast<u16>(pack_bf16(sum[i / 2 * 4 + half * 2 + i % 2], 0));
        }
    }
}

}  // namespace fp8gemm
