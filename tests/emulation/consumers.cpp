// Runs each consumer over several tiles: it waits for every stage in order, by the right phase, and gives it back once.
#include "kernel.h"

namespace {

struct Step { size_t stage; u32 phase; };

// The stages that a consumer waits for, one behind another.
std::vector<Step> stages_waited_for(SharedStorage& s) {
    std::vector<Step> found;
    for (const auto& [barrier, phase] : waits)
        for (size_t i = 0; i < kStages; ++i)
            if (barrier == &s.stages[i].full) found.push_back({i, phase});
    return found;
}

void check(SharedStorage& s, int consumer, size_t tiles, size_t each) {
    const std::vector<Step> found = stages_waited_for(s);
    const size_t given = kShare > 1 ? remote_arrivals.size() : arrivals.size();
    if (found.size() != tiles * each) fail("stages waited for", consumer, static_cast<int>(found.size()));
    for (size_t i = 0; i < found.size(); ++i)
        if (found[i].stage != i % kStages || found[i].phase != i / kStages % 2)
            fail("another stage", consumer, static_cast<int>(i));
    if (given != found.size()) fail("given back", static_cast<int>(given), static_cast<int>(found.size()));
}

}  // namespace

int main() {
    static SharedStorage s;
    static u16 d[3 * kTileM][8 * kTileN];
    for (int k : {128, 1024, 1040, 2176, 128 * kTurn * 3}) {
        GemmParams p{};
        p.m = 2 * kTileM + 1, p.n = 8 * kTileN, p.k = k, p.groups = 1, p.a_box_rows = kTileM;        // some consumers idle
        p.d_data = &d[0][0], p.d_row = 8 * kTileN;
        set_tiles(p, 2, 3);
        blockIdx.x = 0;
        const int last = (blocks_of_k(p) + kTurn - 1) / kTurn * kTurn;
        size_t tiles = 0;
        Scheduler scheduler(p);
        for (Tile tile; scheduler.next(tile);) ++tiles;
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            waits.clear(), arrivals.clear(), remote_arrivals.clear();
            threadIdx.x = consumer * 128;
            if constexpr (kSwapAB) multiply_swapped(p, s, 0, last);
            else multiply(p, s, 0, last, consumer);
            check(s, consumer, tiles, last / kDepth);
        }
    }
    printf("ok\n");
}
