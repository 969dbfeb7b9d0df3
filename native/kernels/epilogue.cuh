// From a consumer's sums, in the registers where wgmma leaves them (wgmma.cuh), to D. Where consumers or CTAs share a tile's
// K, they are first added up (exchange.cuh); then they go to D, rounded to bf16, 64 rows at a time.
#pragma once
#include "exchange.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "storage.cuh"

namespace fp8gemm {

// Position of (row, column) in a panel of D: 16-byte chunks, swizzled as TMA expects for rows of 128 or 64 bytes.
__device__ u32 panel_offset(int row, int column) {
    const u32 offset = (row * kPanel + column) * sizeof(u16);
    return kSwizzled ? offset ^ ((offset >> 3) & (kPanel * sizeof(u16) - 16)) : offset;
}

// What a tile's last turn leaves to the store: the sums of its last block, and their scales.
struct Unpromoted {
    float partial[kTileN / 2], scale[kSegments][2];

    __device__ void promote(float (&sum)[kTileN / 2], int first, int count) const {
#pragma unroll
        for (int i = first; i < first + count; ++i) sum[i] += scale[i * 2 / kSegment][i / 2 % 2] * partial[i];
    }
};

// 64 rows of sums, as wgmma leaves them, to bf16 in shared memory, below `first` others. What is left to promote is promoted on
// the way: its FMAs run while shared memory is written.
__device__ void stage_wave(u16 (&panels)[kPanels][kPanelSize], float (&sum)[kTileN / 2], int first,
                           const Unpromoted& rest, bool has_rest) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    // 16 x 16 a warp and step: lane l addresses row l % 16, columns l / 16 * 8 ... Of a swizzled panel a step's columns set bits
    // that are 0 here and that the swizzle does not read: XOR takes the place of swizzling each anew.
    const u32 at = panel_offset(first + warp * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
        const int panel = j * 16 / kPanel, column = j * 16 % kPanel;
        if (has_rest) rest.promote(sum, j * 8, 8);
        const float* v = &sum[j * 8];
        const u32 to = kSwizzled ? at ^ column * sizeof(u16) : at + column * sizeof(u16);
        store_matrix_x4(shared_address(panels[panel]) + to, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                        pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}

// A warp's 16 rows from there to D, in pieces of 16 bytes. Where they go is found while they are on their way to shared memory.
__device__ void store_staged(const GemmParams& p, const u16 (&panels)[kPanels][kPanelSize], const Tile& tile, int first_row) {
    constexpr int kPieces = kColumns / 8, kRows = 32 / kPieces;  // pieces of a row, rows at a time
    const int lane = threadIdx.x % 32, lane_row = lane / kPieces, column = lane % kPieces * 8;
    const int row = threadIdx.x / 32 % 4 * 16 + lane_row;
    const u8* const panel = reinterpret_cast<const u8*>(panels[column / kPanel]);
    const u32 at = panel_offset(row, column % kPanel);
    const int rows = lane_row < kRows && column < p.n - tile.column ? tile.rows - first_row - row : 0;
    u16* to = p.d_data + (tile.row + first_row + row) * p.d_row + tile.column + column;
    if (kKind == kMasked) to += tile.group * p.d_group;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += kRows, to += kRows * p.d_row) {
        if (i >= rows || (16 - i < kRows && lane_row >= 16 - i)) continue;
        // Of a swizzled panel row and i share no bit (rows come by powers of two at a time), and swizzling is linear in bits.
        const u32 from = kSwizzled ? at ^ panel_offset(i, 0) : at + i * kPanel * sizeof(u16);
        *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(panel + from);
    }
}

// Straight from registers: what suits no such pieces (strides off 16 bytes; N off 8), what TMA can't store (a group's tail, below
// which another group's rows begin), and what has no way through shared memory: tiles of 32 rows.
__device__ void store_wave(const GemmParams& p, const float (&sum)[kTileN / 2], u16* d, int rows, int columns) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool pairs = in_pairs(p, d);
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

// A share of a split: all addresses are known, and few instructions left.
__device__ void store_share(const GemmParams& p, const float (&sum)[kWaves][kTileN / 2], const Place& place) {
    const int first = threadIdx.x % 4 * 2;                       // signed: of a share behind N, columns are fewer than none
#pragma unroll
    for (int i = 0; i < kWaves * 2; ++i) {
        const int w = i / 2, half = i % 2, row = w * 64 + half * 8;
        u16* const to = place.to + row * p.d_row;
        if (row >= place.rows) continue;
        if (place.pairs && place.columns % 8 == 0) {
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j)               // shares may differ by eight columns
                if (j * 8 < place.columns)
                    store_global(to + j * 8, pack_bf16(sum[w][j * 4 + half * 2], sum[w][j * 4 + half * 2 + 1]));
        } else {
#pragma unroll
            for (int j = 0; j < kColumns / 4; ++j)
                if (j / 2 * 8 + first + j % 2 < place.columns)
                    store_global(to + j / 2 * 8 + j % 2, static_cast<u16>(pack_bf16(sum[w][j / 2 * 4 + half * 2 + j % 2], 0)));
        }
    }
}

