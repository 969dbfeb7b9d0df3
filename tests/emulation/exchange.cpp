// Runs the exchange of a split's sums as each thread of each CTA: what is sent lands where the receiver looks for it, once, in as
// many bytes as its barrier expects (fewer would hang), and all columns of a tile are added up, in the order of K. Before, that the
// parts are all of K, and equal.
#include <cstddef>

#include "kernel.h"

namespace {

SharedStorage storage[kSplit];
constexpr u32 kShared = kShare - 1;              // which of a pair's CTAs each of them is

// Of the CTA at this address, which part it has.
u32 part_at(u32 address) {
    const u32 rank = address >> 24;
    if (rank % kShare != kShared) fail("another pair's CTA", rank, kShare);
    return rank / kShare;
}

float part(int cta, int consumer, int thread, int wave, int i) {         // sums whose order matters
    const int mixed = (((cta * 3 + consumer) * 128 + thread) * 5 + wave) * 191 + i;
    return (cta % 2 ? 1.0f : 1e7f) * static_cast<float>(mixed % 1013 - 506) / 7;
}

using Sums = float[kWaves][kTileN / 2];

// As this thread, with its sums of a part or of one slice of it.
void become(int cta, int consumer, int thread, Sums& sum) {
    for (int w = 0; w < kWaves; ++w)
        for (int i = 0; i < kTileN / 2; ++i) sum[w][i] = part(cta, consumer, thread, w, i);
    rank_in_cluster = cta * kShare + kShared, threadIdx.x = consumer * 128 + thread, shared_begin = &storage[cta];
}

// What each slice leaves for the other one.
void leave_all() {
    Sums sum;
    for (int cta = 0; cta < kSplit; ++cta)
        for (int thread = 0; thread < 128; ++thread) {
            become(cta, 0, thread, sum), leave_sums<0>(storage[cta], sum[0], 0);
            become(cta, 1, thread, sum), leave_sums<1>(storage[cta], sum[0], 0);
        }
}

void exchange(int cta, int consumer, int thread, Sums& sum) {
    become(cta, consumer, thread, sum);
    sent.clear();
    const GemmParams p{};
    const Tile tile{};
    open_exchange(storage[cta], consumer, parts_bytes(consumer));
    waits.clear();
    if (kSlices > 1 && consumer > 0) exchange_parts<1>(p, storage[cta], sum, tile, consumer);
    else exchange_parts<0>(p, storage[cta], sum, tile, consumer);
    if (waits.size() != 1 || waits[0].second != 0) fail("another phase", cta, consumer);
}

// Puts what a thread has sent to its place. Bytes that arrive at each CTA.
void deliver(int consumer, u32 (&arrived)[kSplit]) {
    for (const Sent& s : sent) {
        const u32 to = part_at(s.to), offset = s.to & 0xFFFFFF;
        shared_begin = &storage[to];
        if (s.barrier != remote_address(&storage[to].parts_full[consumer], s.to >> 24)) fail("another barrier", to, consumer);
        float* place = reinterpret_cast<float*>(reinterpret_cast<u8*>(&storage[to]) + offset);
        const bool inside = offset >= offsetof(SharedStorage, parts) && offset < offsetof(SharedStorage, parts_full);
        if (!inside || place[0] == place[0]) fail("not where parts are, or twice", to, offset);
        std::copy(s.v, s.v + 4, place);
        arrived[to] += sizeof s.v;
    }
}

void check(int cta, int consumer, int thread, const Sums& sum) {
    const int before = kSlices > 1 ? consumer * kConsumerGroups * 4 : 0;
    const int first = columns_before(cta, consumer) / 2, count = columns_before(cta + 1, consumer) / 2 - first;
    auto of_cta = [&](int from, int w, int i) {                  // slices are added up first
        return kSlices == 1 ? part(from, consumer, thread, w, i) : part(from, 0, thread, w, i) + part(from, 1, thread, w, i);
    };
    for (int w = 0; w < kWaves; ++w)
        for (int i = 0; i < count; ++i) {
            float total = of_cta(0, w, before + first + i);
            for (int from = 1; from < kSplit; ++from) total += of_cta(from, w, before + first + i);
            if (sum[w][i] != total) fail("another sum", cta, first + i);
        }
}

// The sums' barrier waits for one arrival, the receiver's own, which says how many bytes will come.
void check_arrivals() {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const u32 full = arrivals_wanted(storage[0], &storage[0].parts_full[consumer]);
        if (full != 1) fail("more than one arrival", consumer, full);
    }
}

// Each column of a tile is one share's.
void check_columns() {
    std::vector<int> owners(kTileN);
    for (int slice = 0; slice < kSlices; ++slice)
        for (int part = 0; part < kSplit; ++part)
            for (int i = columns_before(part, slice); i < columns_before(part + 1, slice); ++i)
                ++owners.at(slice * kConsumerN + i);
    for (int column = 0; column < kTileN; ++column)
        if (owners[column] != 1) fail("owners of a column", column, owners[column]);
}

// The parts are all of K in whole turns, as equal as that allows.
void check_shares() {
    GemmParams p{};
    for (p.k = 16; p.k < 90 * kTileK; p.k += 16) {
        const int turns = (blocks_of_k(p) + kTurn - 1) / kTurn;
        if (share_of_k(p, 0) != 0 || share_of_k(p, kSplit) != turns * kTurn) fail("not all of K", p.k, share_of_k(p, kSplit));
        for (int part = 0; part < kSplit; ++part) {
            const int blocks = share_of_k(p, part + 1) - share_of_k(p, part);
            const bool equal = blocks == turns / kSplit * kTurn || blocks == (turns / kSplit + 1) * kTurn;
            if (!equal) fail("a share of K", p.k, blocks);
        }
    }
}

}  // namespace

int main() {
    check_shares();
    check_arrivals();
    check_columns();
    for (SharedStorage& s : storage) std::fill_n(&s.parts[0][0][0].x, sizeof s.parts / sizeof(float), 0.0f / 0.0f);
    if constexpr (kSlices > 1) leave_all();
    Sums sum;
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        u32 arrived[kSplit]{}, expected[kSplit]{};
        for (int cta = 0; cta < kSplit; ++cta)
            for (int thread = 0; thread < 128; ++thread) {
                expects.clear();
                exchange(cta, consumer, thread, sum);
                for (const Expect& e : expects) expected[cta] += e.bytes;
                deliver(consumer, arrived);
            }
        for (int cta = 0; cta < kSplit; ++cta) {
            if (arrived[cta] != expected[cta]) fail("bytes", arrived[cta], expected[cta]);
            for (int thread = 0; thread < kPartThreads; ++thread) {
                exchange(cta, consumer, thread, sum);
                check(cta, consumer, thread, sum);
            }
        }
    }
    printf("ok\n");
}
