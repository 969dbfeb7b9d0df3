// The compiled half of a plan, from the macros that the compiler passes, and what follows from it.
#pragma once
#include "params.h"

#ifndef TILE_M                                                   // for editors; a build always names a plan
#define TILE_M 128
#define TILE_N 128
#define STAGES 5
#define CLUSTER_M 1
#define CLUSTER_N 2
#define KIND 0
#endif

namespace fp8gemm {

constexpr int kKind = KIND;
constexpr int kTileM = TILE_M, kTileN = TILE_N;
constexpr int kTileK = 128;                                      // bytes, e4m3 elements: a scale block, a swizzled row
constexpr int kStages = STAGES;
constexpr int kClusterM = CLUSTER_M, kClusterN = CLUSTER_N, kCluster = kClusterM * kClusterN;

constexpr int kConsumers = kTileM == 64 ? 1 : 2;                 // math warpgroups
constexpr int kWaves = kTileM / (64 * kConsumers);               // 64-row wgmma blocks of a consumer, one after another
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kScaleThreads = 96;                                // of the producer
constexpr int kScales = kTileM + 2;                              // a stage's: of A, one a row; of B, at most two
constexpr int kScaleSlots = kTileM + 4;                          // bulk copies write at multiples of 16 bytes

constexpr int greatest_common_divisor(int a, int b) { return b ? greatest_common_divisor(b, a % b) : a; }
constexpr int kSegment = greatest_common_divisor(kTileN, 128);   // columns that surely share one B scale
constexpr int kSegments = kTileN / kSegment;
constexpr int kPanel = greatest_common_divisor(kTileN, 64);      // columns of D stored together, swizzled
constexpr int kPanels = kTileN / kPanel;

static_assert(kTileM == 64 || kTileM == 128 || kTileM == 256, "64 rows a wgmma, one or two waves of two consumers");
static_assert(kTileN % 16 == 0 && kTileN <= 192 && kTileN != 176, "at most two B scales a tile");
static_assert(kTileM <= 128 || kTileN <= 128, "the sums of a 256 x 192 tile do not fit in registers");
static_assert(kCluster <= 2, "wider clusters do not reach every SM");
static_assert(kKind != kContiguous || kTileM <= 128, "segments are aligned to 128 rows only");

}  // namespace fp8gemm
