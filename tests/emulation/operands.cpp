// Runs the kernel's loading of A and B as each CTA of a cluster and checks every stage: which blocks and rows arrive
// where, all of them once, and as many bytes as the barrier expects (fewer or more would hang or let a stage through too
// soon); that all clusters together have each tile once, that the consumers are told once, that a CTA stays until its peer is
// done with each stage, and that as many consumers give a stage back as its barrier waits for.
#include "kernel.h"

namespace {

constexpr bool kDeep = kDepth > 1;
constexpr u32 kPair = (kSplit - 1) * kShare;     // the first of the CTAs that are run: those of the last part of K

GemmParams make_params(int m, int n, int k, bool bulk) {         // what launch.cpp fills in
    GemmParams p{};
    p.m = m, p.n = n, p.k = k, p.groups = 1, p.sa_by_bulk = bulk, p.sa_k = 1000;
    set_tiles(p, 2, 2);
    p.a_box_rows = min(kTileM / (kDeep ? 1 : kClusterN), (m + 7) / 8 * 8);
    p.pace = 500;
    return p;
}

// Marks what a box brings of an operand: rows and blocks that the tile wants, at their place in the stage. Returns bytes.
int mark(const GemmParams& p, const Box& box, const u8* operand, int box_rows, int box_blocks, int rows, int row, int kb,
         std::vector<int>& seen) {
    const int block = kDeep ? box.z - kb : box.x / kTileK - kb;
    if (kDeep ? box.x != 0 : box.z != 0 || box.x % kTileK) fail("not at a block", box.x, box.z);
    const long place = (static_cast<u8*>(box.to) - operand) / kTileK;
    const int first = box.y - row;
    if (block < 0 || block + box_blocks > kDepth || first < 0) fail("another stage's", block, first);
    if (place != block * rows + first) fail("at the wrong place", static_cast<int>(place), block);
    for (int j = 0; j < box_blocks; ++j)
        for (int i = 0; i < box_rows; ++i) ++seen[(block + j) * rows + first + i];
    return box_rows * box_blocks * kTileK;
}

struct Loaded { std::vector<Box> boxes; std::vector<Expect> expects; };

// Once, before the first load, all barriers must be ready; once, behind it, the others hear of it. With `loads` false there
// is none, but they wait all the same.
void check_meetings(bool loads) {
    const size_t ready = 1, first = ready + (loads ? 1 + 1 : 0);         // marks of __syncwarp among the copies, a stage begun
    if (meetings != std::vector<Meeting>{{kShare > 1 ? -1 : kReady, ready}, {kLoading, first}})
        fail("meets others otherwise", static_cast<int>(meetings.size()), loads);
}

// For few rows, B's boxes of the first stage are asked for in L2 before anything is waited for; else nothing is.
void check_prefetches(const GemmParams& p) {
    std::vector<std::pair<const TensorMap*, BoxStart>> wanted;
    const size_t end = expects.size() > 1 ? expects[1].boxes : boxes.size();
    for (size_t i = 0; i < end && p.m <= kFewRows; ++i) {
        const Box& box = boxes[i];
        if (box.map == &p.b) wanted.push_back({&p.b, {box.x, box.y, box.z, box.w}});
    }
    if (prefetches != wanted) fail("asked for in L2", static_cast<int>(prefetches.size()), static_cast<int>(wanted.size()));
}

// The first stages, of deep ones, are asked for at the pace that the host set; all others as soon as they are empty.
void check_pace(const GemmParams& p) {
    for (size_t i = 1; i < expects.size(); ++i) {
        const bool paced = kDeep && i < kStages;
        const u32 passed = expects[i].at - expects[0].at, expected = i * p.pace;         // from a little before the first
        if (paced ? passed + 100 < expected || passed > expected : expects[i].at != expects[i - 1].at) fail("pace", i, passed);
    }
}

void check_tiles(const GemmParams& p) {
    const int rows = (p.m + kTileM - 1) / kTileM, columns = (p.n + kTileN - 1) / kTileN;
    std::vector<int> seen(rows * columns);
    for_each_cluster(p, [&] {
        for (rank_in_cluster = kPair; rank_in_cluster < kPair + kShare; ++rank_in_cluster) {
            Scheduler tiles(p);
            for (Tile tile; tiles.next(tile);) {
                const int i = tile.row / kTileM, j = tile.column / kTileN;
                if (tile.rows != p.m - tile.row) fail("other rows", tile.row, tile.rows);
                if (i < rows && j < columns) ++seen[i * columns + j];
            }
        }
    });
    for (int i = 0; i < rows * columns; ++i)
        if (seen[i] != 1) fail("a tile, not once", i, seen[i]);
}

void check_releases(SharedStorage& s) {
    const u64* empty = &s.stages[0].empty;
    shared_begin = &s;
    for (rank_in_cluster = kPair; rank_in_cluster < kPair + kShare; ++rank_in_cluster)
        for (threadIdx.x = 0; threadIdx.x < kConsumers * 128; ++threadIdx.x) release(empty_of_first(s));
    if (kShare > 1) check_remote_arrivals(s, empty, {kPair, kPair + 1});
    else if (arrivals.size() != arrivals_wanted(s, empty)) fail("arrivals", arrivals.size(), arrivals_wanted(s, empty));
    shared_begin = nullptr;
}

}  // namespace

