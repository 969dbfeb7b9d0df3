// Which tile a CTA computes next. Every role of the kernel runs its own copy and sees the same sequence.
//
// Tiles are numbered group by group; inside a group in bands of `raster` cluster tiles along M, down each column of the
// band first, so that the tiles that run at one time share A and B in L2. Cluster c takes tiles c, c + clusters, ...
// Group sizes come from the device. Whatever they say, rows stay inside [0, m): nonsense can't reach foreign memory.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

struct Tile {
    int group;                                   // of B (and of A and D in the masked kind)
    int row, column;                             // of A and D, of B: where this CTA's tile starts
    int rows;                                    // of the tile that belong to the group; may be <= 0 or > kTileM
    int alone;                                   // the cluster's other tile is of another group: no B to share
};

class Scheduler {
public:
    // Whole warps construct and call: the search for the group uses all 32 lanes.
    __device__ Scheduler(const GemmParams& params)
        : p(params), index(blockIdx.x / kCluster), columns(ceil_div(p.n, kTileN * kClusterN)) {
        if constexpr (kKind == kRagged || kKind == kMasked) load_window(0);
        if constexpr (kKind == kContiguous) look_ahead();
    }

    __device__ bool next(Tile& tile) {
        if constexpr (kKind == kContiguous) {
            do {
                if (!ahead.exists) return false;
            } while (!take_segment(tile));
        } else {
            int in_group = index, start = 0, rows = p.m;
            tile.group = tile.alone = 0;
            if constexpr (kKind == kRagged || kKind == kMasked) {
                if (!find_group(tile.group, in_group, start, rows)) return false;
            } else if (index >= ceil_div(p.m, kRows) * columns) {
                return false;
            }
            index += gridDim.x / kCluster;
            place(tile, in_group, start, rows);
        }
        return true;
    }

private:
    static constexpr int kRows = kTileM * kClusterM;

    const GemmParams& p;
    int index;                                   // of the next cluster tile
    const int columns;                           // cluster tiles along N
    // A window of 32 groups, one a lane: first row, rows, tiles, and the tiles up to and including this group.
    int window = 0, tiles_before = 0, lane_start = 0, lane_rows = 0, lane_tiles = 0, lane_sum = 0;

    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // The tile's corner: the `in_group`-th of a group of `rows` rows that begin at `start`.
    __device__ void place(Tile& tile, int in_group, int start, int rows) const {
        const int rank = kCluster > 1 ? cluster_rank() : 0;
        int m = 0, n = in_group;
        if (rows > kRows) {                      // one row of tiles starts sooner without the divisions
            const int band = in_group / (p.raster * columns), in_band = in_group - band * p.raster * columns;
            const int height = min(p.raster, ceil_div(rows, kRows) - band * p.raster);
            m = band * p.raster + in_band % height, n = in_band / height;
        }
        m = m * kClusterM + (kClusterM > 1 ? rank : 0), n = n * kClusterN + (kClusterN > 1 ? rank : 0);
        tile.row = start + m * kTileM;
        tile.rows = rows - m * kTileM;
        tile.column = n * kTileN;
    }

    // Contiguous: the next tile, and what memory says of it. It is asked one tile ahead, so that nobody waits for it.
    struct Ahead {
        bool exists;
        Tile tile;
        int group, other;                        // of the tile's first row, and of the cluster's other tile's
        int of_rows[(kTileM + 31) / 32];         // of every row, one a lane
    } ahead;

    __device__ void look_ahead() {
        ahead.exists = index < ceil_div(p.m, kRows) * columns;
        if (!ahead.exists) return;
        place(ahead.tile, index, 0, p.m);
        index += gridDim.x / kCluster;
        const int row = ahead.tile.row;
        auto group_of = [&](int r) { return r < p.m ? p.layout[r] : -1; };
        ahead.group = group_of(row);
        if constexpr (kClusterM > 1) ahead.other = group_of(cluster_rank() ? row - kTileM : row + kTileM);
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

    __device__ void load_window(int first) {
        const int lane = threadIdx.x % 32, g = first + lane;
        window = first;
        lane_start = lane_rows = 0;
        if (g < p.groups) {
            const int end = min(max(p.layout[g], 0), p.m);
            if constexpr (kKind == kRagged) lane_start = g ? min(max(p.layout[g - 1], 0), p.m) : 0;
            lane_rows = max(end - lane_start, 0);
        }
        lane_sum = lane_tiles = ceil_div(lane_rows, kRows) * columns;
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xffffffff, lane_sum, step);
            if (lane >= step) lane_sum += below;
        }
    }

    __device__ bool find_group(int& group, int& in_group, int& start, int& rows) {
        for (;;) {
            const unsigned beyond = __ballot_sync(0xffffffff, tiles_before + lane_sum > index);
            if (beyond) {
                const int lane = __ffs(beyond) - 1;
                group = window + lane;
                in_group = index - tiles_before - __shfl_sync(0xffffffff, lane_sum - lane_tiles, lane);
                start = kKind == kRagged ? __shfl_sync(0xffffffff, lane_start, lane) : 0;
                rows = __shfl_sync(0xffffffff, lane_rows, lane);
                return true;
            }
            if (window + 32 >= p.groups) return false;
            tiles_before += __shfl_sync(0xffffffff, lane_sum, 31);
            load_window(window + 32);
        }
    }
};

}  // namespace fp8gemm
