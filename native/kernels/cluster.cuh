// A CTA's place in its cluster, and so its share of K: those that share operands stand side by side, and each such pair has one
// part of a split K.
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

__device__ int share_rank() { return kShare == 1 ? 0 : kSplit == 1 ? cluster_rank() : cluster_rank() % kShare; }
__device__ int split_rank() { return kSplit > 1 ? cluster_rank() / kShare : 0; }
// The CTA that has another part of K of this one's tile.
__device__ int rank_of_part(int part) { return part * kShare + share_rank(); }

// Blocks of K. Turns are whole: what lies behind K counts as zeros.
__device__ int blocks_of_k(const GemmParams& p) { return (p.k + kTileK - 1) / kTileK; }
// Where the share of a split's CTA begins, in whole turns.
__device__ int share_of_k(const GemmParams& p, int part) { return (blocks_of_k(p) + kTurn - 1u) / kTurn * part / kSplit * kTurn; }

}  // namespace fp8gemm