int main() {
    static SharedStorage s;
    check_releases(s);
    static const float scales[1]{};
    const int sizes[][3] = {
        {1, 16, 16}, {kTileM, kTileN, 1024}, {3 * kTileM + 7, 5 * kTileN, 1040}, {2 * kTileM, 3 * kTileN, 2176}};
    for (const auto& size : sizes)
        for (int bulk = 0; bulk < 2; ++bulk) {
            if (bulk && !kBulkScales) continue;
            GemmParams p = make_params(size[0], size[1], size[2], bulk);
            if (kDeep) p.k = blocks_of_k(p) * kTileK;            // stages of whole blocks only
            check_tiles(p);
            p.sa = scales;
            const int blocks = blocks_of_k(p), turns = (blocks + kTurn - 1) / kTurn, last = turns * kTurn;
            const int a_rows = kDeep ? p.a_box_rows : kTileM;       // from one block to the next
            const int b_box_rows = kDeep ? kTileN : kTileN / kClusterM;
            blockIdx.x = 0;
            Loaded by[kShare];
            for (u32 to = 0; to < kShare; ++to) {
                rank_in_cluster = kPair + to;
                boxes.clear(), expects.clear(), copies.clear(), meetings.clear(), waits.clear();
                load_operands(p, s, last, last);                 // a share of K may be empty
                check_meetings(false);
                copies.clear(), meetings.clear(), waits.clear(), prefetches.clear();
                load_operands(p, s, 0, last);
                check_meetings(true);
                check_prefetches(p);
                check_pace(p);
                by[to] = {boxes, expects};
                // For each fill, and where a peer arrives here, for the last use of each stage.
                const size_t all = expects.size() + (kShare > 1 ? kStages : 0);
                if (waits.size() != all) fail("waits", waits.size(), all);
                for (size_t i = 0; i < all; ++i) {
                    const std::pair<const u64*, u32> wanted{&s.stages[i % kStages].empty, i / kStages % 2 ^ 1};
                    if (waits[i] != wanted) fail("another barrier waited for, or phase", i, all);
                }
            }
            for (u32 to = 0; to < kShare; ++to) {
                rank_in_cluster = kPair + to;
                Scheduler tiles(p);
                size_t fill = 0;
                for (Tile tile; tiles.next(tile);)
                    for (int kb = 0; kb < last; kb += kDepth, ++fill) {
                        Stage& stage = s.stages[fill % kStages];
                        std::vector<int> a(kDepth * a_rows), b(kDepth * kTileN);
                        u32 bytes = 0;
                        for (u32 from = 0; from < kShare; ++from) {
                            const Loaded& loaded = by[from];
                            const size_t fills = loaded.expects.size();
                            if (fill >= fills || loaded.expects[fill].barrier != &stage.full) fail("no stage", fill, from);
                            const size_t end = fill + 1 < fills ? loaded.expects[fill + 1].boxes : loaded.boxes.size();
                            for (size_t i = loaded.expects[fill].boxes; i < end; ++i) {
                                const Box& box = loaded.boxes[i];
                                if (box.barrier != &stage.full) fail("another barrier", fill, from);
                                if (box.ctas && box.ctas != 3u << kPair) fail("for other CTAs", fill, box.ctas);
                                if (!box.ctas && from != to) continue;
                                if (!box.map) {
                                    if (kb >= blocks || box.to != stage.scales[0]) fail("scales that do not exist", kb, fill);
                                    if (box.from != p.sa + tile.row + kb * p.sa_k) fail("scales from elsewhere", kb, fill);
                                    const int rows = min(p.m - tile.row, kTileM) & ~3;
                                    if (box.x != 4 * rows) fail("scales of other rows", kb, box.x);
                                    bytes += box.x;
                                    continue;
                                }
                                bytes += box.map == &p.a
                                    ? mark(p, box, stage.a, p.a_box_rows, kDeep ? kDepth / kClusterN : 1, a_rows, tile.row, kb, a)
                                    : mark(p, box, stage.b, b_box_rows, kDeep ? kDepth / kClusterM : 1, kTileN, tile.column, kb, b);
                            }
                        }
                        for (int i = 0; i < kDepth * a_rows; ++i)        // a box may reach beyond A: zeros
                            if (a[i] > 1 || (a[i] < 1 && tile.row + i % a_rows < p.m)) fail("a row of A, not once", fill, i);
                        for (int x : b)
                            if (x != 1) fail("a row of B, not once", fill, x);
                        const u32 expected = by[to].expects[fill].bytes;
                        if (bytes != expected) fail("bytes", bytes, expected);
                    }
                if (fill != by[to].expects.size()) fail("more stages than there are", fill, 0);
            }
        }
    printf("ok\n");
}
