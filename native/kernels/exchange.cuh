// Consumers and CTAs that share a tile's K add up their sums: slices of a stage's blocks through shared memory, parts of a split
// K through the shared memory of a cluster. Each then has all of K for some of the tile's columns.
#pragma once
#include "cluster.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "storage.cuh"

namespace fp8gemm {

// Where in a tile a consumer's rows begin: slices are of all rows.
__device__ constexpr int first_row_of(int consumer) { return kSlices > 1 ? 0 : consumer * kWaves * 64; }

// Consumers that share a tile's K: each leaves its sums of the other's columns, and once both have, they may be read.
template <int kSlice>
__device__ void leave_sums(SharedStorage& s, const float (&sum)[kTileN / 2], u32 round) {
    constexpr int kOther = kSlice == 0 ? kConsumerGroups : 0;    // the other's first group
    if (round > 0) named_barrier_sync(kSliced, 2 * 128);         // the tile before is added up
#pragma unroll
    for (int g = 0; g < kConsumerGroups; ++g) {
        const float* const v = &sum[(kOther + g) * 4];
        slice_sums(s, kSlice, g)[threadIdx.x % 128] = make_float4(v[0], v[1], v[2], v[3]);
    }
    named_barrier_sync(kSliced, 2 * 128);
}

__device__ float4 add(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// A CTA's sums of a group of this consumer's columns: its own or, of slices, both consumers' together.
template <int kSlice>
__device__ float4 group_sum(SharedStorage& s, const float (&sum)[kTileN / 2], int group) {
    const float* const v = &sum[(group + kSlice * kConsumerGroups) * 4];
    const float4 own = make_float4(v[0], v[1], v[2], v[3]);
    if constexpr (kSlices == 1) return own;
    else return add(own, slice_sums(s, 1 - kSlice, group)[threadIdx.x % 128]);
}

// A consumer's columns before the share of a split's CTA. Shares are whole groups of eight, as equal as that allows: what the first
// consumer's leave unequal, the second's make up for.
__device__ constexpr int columns_before(int part, int consumer) {
    return (kConsumerGroups * part + (kSlices > 1 && consumer > 0 ? kSplit - 1 : 0)) / kSplit * 8;
}

__device__ int share_columns(int part, int consumer) {
    return columns_before(part + 1, consumer) - columns_before(part, consumer);
}

// Whether two elements of D, from there on and in the rows below, may be written at a time.
__device__ bool in_pairs(const GemmParams& p, const u16* d) {
    return (reinterpret_cast<u64>(d) | p.d_row * sizeof(u16)) % sizeof(u32) == 0;
}

// Where a thread's sums go: its first element of D, and how many rows there are from that one on, and columns: of its share or,
// operands swapped, from that element on.
struct Place {
    u16* to;
    int rows, columns;
    bool pairs;                                  // in_pairs

    // Zero, which the assembler does not know. A wait for phase `zero()` of a barrier has address and columns ready before, in the
    // wait's shadow: 60 instructions and a line of constants, which come from memory.
    __device__ u32 zero() const {
        const u64 address = reinterpret_cast<u64>(to);
        return (static_cast<u32>(address) & 1) | static_cast<u32>(address >> 63) | static_cast<u32>(columns + (1 << 30)) >> 31;
    }
};

__device__ Place place_of(const GemmParams& p, const Tile& tile, int part, int consumer) {
    const int row = first_row_of(consumer) + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const int column = tile.column + (kSlices > 1 ? consumer * kConsumerN : 0) + columns_before(part, consumer);
    u16* const to = p.d_data + (tile.row + row) * p.d_row + column + threadIdx.x % 4 * 2;
    const bool pairs = in_pairs(p, to);
    const int rows = threadIdx.x % 128 < kPartThreads ? tile.rows - row : 0;
    return {to, rows, min(p.n - column, share_columns(part, consumer)), pairs};
}

// Where a thread's sums go in each CTA of its cluster that has another part of K, and the barriers that count them there.
struct Peers { u32 sums[kSplit], full[kSplit]; };

__device__ Peers peers_of(SharedStorage& s, int part, int consumer) {
    const u8* const first = reinterpret_cast<const u8*>(&s.parts[0][consumer][threadIdx.x % 128]);
    Peers peers;
#pragma unroll
    for (int to = 0; to < kSplit; ++to) {
        const int place = part - (part > to);                    // nobody has one for its own
        peers.sums[to] = remote_address(first + place * static_cast<int>(sizeof s.parts[0]), rank_of_part(to));
        peers.full[to] = remote_address(&s.parts_full[consumer], rank_of_part(to));
    }
    return peers;
}

// Bytes that a consumer gets from its peers.
__device__ u32 parts_bytes(int consumer) {
    return share_columns(split_rank(), consumer) / 8 * kWaves * (kSplit - 1) * kPartThreads * sizeof(float4);
}

// Says how many bytes a consumer expects of its peers, and waits until they can take its own. Ahead of the multiplying: behind it
// there is nothing to hide this.
__device__ void open_exchange(SharedStorage& s, int consumer, u32 bytes) {
    if (threadIdx.x % 128 == 0) barrier_arrive_expect(&s.parts_full[consumer], bytes);
    if (kShare == 1) cluster_wait();                             // the peers' barriers are set up
}

constexpr int kMost = kColumns / 8;                              // groups of a share: four registers of each thread

template <int kSlice>
__device__ void send_parts(SharedStorage& s, const float (&sum)[kWaves][kTileN / 2], const Peers& peers, int part) {
#pragma unroll
    for (int to = 0; to < kSplit; ++to) {
        if (to == part || threadIdx.x % 128 >= kPartThreads) continue;
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            const int column = columns_before(to, kSlice) + i % kMost * 8;
            if (column >= columns_before(to + 1, kSlice)) continue;
            const float4 v = group_sum<kSlice>(s, sum[i / kMost], column / 8);
            store_async_remote(peers.sums[to] + i * kPartThreads * sizeof v, v, peers.full[to]);
        }
    }
}

// What the peers have sent and a CTA's own sums, in the order of K, to the first registers. `phase` is 0.
template <int kSlice>
__device__ void add_parts(SharedStorage& s, float (&sum)[kWaves][kTileN / 2], int part, int consumer, u32 phase) {
    u64* const full = &s.parts_full[consumer];
    if (kSlices == 1) barrier_wait(full, phase);
#pragma unroll
    for (int at = 0; at < kSplit; ++at) {                        // registers have no run-time index
        if (at != part) continue;
        float4 own[kWaves * kMost];
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            const int column = columns_before(at, kSlice) + i % kMost * 8;
            if (column < columns_before(at + 1, kSlice)) own[i] = group_sum<kSlice>(s, sum[i / kMost], column / 8);
        }
        if (kSlices > 1) barrier_wait(full, phase);              // slices are added up meanwhile
#pragma unroll
        for (int i = 0; i < kWaves * kMost; ++i) {
            if (columns_before(at, kSlice) + i % kMost * 8 >= columns_before(at + 1, kSlice)) continue;
            float* const out = &sum[i / kMost][i % kMost * 4];
            float4 total;
#pragma unroll
            for (int from = 0; from < kSplit; ++from) {
                const int thread = threadIdx.x % 128 % kPartThreads;
                const float4 v = from == at ? own[i] : s.parts[from - (from > at)][consumer][i * kPartThreads + thread];
                total = from ? add(total, v) : v;
            }
            out[0] = total.x, out[1] = total.y, out[2] = total.z, out[3] = total.w;
        }
    }
}