// Until what was stored of the tile before has left the consumer's buffer.
__device__ void wait_for_staging(int consumer) {
    if (threadIdx.x % 128 == 0) tma_store_wait_read();
    named_barrier_sync(1 + consumer, 128);
}

// What a consumer has of a tile.
__device__ void store_tile(const GemmParams& p, SharedStorage& s, float (&sum)[kWaves][kTileN / 2], const Unpromoted& rest,
                           const Tile& tile, int consumer) {
    if (kStaged && !kStoredByTma && p.d_staged) {
        __syncwarp();                                            // the tile before is read
        stage_wave(s.d[consumer], sum[0], 0, rest, false);
        store_staged(p, s.d[consumer], tile, first_row_of(consumer));
        __syncwarp();                                            // the warp agrees again: see multiply()
        return;
    }
    const bool leader = threadIdx.x % 128 == 0;
    const int first_row = first_row_of(consumer), rows = tile.rows - first_row, row = tile.row + first_row;
    const int columns = min(p.n - tile.column, kColumns), group = kKind == kMasked ? tile.group : 0;
    u16* const d = p.d_data + group * p.d_group + row * p.d_row + tile.column;
    // TMA clips at D's edges by itself, which is enough for dense; below a group's tail another group's rows begin.
    if (kStoredByTma && p.d_staged && (rows >= kWaves * 64 || kKind == kDense)) {
        if (!kLastApart) wait_for_staging(consumer);
#pragma unroll
        for (int w = 0; w < kWaves; ++w)
            stage_wave(s.d[consumer], sum[w], w * 64, rest, kLastApart && w == kWaves - 1);
        fence_async_proxy();
        named_barrier_sync(1 + consumer, 128);
        if (leader) {
            for (int i = 0; i < kPanels && i * kPanel < columns; i += p.d_blocked ? kPanels : 1)
                tma_store(p.d, s.d[consumer][i], {p.d_blocked ? 0 : tile.column + i * kPanel, row,
                                                  p.d_blocked ? tile.column / kPanel : 0, group});
            tma_store_commit();
        }
    } else {
        if (kLastApart) rest.promote(sum[kWaves - 1], 0, kTileN / 2);
#pragma unroll
        for (int w = 0; w < kWaves; ++w)
            store_wave(p, sum[w], d + w * 64 * p.d_row, min(rows - w * 64, min(kTileM, 64)), columns);
        __syncwarp();                                            // the warp agrees again: see multiply()
    }
}

// The way from a consumer's sums of a tile to D; `round` counts its tiles.
__device__ void finish_tile(const GemmParams& p, SharedStorage& s, float (&sum)[kWaves][kTileN / 2], const Unpromoted& rest,
                            Tile tile, int consumer, u32& round) {
    if constexpr (kSplit > 1) {
        Place place;
        if constexpr (kSlices == 1) place = exchange_parts<0>(p, s, sum, tile, consumer);
        else place = consumer == 0 ? exchange_parts<0>(p, s, sum, tile, consumer) : exchange_parts<1>(p, s, sum, tile, consumer);
        store_share(p, sum, place);
    } else {
        if constexpr (kSlices > 1) {
            tile.column += consumer * kConsumerN;
            if (consumer == 0) add_slices<0>(s, sum[0], round);
            else add_slices<1>(s, sum[0], round);
        }
        store_tile(p, s, sum, rest, tile, consumer);
        ++round;
    }
}

}  // namespace fp8gemm
