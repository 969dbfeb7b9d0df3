// Shared memory: the ring of stages between producer and consumers, D's way out, and what CTAs that split K send.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

struct alignas(1024) Stage {
    u8 a[kDepth * kTileM * kTileK];
    u8 b[kDepth * kTileN * kTileK];
    float scales[kDepth][kScaleSlots];
    u64 full, empty;
};

struct SharedStorage {
    Stage stages[kStages];
    u16 d[kStaged ? kConsumers : 1][kPanels][kPanelSize];
    float4 parts[kSplit > 1 ? kSplit - 1 : 1][kConsumers][kSplit > 1 ? kWaves * kPart : 1];      // the peers' sums
    u64 parts_full[kConsumers], parts_empty[kConsumers];
};
// With operands swapped, wgmma reads whole waves of B, and so behind the last stage's last tile.
constexpr int kBeyond = kSwapAB ? (kWaves * 64 - kTileN) * kTileK : 0;
#ifdef SMEM_BYTES
static_assert(sizeof(SharedStorage) + kBeyond == SMEM_BYTES, "fp8gemm/plan.py and SharedStorage disagree");
#endif

// The ring position: a stage, and a phase that flips on each wrap. In bytes, so that a step is one addition, to
// addresses and wgmma's operands alike: what a consumer computes between two wgmmas is time that the tensor core loses.
struct Ring {
    u32 offset = 0, phase = 0;
    __device__ Stage& stage(SharedStorage& s) const {
        return *reinterpret_cast<Stage*>(reinterpret_cast<u8*>(s.stages) + offset);
    }
    __device__ void advance() {
        offset += sizeof(Stage);
        if (offset == sizeof(SharedStorage::stages)) { offset = 0; phase ^= 1; }
    }
};

}  // namespace fp8gemm
