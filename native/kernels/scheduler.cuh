// Which tile a CTA computes next. Every role of the kernel runs its own copy and sees the same sequence.
//
// Tiles are numbered in bands of `raster` cluster tiles along M, down each column of the band first, so that the tiles
// that run at one time share A and B in L2. Cluster c takes tiles c, c + clusters, ... Along M the tiles of all groups
// follow one another; each group begins a new one. Where a cluster has one tile, the grid says which.
// Group sizes come from the device. Whatever they say, rows stay inside [0, m): nonsense can't reach foreign memory.
// They are read more than once, and must not change meanwhile.
#pragma once
#include "cluster.cuh"
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

struct Tile {
    int group;                                   // of B (and of A and D in the masked kind)
    int row, column;                             // of A and D, of B: where this CTA's tile starts
    int rows;                                    // of the tile that belong to the group; may be <= 0 or > kTileM
    int alone;                                   // the cluster's other tile is of another group: no B to share
};

__device__ int divide(int x, Divisor d) { return static_cast<u64>(static_cast<u32>(x)) * d.multiplier >> d.shift; }

class Scheduler {
public:
    // Whole warps construct and call: the search for the group uses all 32 lanes.
    __device__ Scheduler(const GemmParams& params)
        : p(params), index(blockIdx.x / kCluster) {
        if constexpr (kSearches) row_tiles = count_row_tiles();
        if constexpr (kKind == kContiguous) look_ahead();
    }

    __device__ bool next(Tile& tile) {
        if constexpr (kKind == kContiguous) {
            do {
                if (!ahead.exists) return false;
            } while (!take_segment(tile));
        } else {
            const int rows = kSearches ? row_tiles * kTileM : p.m;
            if (kOneTile ? taken : index >= (kSearches ? ceil_div(rows, kRows) * p.columns : p.tiles)) return false;
            taken = true;
            place(tile, rows);
            tile.group = tile.alone = 0;
            if constexpr (kSearches) find_group(tile);
        }
        return true;
    }

private:
    static constexpr int kRows = kTileM * kClusterM;
    static constexpr bool kSearches = kKind == kRagged || kKind == kMasked;

    const GemmParams& p;
    int index;                                   // of the next cluster tile
    bool taken = false;                          // the cluster's one tile
    int row_tiles = 0;                           // along M, of all groups
    // A window of 32 groups, one a lane: first row, rows, and the tiles along M up to the group's last.
    int window = -32, lane_start = 0, lane_rows = 0, lane_end = 0;

    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // The next tile's corner, of `rows` rows in all.
    __device__ void place(Tile& tile, int rows) {
        const int rank = share_rank();
        int m = 0, n = index;
        if constexpr (kOneTile) {
            m = blockIdx.x / kCluster, n = blockIdx.y;
        } else if (rows > kRows) {               // one row of tiles starts sooner without the divisions
            const int band = divide(index, p.by_band), first = band * p.raster, in_band = index - first * p.columns;
            const int height = min(p.raster, ceil_div(rows, kRows) - first);
            n = height == p.raster ? divide(in_band, p.by_raster)
                : kSearches        ? u32(in_band) / u32(height)
                                   : divide(in_band, p.by_last);
            m = first + in_band - n * height;
        }
        index += p.clusters;
        m = m * kClusterM + (kClusterM > 1 ? rank : 0), n = n * kClusterN + (kClusterN > 1 ? rank : 0);
        tile.row = m * kTileM;
        tile.rows = rows - m * kTileM;
        tile.column = n * kTileN;
    }

    // Contiguous: the next tile, and what memory says of it. It is asked one tile ahead, so that nobody waits for it
    // (two, where consumers themselves ask for a tile ahead).
    struct Ahead {
        bool exists;
        Tile tile;
        int group, other;                        // of the tile's first row, and of the cluster's other tile's
        int of_rows[(kTileM + 31) / 32];         // of every row, one a lane
    } ahead;

