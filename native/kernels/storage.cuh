// Shared memory: the ring of stages between producer and consumers and its barriers, D's way out, and the sums that CTAs and
// consumers which share a tile's K send one another.
#pragma once
#include "cluster.cuh"
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

struct alignas(1024) Stage {
    u8 a[kDepth * kTileM * kTileK];
    u8 b[kDepth * kTileN * kTileK];
    float scales[kScaleSlots][kDepth];
    u64 full, empty;
};

struct SharedStorage {
    Stage stages[kStages];
    u16 d[kStaged ? kConsumers : 1][kPanels][kPanelSize];
    float4 parts[kSplit > 1 ? kSplit - 1 : 1][kConsumers][kSplit > 1 ? kWaves * kPart : 1];      // the peers' sums
    float4 slices[kSlices][kSlices > 1 && !kOneTile ? kConsumerGroups * 128 : 1];        // see slice_sums
    u64 parts_full[kConsumers];
};

// Where a consumer leaves its sums of eight columns for the one that has the other slices. With one tile a CTA that is in its own
// blocks of B, a group a stage: nothing more is loaded, the other consumer never reads them, and this one has read all of them (a
// wgmma-group that is complete is so for all of its warpgroup). So the ring may be longer.
__device__ float4* slice_sums(SharedStorage& s, int consumer, int group) {
    if (!kOneTile) return &s.slices[consumer][group * 128];
    return reinterpret_cast<float4*>(s.stages[group % kStages].b + consumer * kTileN * kTileK) + group / kStages * 128;
}
static_assert(kSlices == 1 || !kOneTile || (kConsumerGroups + kStages - 1) / kStages * 128 * sizeof(float4) <= kTileN * kTileK,
              "a consumer's block of B holds its groups of a stage");

// With operands swapped, wgmma reads whole waves of B, and so behind the last stage's last tile.
constexpr int kBeyond = kSwapAB ? (kWaves * 64 - kTileN) * kTileK : 0;
#ifdef SMEM_BYTES
static_assert(sizeof(SharedStorage) + kBeyond == SMEM_BYTES, "fp8gemm/plan.py and SharedStorage disagree");
#endif

// The barriers of a stage or a consumer each, by all warps at a time but the one that loads, which goes ahead to its code, or by
// the consumers' alone.
__device__ void set_up_barriers(SharedStorage& s, int warp, int arrivals) {
    constexpr int kWarps = kBrief ? kLoader : kThreads / 32 - 1;
    if (kBrief && warp >= kLoader) return;
    if (!elect_one()) return;
#pragma unroll 1
    for (int i = warp - (warp > kLoader); i < kStages; i += kWarps) {
        barrier_init(&s.stages[i].full, arrivals);
        barrier_init(&s.stages[i].empty, kConsumers * 4 * kShare);
    }
    if (kSplit > 1 && warp < kConsumers) barrier_init(&s.parts_full[warp], 1);
    fence_barrier_init();
}

// Named barriers, beside 1 to 3 of the consumers. In kReady and kLoading every warp counts once, by waiting or in passing. Where
// CTAs share stages, the cluster's barrier takes the place of kReady. kTensorCore and the next ones: of each consumer and the
// one before it, for each block of K. kSliced: of the two that add up their slices.
constexpr int kReady = 0, kLoading = 4, kTensorCore = 5, kSliced = 8;

// By every warp, once it has done its part of them. Of groups, it then waits for earlier kernels.
__device__ void announce_barriers() {
    __syncwarp();
    if (kCluster > 1) cluster_arrive();
    if (kKind != kDense) dependency_wait();      // group sizes come from memory; nothing before has read it
}

// Until all barriers are set up, and those of CTAs that share stages. (Peers that only split K meet ahead of the multiplying.)
__device__ void wait_for_barriers() {
    if constexpr (kShare > 1) cluster_wait();
    else named_barrier_sync(kReady, kThreads);
}

// Until the first load is issued. Its warp then need not share the fetching of its code.
__device__ void wait_for_first_load() { named_barrier_sync(kLoading, kThreads); }

// Consumers that issue wgmmas one after another: until it is this one's turn; then it is the next one's.
__device__ void take_tensor_core(int consumer) { named_barrier_sync(kTensorCore + consumer, 2 * 128); }
__device__ void yield_tensor_core(int consumer) {
    named_barrier_arrive(kTensorCore + (consumer + 1) % kConsumers, 2 * 128);
}

// The ring position: a stage, and a phase that flips on each wrap. In bytes, so that a step is one addition, to
// addresses and wgmma's operands alike: what a consumer computes between two wgmmas is time that the tensor core loses.
struct Ring {
    u32 offset = 0, phase = 0;
    __device__ Stage& stage(SharedStorage& s) const {
        return *reinterpret_cast<Stage*>(reinterpret_cast<u8*>(s.stages) + offset);
    }
    __device__ bool advance() {                  // whether it is the first stage's turn again
        offset += sizeof(Stage);
        const bool wraps = offset == sizeof(SharedStorage::stages);
        if (wraps) { offset = 0; phase ^= 1; }
        return wraps;
    }
};

// `empty` of the first stage, of CTA l of those that share it in lane l.
__device__ u32 empty_of_first(SharedStorage& s) {
    u64* const empty = &s.stages[0].empty;
    return kShare > 1 ? remote_address(empty, split_rank() * kShare + threadIdx.x % 32 % kShare) : shared_address(empty);
}

// Gives a stage back to every producer that fills it: one arrival a warp, in each CTA that shares it.
__device__ void release(u32 empty) {
    const int lane = threadIdx.x % 32;
    if constexpr (kShare == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else if (lane < kShare) {
        barrier_arrive_remote(empty);
    }
}

}  // namespace fp8gemm
