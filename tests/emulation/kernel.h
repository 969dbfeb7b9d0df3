// The GEMM kernel on the CPU, and what the programs that run its roles share.
#pragma once
#include "params.h"
#include "ptx.cuh"

#include "gemm.cu"

namespace fp8gemm { u8 shared[1]; }              // of the kernel itself, which is not run

using namespace fp8gemm;

static_assert(kTurn == TURN && kThreads == THREADS, "fp8gemm/plan.py and plan.cuh disagree");

inline void set_tiles(GemmParams& p, int raster, int clusters) {         // of p.m rows and p.n columns
    auto count = [](int size, int tile) { return (size + tile - 1) / tile; };
    set_tiles(p, count(p.m, kTileM * kClusterM), count(p.n, kTileN * kClusterN), raster, clusters);
}

// As each cluster that a dense launch has, its first CTA.
template <class Body>
void for_each_cluster(const GemmParams& p, Body body) {
    const int columns = kOneTile ? p.columns : 1, in_row = kOneTile ? p.tiles / p.columns : p.clusters;
    for (blockIdx.y = 0; blockIdx.y < columns; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < in_row * kCluster; blockIdx.x += kCluster) body();
    blockIdx = {};
}

[[noreturn]] inline void fail(const char* what, int at, int x) {
    printf("%s: %d, %d\n", what, at, x);
    exit(1);
}

// How many arrivals the kernel sets a barrier up for.
inline u32 arrivals_wanted(SharedStorage& s, const u64* barrier) {
    inits.clear();
    for (int warp = 0; warp < kThreads / 32; ++warp)
        if (warp != kLoader) set_up_barriers(s, warp, 1);
    u32 wanted = 0;
    for (const auto& [of, count] : inits)
        if (of == barrier) wanted += count;
    return wanted;
}

// All remote arrivals were at this barrier, in each of these CTAs as many as it waits for.
inline void check_remote_arrivals(SharedStorage& s, const u64* barrier, const std::vector<u32>& ctas) {
    const u32 wanted = arrivals_wanted(s, barrier);
    std::vector<u32> found;
    shared_begin = &s;
    for (u32 address : remote_arrivals) {
        found.push_back(address >> 24);
        if (address != remote_address(barrier, found.back())) fail("arrives elsewhere", found.back(), address);
    }
    shared_begin = nullptr;
    for (u32 cta : ctas) {
        const u32 count = std::erase(found, cta);
        if (count != wanted) fail("arrivals", count, wanted);
    }
    if (!found.empty()) fail("arrives at another CTA", found[0], found.size());
}
