// The GEMM kernel on the CPU, and what the programs that run its roles share.
#pragma once
#include "params.h"
#include "ptx.cuh"

#include "gemm.cu"

namespace fp8gemm { u8 shared[1]; }              // of the kernel itself, which is not run

using namespace fp8gemm;

static_assert(kTurn == TURN && kThreads == THREADS, "fp8gemm/plan.py and plan.cuh disagree");

inline void set_raster(GemmParams& p, int raster) {              // of p.n columns
    set_raster(p, raster, (p.n + kTileN * kClusterN - 1) / (kTileN * kClusterN));
}

[[noreturn]] inline void fail(const char* what, int at, int x) {
    printf("%s: %d, %d\n", what, at, x);
    exit(1);
}
