// Which tile a CTA computes next. Every role of the kernel runs its own copy and sees the same sequence.
//
// Tiles are numbered in bands of `raster` cluster tiles along M, down each column of the band first, so that the tiles
// that run at one time share A and B in L2. Cluster c takes tiles c, c + clusters, ... Along M the tiles of all pieces
// follow one another, and each piece begins a new one. A piece is the rows of a group; of contiguous segments it is a
// block of 128 rows, which are of one group, or two such blocks that a tile of 256 rows covers.
// Group sizes come from the device. Whatever they say, rows stay inside [0, m): nonsense can't reach foreign memory.
// They are read more than once, and must not change meanwhile.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

struct Tile {
    int group;                                   // of B (and of A and D in the masked kind)
    int row, column;                             // of A and D, of B: where this CTA's tile starts
    int rows;                                    // from there on, of the piece; may be <= 0 or > kTileM
    int alone;                                   // the cluster's other tile is of another group: no B to share
};

__device__ int divide(int x, Divisor d) { return static_cast<u64>(static_cast<u32>(x)) * d.multiplier >> d.shift; }

class Scheduler {
public:
    // Whole warps construct and call: the search for the piece uses all 32 lanes.
    __device__ Scheduler(const GemmParams& params)
        : p(params), index(blockIdx.x / kCluster), columns(ceil_div(p.n, kTileN * kClusterN)) {
        if constexpr (kKind != kDense) row_tiles = count_row_tiles();
    }

    __device__ bool next(Tile& tile) {
        const int rows = kKind == kDense ? p.m : row_tiles * kTileM;
        if (index >= ceil_div(rows, kRows) * columns) return false;
        place(tile, rows);
        tile.group = tile.alone = 0;
        if constexpr (kKind != kDense) find_piece(tile);
        return true;
    }

private:
    static constexpr int kRows = kTileM * kClusterM, kBlock = 128;

    const GemmParams& p;
    int index;                                   // of the next cluster tile
    const int columns;                           // cluster tiles along N
    int row_tiles = 0;                           // along M, of all pieces
    // A window of 32 pieces, one a lane: first row, rows, and the tiles along M up to the piece's last. Contiguous: 4 times
    // the group, + 1 if the block before is of the same, + 2 if the block behind the piece is.
    int window = -32, lane_start = 0, lane_rows = 0, lane_end = 0, lane_group = 0;

    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // The next tile's corner, of `rows` rows in all.
    __device__ void place(Tile& tile, int rows) {
        const int rank = kCluster > 1 ? cluster_rank() : 0;
        int m = 0, n = index;
        if (rows > kRows) {                      // one row of tiles starts sooner without the divisions
            const int band = divide(index, p.by_band), first = band * p.raster, in_band = index - first * columns;
            const int height = min(p.raster, ceil_div(rows, kRows) - first);
            n = height == p.raster ? divide(in_band, p.by_raster) : u32(in_band) / u32(height);
            m = first + in_band - n * height;
        }
        index += gridDim.x / kCluster;
        m = m * kClusterM + (kClusterM > 1 ? rank : 0), n = n * kClusterN + (kClusterN > 1 ? rank : 0);
        tile.row = m * kTileM;
        tile.rows = rows - m * kTileM;
        tile.column = n * kTileN;
    }

    // Contiguous: the group of a row; -1 if it is padding, or nonsense.
    __device__ int group_at(int row) const {
        const int group = static_cast<u32>(row) < static_cast<u32>(p.m) ? p.layout[row] : -1;
        return static_cast<u32>(group) < static_cast<u32>(p.groups) ? group : -1;
    }

    // Contiguous: how many of the group's rows a block begins with. Four loads at a time, then few that are cached.
    __device__ int rows_of_block(int row, int group) const {
        int rows = 0;
#pragma unroll
        for (int end = 32; end <= kBlock; end += 32) rows += group_at(row + end - 1) == group ? 32 : 0;
#pragma unroll 1
        for (int step = 16; step > 0 && rows < kBlock; step /= 2)
            rows += group_at(row + rows + step - 1) == group ? step : 0;
        return rows;
    }

    // Contiguous: a block and its neighbours.
    struct Block {
        int row, group;
        bool same_before, same_behind;           // neighbours are of the same group
        bool second, first;                      // of two blocks that a tile covers
    };
    __device__ Block block(int i) const {
        const int row = i * kBlock, group = group_at(row), before = group_at(row - kBlock), behind = group_at(row + kBlock);
        const bool fills = group_at(row + kBlock - 1) == group, filled = group_at(row - 1) == group;
        Block b{row, group, before == group, behind == group, false, false};
        if (kTileM > kBlock) b.second = i % 2 && b.same_before && filled, b.first = i % 2 == 0 && b.same_behind && fills;
        return b;
    }

