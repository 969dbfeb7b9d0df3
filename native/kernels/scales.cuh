// The producer's warps beside the one that loads: they bring the scales that it does not bring in bulk, in any layout.
#pragma once
#include "cluster.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "storage.cuh"

namespace fp8gemm {

__device__ bool scales_by_bulk(const GemmParams& p) { return kBulkScales && p.sa_by_bulk; }

// Rows of A's scales: bulk copies begin and end at multiples of four in memory. What A has behind them is copied apart.
struct ScaleRows { int first, lead, bulk, rest; };               // lead: those before the tile, of a ragged group

__device__ ScaleRows scale_rows(const GemmParams& p, const Tile& tile) {
    const int lead = kKind == kRagged && scales_by_bulk(p) ? tile.row % 4 : 0, first = tile.row - lead;
    const int rows = max(min(kTileM + (lead ? 4 : 0), p.m - first), 0);
    return {first, lead, rows & ~3, rows & 3};
}

// Arrivals that a stage waits for: one for all that bulk copies leave over, or one of each thread that copies.
__device__ int scale_arrivals(const GemmParams& p) { return scales_by_bulk(p) ? 1 : kScaleThreads; }

// B's scale of a column, of the first block.
__device__ const float* scale_of_b(const GemmParams& p, const Tile& tile, int column) {
    return p.sb + tile.group * p.sb_group + column / 128 * p.sb_row;
}

// Beside bulk copies of A's scales one warp brings B's, and up to three of A's: a lane each, a block ahead.
__device__ void load_other_scales(const GemmParams& p, SharedStorage& s, int first_block, int last_block) {
    const int lane = threadIdx.x % 32, blocks = min(blocks_of_k(p), last_block);
    const bool of_b = lane < kSegments;
    bool first = true;
    const u32 full = keep(shared_address(&s.stages[0].full));
    const long long step = of_b ? p.sb_k : p.sa_k;
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        const ScaleRows rows = scale_rows(p, tile);
        const int column = tile.column + lane * kSegment, rest = lane - kSegments, row = rows.bulk + rest;
        const bool exists = of_b ? column < p.n : rest < rows.rest;
        const float* from = of_b ? scale_of_b(p, tile, column) + first_block * p.sb_k
                                 : p.sa + (kKind == kMasked ? tile.group * p.sa_group : 0) + rows.first + row +
                                       first_block * p.sa_k;
        if (first) wait_for_first_load(), first = false;
        dependency_wait();
        float next = load_float(from, exists && first_block < blocks);
        for (int kb = first_block; kb < last_block; kb += kDepth, ring.advance()) {
            const float scale = next;
            from += step;
            next = load_float(from, exists && kb + 1 < blocks);
            Stage& stage = ring.stage(s);
            barrier_wait(&stage.empty, ring.phase ^ 1);
            if (exists) store_float(&stage.scales[of_b ? kScalesOfB + lane : row][0], scale);
            __syncwarp();
            if (lane == 0) barrier_arrive(full + ring.offset);
        }
        if (kOneTile) break;
    }
    if (first) wait_for_first_load();
}

// Where A's scales don't suit bulk copies, every scale comes by a small copy: no layout needs a transposing pass. Two warps
// bring A's, a lane each 64th row, the third B's, a lane a segment; what lies in one piece comes by one copy. The code comes
// from memory, and the first stage waits for it: what stands before the first copy counts by the instruction.
__device__ void load_scales(const GemmParams& p, SharedStorage& s, int first_block, int last_block) {
    constexpr int kOfA = kScaleThreads - 32, kRows = (kTileM + kOfA - 1) / kOfA;         // lanes; rows of each
    const int thread = threadIdx.x % 128 - 32, blocks = blocks_of_k(p);
    const bool of_b = thread >= kOfA;
    const int place = of_b ? thread - kOfA : thread;               // the segment, or the first row of the tile
    const bool in_one_piece = kDepth > 1 && (of_b ? p.sb_in_pieces : p.sa_in_pieces);
    const long long step = of_b ? p.sb_k : p.sa_k;               // from block to block
    const u32 to = keep(shared_address(s.stages[0].scales[(of_b ? kScalesOfB : 0) + place]));
    bool first = true;
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        const int column = tile.column + place * kSegment;
        const float* from[kRows];
        from[0] = of_b ? scale_of_b(p, tile, column)
                       : p.sa + (kKind == kMasked ? tile.group * p.sa_group : 0) + (tile.row + place) * p.sa_row;
        from[0] += first_block * step;
        for (int r = 1; r < kRows; ++r) from[r] = from[r - 1] + kOfA * p.sa_row;
        const int end = of_b ? (column < p.n ? kSegments : 0) : min(tile.rows, kTileM);
        if (kScalesAhead && !kBrief && first) wait_for_first_load(), first = false;
        dependency_wait();
        for (int kb = first_block; kb < last_block; kb += kDepth, ring.advance()) {
            Stage& stage = ring.stage(s);
            const int left = blocks - kb;                        // zeros behind K
            if (!kBrief || !first)                               // the first is empty, and its barriers may not be set up yet
                (kDepth > 1 ? barrier_spin : barrier_wait)(&stage.empty, ring.phase ^ 1);        // what it copies is wanted next
            for (int r = 0; r < kRows; ++r) {
                const u32 there = to + ring.offset + r * kOfA * sizeof stage.scales[0];
                if (place + r * kOfA < end) {
                    if (in_one_piece) copy_async<kDepth * 4>(there, from[r], true);
                    else
                        for (int j = 0; j < kDepth; ++j) copy_async<4>(there + j * 4, from[r] + j * step, j < left);
                }
                from[r] += kDepth * step;
            }
            if (kBrief && first) wait_for_first_load(), first = false;           // then they are
            copy_async_arrive(&stage.full);
        }
        if (kOneTile) break;
    }
    if (kScalesAhead && first) wait_for_first_load();
}

}  // namespace fp8gemm
