// A CTA's place in its cluster: those that share operands stand side by side, and each such pair has one part of a split K.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

__device__ int share_rank() { return kShare == 1 ? 0 : kSplit == 1 ? cluster_rank() : cluster_rank() % kShare; }
__device__ int split_rank() { return kSplit > 1 ? cluster_rank() / kShare : 0; }
// The CTA that has another part of K of this one's tile.
__device__ int rank_of_part(int part) { return part * kShare + share_rank(); }

}  // namespace fp8gemm
