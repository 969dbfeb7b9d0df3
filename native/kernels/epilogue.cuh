// From a consumer's sums, in the registers where wgmma leaves them (wgmma.cuh), to D. Where consumers or CTAs share a tile's
// K, they are first added up; then they go to D, rounded to bf16, 64 rows at a time.
#pragma once
#include "cluster.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "storage.cuh"

namespace fp8gemm {

// Where in a tile a consumer's rows begin: slices are of all rows.
__device__ constexpr int first_row_of(int consumer) { return kSlices > 1 ? 0 : consumer * kWaves * 64; }

// A consumer's groups of eight columns in the end: all of its tile's or, of two slices, half of them, the first one's rounded up.
__device__ constexpr int groups_of(int consumer) {
    return kSlices > 1 && consumer > 0 ? (kTileN - kConsumerN) / 8 : kConsumerN / 8;
}

// Consumers that share a tile's K: each leaves its sums of the other's columns, and once both have, they may be read.
template <int kSlice>
__device__ void leave_sums(SharedStorage& s, const float (&sum)[kTileN / 2], u32 round) {
    constexpr int kOther = kSlice == 0 ? groups_of(0) : 0;       // the other's first group
    if (round > 0) named_barrier_sync(kSliced, 2 * 128);         // the tile before is added up
#pragma unroll
    for (int g = 0; g < groups_of(1 - kSlice); ++g) {
        const float* const v = &sum[(kOther + g) * 4];
        slice_sums(s, kSlice, g)[threadIdx.x % 128] = make_float4(v[0], v[1], v[2], v[3]);
    }
    named_barrier_sync(kSliced, 2 * 128);
}

// A CTA's sums of a group of this consumer's columns: its own or, of slices, both consumers' together.
template <int kSlice>
__device__ float4 group_sum(SharedStorage& s, const float (&sum)[kTileN / 2], int group) {
    const float* const own = &sum[(group + (kSlice > 0 ? groups_of(0) : 0)) * 4];
    if constexpr (kSlices == 1) {
        return make_float4(own[0], own[1], own[2], own[3]);
    } else {
        const float4 other = slice_sums(s, 1 - kSlice, group)[threadIdx.x % 128];
        return make_float4(own[0] + other.x, own[1] + other.y, own[2] + other.z, own[3] + other.w);
    }
}

// A consumer's columns before the share of a split's CTA. Shares are whole groups of eight, as equal as that allows.
__device__ constexpr int columns_before(int part, int consumer) { return groups_of(consumer) * part / kSplit * 8; }

// How many columns a consumer of this CTA stores.
__device__ int own_columns(int consumer) {
    const int rank = split_rank();
    return columns_before(rank + 1, consumer) - columns_before(rank, consumer);
}

// Before a CTA sends its sums: it says how many it expects itself, and waits until its peers can take them.
__device__ void open_exchange(SharedStorage& s, int consumer, u32 bytes) {
    if (threadIdx.x % 128 == 0) barrier_arrive_expect(&s.parts_full[consumer], bytes);
    if (kShare == 1) cluster_wait();                             // the peers' barriers are set up
}

// The CTAs of a cluster that share a tile's K: each gets the others' sums of its own columns and adds all up, in the
// order of K, into the first registers. Once a CTA has all sums, nobody needs it any more: it may end.
template <int kSlice>
__device__ void exchange_parts(SharedStorage& s, float (&sum)[kWaves][kTileN / 2], int consumer) {
    constexpr int kMost = kColumns / 8;                          // groups of a share: four registers of each thread
    constexpr int kBytes = kPartThreads * sizeof(float4);        // of all threads' eight columns
    const int rank = split_rank(), thread = threadIdx.x % 128;
    u64* full = &s.parts_full[consumer];
    open_exchange(s, consumer, own_columns(consumer) / 8 * kWaves * (kSplit - 1) * kBytes);
#pragma unroll
    for (int to = 0; to < kSplit; ++to) {
        if (to == rank || thread >= kPartThreads) continue;
        const u32 part = remote_address(&s.parts[rank - (rank > to)][consumer][thread], rank_of_part(to));
        const u32 there = remote_address(full, rank_of_part(to));
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            const int column = columns_before(to, kSlice) + i % kMost * 8;
            if (column >= columns_before(to + 1, kSlice)) continue;
            const float4 v = group_sum<kSlice>(s, sum[i / kMost], column / 8);
            store_async_remote(part + i * kBytes, v, there);
        }
    }
    if (kSlices == 1) barrier_wait(full, 0);
#pragma unroll
    for (int at = 0; at < kSplit; ++at) {                        // registers have no run-time index
        if (at != rank) continue;
        float4 own[kWaves * kMost];
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            const int column = columns_before(at, kSlice) + i % kMost * 8;
            if (column < columns_before(at + 1, kSlice)) own[i] = group_sum<kSlice>(s, sum[i / kMost], column / 8);
        }
        if (kSlices > 1) barrier_wait(full, 0);                  // slices are added up meanwhile
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            if (columns_before(at, kSlice) + i % kMost * 8 >= columns_before(at + 1, kSlice)) continue;
            float* const out = &sum[i / kMost][i % kMost * 4];
            float4 total;
#pragma unroll
            for (int from = 0; from < kSplit; ++from) {
                const float4 v = from == at ? own[i]
                                            : s.parts[from - (from > at)][consumer][i * kPartThreads + thread % kPartThreads];
                total = from ? make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w) : v;
            }
            out[0] = total.x, out[1] = total.y, out[2] = total.z, out[3] = total.w;
        }
    }
}