    // Ragged and masked.
    __device__ int rows_of_group(int group, int& start) const {
        start = 0;
        if (group >= p.groups) return 0;
        if (kKind == kRagged && group > 0) start = min(max(p.layout[group - 1], 0), p.m);
        return max(min(max(p.layout[group], 0), p.m) - start, 0);
    }

    __device__ int tiles_of(int piece) const {
        if constexpr (kKind == kContiguous) {
            const Block b = block(piece);
            // The window will read all of it soon, one line after another if they are not there by then.
#pragma unroll
            for (int row = 0; row < kBlock; row += 32)
                if (b.row + row < p.m) prefetch_line(p.layout + b.row + row);
            if (b.group < 0 || b.second) return 0;
            return kTileM < kBlock ? ceil_div(rows_of_block(b.row, b.group), kTileM) : 1;
        }
        int start;
        return ceil_div(rows_of_group(piece, start), kTileM);
    }

    __device__ int count_row_tiles() const {
        const int pieces = kKind == kContiguous ? ceil_div(p.m, kBlock) : p.groups;
        int count = 0;
#pragma unroll(kKind == kContiguous && kTileM >= kBlock ? 4 : 1)
        for (int piece = threadIdx.x % 32; piece < pieces; piece += 32) count += tiles_of(piece);
        return __reduce_add_sync(0xffffffff, count);
    }

    __device__ void read_piece(int piece) {
        if constexpr (kKind == kContiguous) {
            const Block b = block(piece);
            const bool same_behind = b.first ? group_at(b.row + 2 * kBlock) == b.group : b.same_behind;
            lane_start = b.row, lane_group = b.group * 4 + b.same_before + 2 * same_behind, lane_rows = 0;
            if (b.group >= 0 && !b.second)
                lane_rows = b.first ? kBlock + rows_of_block(b.row + kBlock, b.group) : rows_of_block(b.row, b.group);
        } else {
            lane_rows = rows_of_group(piece, lane_start);
        }
    }

    // `tiles`: along M, before the window if we go on, else behind it.
    __device__ void load_window(int first, int tiles, bool on) {
        const int lane = threadIdx.x % 32;
        window = first;
        read_piece(first + lane);
        lane_end = ceil_div(lane_rows, kTileM);
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xffffffff, lane_end, step);
            if (lane >= step) lane_end += below;
        }
        lane_end += on ? tiles : tiles - __shfl_sync(0xffffffff, lane_end, 31);
    }

    // place() counted rows as if each piece filled its last tile: from there to the piece and the rows that it has.
    __device__ void find_piece(Tile& tile) {
        const int wanted = tile.row / kTileM, row_tile = min(wanted, row_tiles - 1);
        int start;                               // tiles along M: the first of this lane's piece
        for (;;) {
            start = lane_end - ceil_div(lane_rows, kTileM);
            const int first = __shfl_sync(0xffffffff, start, 0), end = __shfl_sync(0xffffffff, lane_end, 31);
            // The votes tell the assembler that the warp agrees: see multiply().
            const bool on = __any_sync(0xffffffff, row_tile >= end), back = __any_sync(0xffffffff, row_tile < first);
            if (!on && !back) break;
            load_window(window + (on ? 32 : -32), on ? end : first, on);
        }
        const int lane = __ffs(__ballot_sync(0xffffffff, lane_end > row_tile)) - 1;
        const int row = (row_tile - __shfl_sync(0xffffffff, start, lane)) * kTileM;      // of the piece
        const int found = kKind == kContiguous ? __shfl_sync(0xffffffff, lane_group, lane) : 0;
        tile.group = kKind == kContiguous ? found / 4 : window + lane;
        tile.row = __shfl_sync(0xffffffff, lane_start, lane) + row;
        tile.rows = __shfl_sync(0xffffffff, lane_rows, lane) - row;
        if constexpr (kClusterM > 1) {           // the other tile is the one after ours, or the one before
            const bool ends_pair = wanted % 2;
            const bool parted = ends_pair ? row == 0 && !(found & 1) : tile.rows <= kTileM && !(found & 2);
            tile.alone = wanted + !ends_pair < row_tiles && parted;
            if (wanted > row_tile) tile.rows = 0;        // only keeps the other CTA company
        }
    }
};

}  // namespace fp8gemm
