// Runs the kernel's copying of scales thread by thread and checks each copy: from where, to which stage and slot, once.
#include "kernel.h"

namespace {

// A copy of several scales as that many of one.
std::vector<Copy> one_by_one(const std::vector<Copy>& copied) {
    std::vector<Copy> found;
    for (const Copy& c : copied) {
        if (reinterpret_cast<u64>(c.from) % c.bytes || reinterpret_cast<u64>(c.to) % c.bytes) fail("not aligned", c.bytes, 0);
        for (int i = 0; i < c.bytes / 4; ++i)
            found.push_back({static_cast<const float*>(c.to) + i, static_cast<const float*>(c.from) + i, c.valid});
    }
    return found;
}

// What one fill of a stage must hold: of each block, the scale of each row and of each segment of columns that exists; of
// A's all but what bulk copies bring.
void check(const GemmParams& p, const Tile& tile, int kb, const std::vector<std::vector<Copy>>& fills,
           const Stage& stage) {
    const int blocks = blocks_of_k(p), last = min(kTileM, max(p.m - tile.row, 0)), bulk = p.sa_by_bulk ? last / 4 * 4 : 0;
    std::vector<bool> seen(kScaleSlots * kDepth);
    for (const auto& copied : fills)
        for (const Copy& c : one_by_one(copied)) {
            const long slot = static_cast<const float*>(c.to) - &stage.scales[0][0];
            if (slot < 0 || slot >= kScaleSlots * kDepth) fail("outside of the stage's scales", tile.row, tile.column);
            const int j = static_cast<int>(slot) % kDepth, i = static_cast<int>(slot) / kDepth;
            const bool of_a = i < kTileM;
            const int of_b = i - kScalesOfB, column = tile.column + of_b * kSegment;
            if (seen[slot] || (of_a ? i < bulk || i >= last : of_b < 0 || of_b >= kSegments || column >= p.n))
                fail("copied twice, or not to be copied", j, i);
            seen[slot] = true;
            const bool valid = kb + j < blocks && (!of_a || tile.row + i < p.m);
            if (c.valid != valid) fail("wrong validity", j, i);
            const float* from = of_a ? p.sa + (tile.row + i) * p.sa_row + (kb + j) * p.sa_k
                                     : p.sb + column / 128 * p.sb_row + (kb + j) * p.sb_k;
            if (valid && c.from != from) fail("wrong source", j, i);
        }
    for (int j = 0; j < kDepth; ++j) {
        for (int i = bulk; i < last; ++i)
            if (!seen[i * kDepth + j]) fail("A's not copied", j, i);
        for (int i = 0; i < kSegments; ++i)
            if (!seen[(kScalesOfB + i) * kDepth + j] && tile.column + i * kSegment < p.n) fail("B's not copied", j, i);
    }
}

// Copies before the first arrival.
size_t of_first_stage() {
    return std::find_if(copies.begin(), copies.end(), [](const Copy& c) { return !c.to; }) - copies.begin();
}

// A stage is waited for before it is filled; but the first, where others may still set up its barriers.
void check_waits(SharedStorage& s) {
    for (size_t i = 0; i < waits.size(); ++i) {
        const size_t fill = i + kBrief;
        if (waits[i] != std::pair<const u64*, u32>{&s.stages[fill % kStages].empty, fill / kStages % 2 ^ 1})
            fail("another barrier waited for, or phase", i, waits.size());
    }
}

}  // namespace

int main() {
    static SharedStorage s;
    alignas(16) static float scales[1];
    shared_begin = &s;
    const int sizes[][3] = {{1, 16, 16}, {kTileM, kTileN, 1024}, {3 * kTileM + 7, 2 * kTileN + 24, 1040}, {5, 300, 2176}};
    for (const auto& size : sizes)
        // Row-major, column-major in bulk, column-major by copies; A's in pieces, B's in pieces.
        for (int layout = 0; layout < 5; ++layout) {
            const bool bulk = layout == 1, a_in_pieces = layout == 3, b_in_pieces = layout == 4;
            if ((bulk && !kBulkScales) || (layout > 2 && size[2] % (kTileK * kDepth))) continue;
            GemmParams p{};
            p.m = size[0], p.n = size[1], p.k = size[2], p.groups = 1, p.sa_by_bulk = bulk;
            set_tiles(p, 2, 2);
            p.sa = scales, p.sb = scales + (1 << 20);
            p.sa_row = layout ? 1 : 1000, p.sa_k = layout ? 1000 : 3, p.sb_row = 77, p.sb_k = 2;
            p.sa_in_pieces = a_in_pieces, p.sb_in_pieces = b_in_pieces;
            if (a_in_pieces) p.sa_row = 1000, p.sa_k = 1;
            if (b_in_pieces) p.sb_row = 80, p.sb_k = 1;
            const int turns = (blocks_of_k(p) + kTurn - 1) / kTurn, last = turns * kTurn, stages = last / kDepth;
            for_each_cluster(p, [&] {
                const int threads = bulk ? 32 : kScaleThreads;
                std::vector<std::vector<Copy>> of_thread;
                std::vector<size_t> waited;
                arrivals.clear();
                for (int thread = 0; thread < threads; ++thread) {
                    threadIdx.x = kConsumers * 128 + 32 + thread;
                    for (int start : {last, 0}) {                // a share of K may be empty
                        copies.clear(), loads.clear(), meetings.clear(), waits.clear();
                        bulk ? load_other_scales(p, s, start, last) : load_scales(p, s, start, last);
                        const size_t begun = kBrief && start < last ? of_first_stage() : 0;
                        if (meetings != std::vector<Meeting>(kScalesAhead, {kLoading, begun})) fail("meets others", thread, start);
                        check_waits(s);
                    }
                    of_thread.push_back(copies);
                    waited.push_back(waits.size());
                }
                std::vector<size_t> at(threads);
                Scheduler tiles(p);
                size_t fill = 0;
                for (Tile tile; tiles.next(tile);)
                    for (int i = 0; i < stages; ++i, ++fill) {
                        Stage& stage = s.stages[fill % kStages];
                        std::vector<std::vector<Copy>> fills(threads);
                        for (int thread = 0; thread < threads; ++thread) {
                            const auto& all = of_thread[thread];
                            size_t& next = at[thread];
                            for (; next < all.size() && all[next].to; ++next) fills[thread].push_back(all[next]);
                            if (next == all.size()) fail("no end", thread, fill);
                            if (!bulk && all[next].from != &stage.full) fail("another arrival", thread, fill);
                            ++next;
                        }
                        if (bulk && (fill >= arrivals.size() || arrivals[fill] != shared_address(&stage.full)))
                            fail("no arrival", fill, 0);
                        check(p, tile, i * kDepth, fills, stage);
                    }
                if (bulk && fill != arrivals.size()) fail("more arrivals than there are stages", fill, 0);
                for (int thread = 0; thread < threads; ++thread)
                    if (at[thread] != of_thread[thread].size() || waited[thread] != fill - kBrief)
                        fail("more than there is, or waits", thread, fill);
            });
        }
    printf("ok\n");
}