// The CTAs that share a tile's K: each gets the others' sums of its own columns. Once a CTA has them, nobody needs it any more: it
// may end. No instruction stands between the last wgmma and the sending, nor behind the receiving, that could stand elsewhere.
template <int kSlice>
__device__ Place exchange_parts(const GemmParams& p, SharedStorage& s, float (&sum)[kWaves][kTileN / 2], const Tile& tile,
                                int consumer) {
    const int part = split_rank();
    const Peers peers = peers_of(s, part, consumer);
    if constexpr (kSlices > 1) leave_sums<kSlice>(s, sum[0], 0);
    send_parts<kSlice>(s, sum, peers, part);
    const Place place = place_of(p, tile, part, consumer);
    add_parts<kSlice>(s, sum, part, consumer, place.zero());
    return place;
}

// Slices of a K that is not split: the sums of a consumer's own columns, in its first registers.
template <int kSlice>
__device__ void add_slices(SharedStorage& s, float (&sum)[kTileN / 2], u32 round) {
    leave_sums<kSlice>(s, sum, round);
#pragma unroll
    for (int g = 0; g < kConsumerGroups; ++g) {
        const float4 v = group_sum<kSlice>(s, sum, g);
        sum[g * 4] = v.x, sum[g * 4 + 1] = v.y, sum[g * 4 + 2] = v.z, sum[g * 4 + 3] = v.w;
    }
}

}  // namespace fp8gemm