// All of a tile's K: the sums of a consumer's own columns, in its first registers.
template <int kSlice>
__device__ void add_up(SharedStorage& s, float (&sum)[kWaves][kTileN / 2], int consumer, u32 round) {
    if constexpr (kSlices > 1) leave_sums<kSlice>(s, sum[0], round);
    if constexpr (kSplit > 1) exchange_parts<kSlice>(s, sum, consumer);
    else if constexpr (kSlices > 1)
#pragma unroll
        for (int g = 0; g < groups_of(kSlice); ++g) {
            const float4 v = group_sum<kSlice>(s, sum[0], g);
            float* const out = &sum[0][g * 4];
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        }
}

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

// A warp's 16 rows from there to D, in pieces of 16 bytes.
__device__ void store_staged(const GemmParams& p, const u16 (&panels)[kPanels][kPanelSize], u16* d, int rows, int columns) {
    constexpr int kPieces = kColumns / 8, kRows = 32 / kPieces;  // pieces of a row, rows at a time
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, column = lane % kPieces * 8;
    const u8* const panel = reinterpret_cast<const u8*>(panels[column / kPanel]);
    int row = warp * 16 + lane / kPieces;
    u16* to = d + row * p.d_row + column;
#pragma unroll
    for (int i = 0; i < 16; i += kRows, row += kRows, to += kRows * p.d_row) {
        if (lane / kPieces >= min(kRows, 16 - i) || row >= rows || column >= columns) continue;
        *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(panel + panel_offset(row, column % kPanel));
    }
}

// Straight from registers: what suits no such pieces (strides off 16 bytes; N off 8), what TMA can't store (a group's tail, below
// which another group's rows begin), and what has no way through shared memory: parts of a split K, tiles of 32 rows.
__device__ void store_wave(const GemmParams& p, const float (&sum)[kTileN / 2], u16* d, int rows, int columns) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool pairs = (reinterpret_cast<u64>(d) | p.d_row * sizeof(u16)) % sizeof(u32) == 0;
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + lane / 4;
        if (row >= rows) break;
        u16* to = d + row * p.d_row + lane % 4 * 2;
        if (pairs && (columns >= kColumns || (kSplit > 1 && columns % 8 == 0))) {
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j)
                if (kSplit == 1 || j * 8 < columns)              // shares of a split may differ by eight columns
                    *reinterpret_cast<u32*>(to + j * 8) = pack_bf16(sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns / 4; ++i)
                if (i / 2 * 8 + lane % 4 * 2 + i % 2 < columns)
                    to[i / 2 * 8 + i % 2] = static_cast<u16>(pack_bf16(sum[i / 2 * 4 + half * 2 + i % 2], 0));
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
    const bool leader = threadIdx.x % 128 == 0;
    const int first_row = first_row_of(consumer), rows = tile.rows - first_row, row = tile.row + first_row;
    const int columns = min(p.n - tile.column, own_columns(consumer)), group = kKind == kMasked ? tile.group : 0;
    u16* const d = p.d_data + group * p.d_group + row * p.d_row + tile.column;
    if (kStaged && !kStoredByTma && p.d_staged) {
        __syncwarp();                                            // the tile before is read
        stage_wave(s.d[consumer], sum[0], 0, rest, false);
        __syncwarp();
        store_staged(p, s.d[consumer], d, rows, columns);
        __syncwarp();                                            // the warp agrees again: see multiply()
    // TMA clips at D's edges by itself, which is enough for dense; below a group's tail another group's rows begin.
    } else if (kStoredByTma && p.d_staged && (rows >= kWaves * 64 || kKind == kDense)) {
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
    if constexpr (kSlices == 1) {
        add_up<0>(s, sum, consumer, round);
    } else {
        if (consumer > 0) add_up<1>(s, sum, consumer, round), tile.column += kConsumerN;
        else add_up<0>(s, sum, consumer, round);
    }
    tile.column += columns_before(split_rank(), consumer);
    store_tile(p, s, sum, rest, tile, consumer);
    ++round;
}

}  // namespace fp8gemm