    __device__ void look_ahead() {
        ahead.exists = index < p.tiles;
        if (!ahead.exists) return;
        place(ahead.tile, p.m);
        const int row = ahead.tile.row;
        auto group_of = [&](int r) { return r < p.m ? p.layout[r] : -1; };
        ahead.group = group_of(row);
        if constexpr (kClusterM > 1) ahead.other = group_of(share_rank() ? row - kTileM : row + kTileM);
#pragma unroll
        for (int i = 0; i < (kTileM + 31) / 32; ++i) ahead.of_rows[i] = group_of(row + i * 32 + threadIdx.x % 32);
    }

    // Takes the tile ahead: its segment's group, and its rows before the padding, which is marked -1. False if the
    // cluster has no work there.
    __device__ bool take_segment(Tile& tile) {
        tile = ahead.tile;
        tile.group = ahead.group < p.groups ? ahead.group : -1;
        tile.alone = 0;
        bool work = tile.group >= 0;
        int rows = 0;
#pragma unroll
        for (int i = 0; i < (kTileM + 31) / 32; ++i)
            rows += __popc(__ballot_sync(0xffffffff, work && ahead.of_rows[i] == tile.group));
        tile.rows = rows;
        if constexpr (kClusterM > 1) {
            const int other = ahead.other < p.groups ? ahead.other : -1;
            tile.alone = work && other >= 0 && tile.group != other;
            if (!work && other >= 0) tile.group = other, work = true;    // the other CTA's: ours only keeps it company
        }
        look_ahead();
        return work;
    }

    __device__ int rows_of(int group, int& start) const {
        start = 0;
        if (group >= p.groups) return 0;
        if (kKind == kRagged && group > 0) start = min(max(p.layout[group - 1], 0), p.m);
        return max(min(max(p.layout[group], 0), p.m) - start, 0);
    }

    __device__ int count_row_tiles() const {
        int count = 0, start;
#pragma unroll 1
        for (int group = threadIdx.x % 32; group < p.groups; group += 32)
            count += ceil_div(rows_of(group, start), kTileM);
        return __reduce_add_sync(0xffffffff, count);
    }

    // `tiles`: along M, before the window if we go on, else behind it.
    __device__ void load_window(int first, int tiles, bool on) {
        const int lane = threadIdx.x % 32;
        window = first;
        lane_rows = rows_of(first + lane, lane_start);
        lane_end = ceil_div(lane_rows, kTileM);
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xffffffff, lane_end, step);
            if (lane >= step) lane_end += below;
        }
        lane_end += on ? tiles : tiles - __shfl_sync(0xffffffff, lane_end, 31);
    }

    // place() counted rows as if each group filled its last tile: from there to the group and the rows that it has.
    __device__ void find_group(Tile& tile) {
        const int wanted = tile.row / kTileM, row_tile = min(wanted, row_tiles - 1);
        int start;                               // tiles along M: the first of this lane's group
        for (;;) {
            start = lane_end - ceil_div(lane_rows, kTileM);
            const int first = __shfl_sync(0xffffffff, start, 0), end = __shfl_sync(0xffffffff, lane_end, 31);
            // The votes tell the assembler that the warp agrees: see multiply().
            const bool on = __any_sync(0xffffffff, row_tile >= end), back = __any_sync(0xffffffff, row_tile < first);
            if (!on && !back) break;
            load_window(window + (on ? 32 : -32), on ? end : first, on);
        }
        const int lane = __ffs(__ballot_sync(0xffffffff, lane_end > row_tile)) - 1;
        const int row = (row_tile - __shfl_sync(0xffffffff, start, lane)) * kTileM;      // of the group
        tile.group = window + lane;
        tile.row = __shfl_sync(0xffffffff, lane_start, lane) + row;
        tile.rows = __shfl_sync(0xffffffff, lane_rows, lane) - row;
        if constexpr (kClusterM > 1) {           // the other tile is the one after ours, or the one before
            const bool ends_pair = wanted % 2;
            tile.alone = wanted + !ends_pair < row_tiles && (ends_pair ? row == 0 : tile.rows <= kTileM);
            if (wanted > row_tile) tile.rows = 0;        // only keeps the other CTA company
        }
    }
};

}  // namespace fp8gemm
