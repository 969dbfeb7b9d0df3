// Adds up two consumers' slices of K as each of their threads: each consumer has half of a tile's columns then, and nobody writes
// what may still be read: they meet once between writing and reading, and from the second tile on once before writing.
#include "kernel.h"

namespace {

float slice(int consumer, int thread, int i) { return static_cast<float>((consumer * 128 + thread) * 191 % 1013 + i) / 7; }

// As one thread. What it reads is there only in a second pass: threads run one after another.
void add(SharedStorage& s, int consumer, int thread, u32 round, bool second) {
    float sum[kTileN / 2];
    for (int i = 0; i < kTileN / 2; ++i) sum[i] = slice(consumer, thread, i);
    threadIdx.x = consumer * 128 + thread;
    meetings.clear();
    if (consumer == 0) add_slices<0>(s, sum, round);
    else add_slices<1>(s, sum, round);
    if (meetings != std::vector<Meeting>(round ? 2 : 1, {kSliced, 0})) fail("meets otherwise", consumer, round);
    for (int i = 0; second && i < kTileN / 4; ++i) {
        const int from = consumer * kTileN / 4 + i;
        if (sum[i] != slice(0, thread, from) + slice(1, thread, from)) fail("another sum", consumer, i);
    }
}

// Of one tile, what a consumer leaves lies in its own blocks of B, which the other one never reads.
void check_places(SharedStorage& s) {
    for (int consumer = 0; kOneTile && consumer < kConsumers; ++consumer)
        for (int group = 0; group < kConsumerGroups; ++group) {
            const u8* first = reinterpret_cast<u8*>(slice_sums(s, consumer, group));
            bool inside = false;
            for (const Stage& stage : s.stages) {
                const u8* block = stage.b + consumer * kTileN * kTileK;
                inside |= first >= block && first + 128 * sizeof(float4) <= block + kTileN * kTileK;
            }
            if (!inside) fail("not in its own blocks", consumer, group);
        }
}

}  // namespace

int main() {
    static SharedStorage s;
    check_places(s);
    for (u32 round = 0; round < 3; ++round)
        for (int pass = 0; pass < 2; ++pass)
            for (int consumer = 0; consumer < kConsumers; ++consumer)
                for (int thread = 0; thread < 128; ++thread) add(s, consumer, thread, round, pass == 1);
    printf("ok\n");
}
