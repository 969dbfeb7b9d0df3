// The consumer for few tokens: operands swapped. wgmma's 64 rows are rows of B and its columns are rows of A, so that 8
// tokens cost what 8 cost, not 64: the consumer is done with a stage long before the next one has come from memory.
//
// A thread's sums of a wave of 64 rows of B are D transposed: from 4 * q on, those of tokens 8 * q + 2 * (lane % 4) and
// the next, and of B's rows r = 64 * w + 16 * warp + lane / 4 (first two) and r + 8 (last two).
#pragma once
#include "exchange.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "storage.cuh"
#include "wgmma.cuh"

namespace fp8gemm {

constexpr int kTokens = kSwapAB ? kTileM : 8;                    // of a tile; in other plans nobody calls what is here
constexpr int kSwappedRegisters = kWaves * kTokens / 2;          // of a thread's sums

// Where a thread's sums go: rows are tokens.
__device__ Place swapped_place(const GemmParams& p, const Tile& tile) {
    const int token = threadIdx.x % 32 / 4, column = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 4 * 2;
    u16* const d = p.d_data + (kKind == kMasked ? tile.group * p.d_group : 0) + (tile.row + token) * p.d_row + tile.column;
    return {d + column, min(tile.rows, kTokens) - token, min(p.n - tile.column, kTileN) - column, in_pairs(p, d)};
}

// The CTAs that share a tile's K: each adds up the sums of some warps' rows of B, in the order of K.
__device__ bool exchange_swapped(const GemmParams& p, SharedStorage& s, float (&sum)[kSwappedRegisters], const Tile& tile,
                                 Place& place) {
    constexpr int kThreadsEach = 128 / kSplit;
    const int rank = split_rank(), thread = threadIdx.x % 128, owner = thread / kThreadsEach;
    if (owner != rank) {
        const u32 part = remote_address(&s.parts[rank - (rank > owner)][0][thread % kThreadsEach], owner);
        const u32 there = remote_address(&s.parts_full[0], owner);
#pragma unroll
        for (int i = 0; i < kSwappedRegisters; i += 4) {
            const float4 v = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
            store_async_remote(part + i / 4 * kThreadsEach * sizeof(float4), v, there);
        }
    }
    place = swapped_place(p, tile);
    barrier_wait(&s.parts_full[0], place.zero());
    if (owner != rank) return false;
#pragma unroll
    for (int i = 0; i < kSwappedRegisters; i += 4) {
        float4 total;
        for (int from = 0; from < kSplit; ++from) {
            float4 v = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
            if (from != rank) v = s.parts[from - (from > rank)][0][i / 4 * kThreadsEach + thread % kThreadsEach];
            total = from ? add(total, v) : v;
        }
        sum[i] = total.x, sum[i + 1] = total.y, sum[i + 2] = total.z, sum[i + 3] = total.w;
    }
    return true;
}

__device__ void store_swapped(const GemmParams& p, const float (&sum)[kSwappedRegisters], const Place& place) {
#pragma unroll
    for (int i = 0; i < kWaves * kTokens / 8 * 2; ++i) {
        const int w = i / (kTokens / 4), q = i / 2 % (kTokens / 8), half = i % 2, column = w * 64 + half * 8;
        const float* v = sum + w * (kTokens / 2) + 4 * q + 2 * half;
        const u32 two = transpose_matrix(pack_bf16(v[0], v[1]));         // two columns of one token
        u16* const to = place.to + 8 * q * p.d_row + column;
        if (8 * q >= place.rows || column >= place.columns) continue;
        if (place.pairs && column + 1 < place.columns) {
            store_global(to, two);
        } else {
            store_global(to, static_cast<u16>(two));
            if (column + 1 < place.columns) store_global(to + 1, static_cast<u16>(two >> 16));
        }
    }
}

__device__ void multiply_swapped(const GemmParams& p, SharedStorage& s, int first_block, int last_block) {
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;    // of B in a wave, this thread's first
    const int token = threadIdx.x % 4 * 2;
    const u32 a_first = keep_uniform(wgmma_address(s.stages[0].a));
    const u32 b_first = keep_uniform(wgmma_address(s.stages[0].b));
    const u32 a_block = p.a_box_rows * (kTileK / 16), empty_first = keep(empty_of_first(s));
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        if (kSplit > 1) open_exchange(s, 0, sizeof s.parts);
        float sum[kSwappedRegisters] = {};
        for (int kb = first_block; kb < last_block; kb += kDepth, ring.advance()) {
            Stage& stage = ring.stage(s);
            const u32 a = a_first + ring.offset / 16, b = b_first + ring.offset / 16;
            float partial[kDepth][kWaves][kTokens / 2], scale_a[kDepth][kTokens / 4], scale_b[kDepth][kWaves][2];
            barrier_wait(&stage.full, ring.phase);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < kDepth; ++j)
#pragma unroll
                for (int w = 0; w < kWaves; ++w)
#pragma unroll
                    for (int k = 0; k < kTileK / 32; ++k) {
                        const u32 wave = b + (j * kTileN + w * 64) * (kTileK / 16), tokens = a + j * a_block;
                        Wgmma<kTokens>::mma(partial[j][w], wgmma_operand(wave + 2 * k), wgmma_operand(tokens + 2 * k),
                                            k > 0);
                    }
            wgmma_commit();
#pragma unroll
            for (int j = 0; j < kDepth; ++j) {
                for (int i = 0; i < kWaves * 2; ++i) {
                    const int segment = kSegments > 1 ? (i / 2 * 64 + i % 2 * 8 + row) / kSegment : 0;
                    scale_b[j][i / 2][i % 2] = stage.scales[kScalesOfB + segment][j];
                }
                for (int i = 0; i < kTokens / 4; ++i)
                    scale_a[j][i] = stage.scales[i / 2 * 8 + token + i % 2][j];
            }
            wgmma_wait<0>();
            release(empty_first + ring.offset);
#pragma unroll
            for (int j = 0; j < kDepth; ++j)
#pragma unroll
                for (int i = 0; i < kSwappedRegisters; ++i) {
                    const int w = i / (kTokens / 2), r = i % (kTokens / 2);
                    sum[i] += scale_a[j][r / 4 * 2 + r % 2] * scale_b[j][w][r / 2 % 2] * partial[j][w][r];
                }
        }
        Place place;
        if constexpr (kSplit == 1) place = swapped_place(p, tile);
        else if (!__any_sync(0xffffffff, exchange_swapped(p, s, sum, tile, place))) break;       // the vote: see multiply()
        store_swapped(p, sum, place);
        if (kOneTile) break;
    }
}

}  // namespace fp8gemm
