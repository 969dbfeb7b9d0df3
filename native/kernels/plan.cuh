// The compiled half of a plan, from the macros that the compiler passes, and what follows from it.
#pragma once
#include "params.h"

#ifndef TILE_M                                                   // for editors; a build always names a plan
#define TILE_M 128
#define TILE_N 128
#define STAGES 5
#define CLUSTER_M 1
#define CLUSTER_N 2
#define DEPTH 1
#define SPLIT 1
#define SLICES 1
#define SWAP_AB 0
#define ONE_TILE 0
#define KIND 0
#endif

// Where the compiler knows the size of a cluster, its CTAs need not read it: 0.7% of the time of a split at few rows.
#if CLUSTER_M * CLUSTER_N * SPLIT > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER_M * CLUSTER_N * SPLIT, 1, 1)
#else
#define IN_CLUSTERS
#endif

namespace fp8gemm {

constexpr int kKind = KIND;
constexpr int kTileM = TILE_M, kTileN = TILE_N;
constexpr int kTileK = 128;                                      // bytes, e4m3 elements: a scale block, a swizzled row
constexpr int kStages = STAGES;
constexpr int kClusterM = CLUSTER_M, kClusterN = CLUSTER_N;      // CTAs that share a B tile, an A tile
constexpr int kSplit = SPLIT;                                    // CTAs of a cluster that share the K of one tile
// Whether a cluster has one tile, which the grid names. Nothing is divided to find it then, no loop's state is set up, and the
// first load comes 30 to 45 instructions sooner; they come from memory.
constexpr bool kOneTile = ONE_TILE;
constexpr int kShare = kClusterM * kClusterN, kCluster = kShare * kSplit;
constexpr int kDepth = DEPTH;                                    // blocks of K in a stage
constexpr int kSlices = SLICES;                                  // consumers that share a stage's blocks, one each
constexpr bool kSwapAB = SWAP_AB;                                // wgmma's rows are B's (swapped.cuh)
constexpr int kFewRows = 128;                                    // of A, up to which B is asked for ahead: gemm.cu

constexpr int kConsumers = kTileM <= 64 ? kSlices : kTileM == 192 ? 3 : 2;       // math warpgroups
constexpr int kWaves = kSwapAB ? (kTileN + 63) / 64              // 64-row blocks of each, one after another
                     : kTileM <= 64 ? 1 : kTileM / 64 / kConsumers;
constexpr int kThreads = 128 * (kConsumers + 1), kLoader = kConsumers * 4;      // the warp that loads A and B

// A consumer's turn: blocks of K that it multiplies at a time, 64 rows and a block an item. Where registers allow two
// partial sums at a time, one's promotion hides behind the next one's wgmma.
constexpr bool kTwoPartials = !kSwapAB && kConsumers <= 2 && kTileN * (kWaves + 2) + 32 * kWaves <= 416;
constexpr int kTurn = kTwoPartials && kWaves == 1 && kDepth == 1 ? 2 : kDepth;
constexpr int kItems = kWaves * kTurn / kSlices, kStageItems = kWaves * kDepth / kSlices;
constexpr int kPartials = kTwoPartials && kItems > 1 ? 2 : 1;
// Whether a tile's first turn is code of its own, which finds no sums to add to, and in the shadow of whose wgmma the next
// tile is looked up: 1.5% less time in the mean at K = 512, nothing at 7168. Deep and split plans wait for memory, and
// would take 0.4% longer by the additional code.
constexpr bool kFirstApart = !kSwapAB && kDepth == 1 && kSplit == 1;
// The loop over K with two turns in it: 0.4% less time in the mean. Two partial sums gain nothing; most of their turns are two
// blocks.
constexpr bool kTwiceUnrolled = kFirstApart && !kTwoPartials;
// Whether consumers issue an item's wgmmas one after another. Three do, for 1.1% less time in the mean; two would gain nothing.
constexpr bool kInTurn = kConsumers == 3;
// Whether consumers take registers over from the producer. Where sums are few all do with equal shares, and the loading warp, which
// would give some up first, is at its first load 230 cycles sooner.
constexpr bool kMoveRegisters = kConsumers > 1 && !(kTwoPartials && kTileN * (kWaves + 2) <= 256);
// Registers of a thread, 504 for two consumers and the producer together. Tiles of deep stages have few sums, but many
// scales to copy.
constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : kDepth > 1 ? 224 : 232;
constexpr int kProducerRegisters = kConsumers == 3 || kDepth > 1 ? 56 : 40;
// Whether warps that copy scales compute their addresses ahead of the barriers, and copy as soon as the first load is
// issued: before the weights of later stages. Few (operands swapped) are 0.2 us better off computed after the barriers.
constexpr bool kScalesAhead = !kSwapAB;
constexpr int kScaleThreads = 96;                                // of the producer
// Whether a CTA's work is brief: a fourth of K, few columns. It is behind from its first turn to its last, so what stands before the
// first counts. Its scales are asked for ahead of its operands, by warps that leave the barriers to the consumers. And these
// rehearse: multiply once for nothing, with whatever shared memory holds, while the first stage is on its way; then the turn's
// code is at hand, not in memory. 64 x 32 takes up to 5% less time, most with row-major scales. Other tiles would take 1 to 3% more:
// tensor cores are at work sooner, and the clock falls sooner (inferred).
constexpr bool kBrief = kOneTile && kDepth > 1 && !kSwapAB && kSplit == 4 && kTileM * kTileN <= 64 * 32;
constexpr bool kBulkScales = kDepth == 1 && kTileM >= 64;        // A's may come by bulk copies: few and large enough

constexpr int greatest_common_divisor(int a, int b) { return b ? greatest_common_divisor(b, a % b) : a; }
constexpr int kSegment = greatest_common_divisor(kTileN, 128);   // columns that surely share one B scale
constexpr int kSegments = kTileN / kSegment;
// Whether a tile's last turn, too, is code of its own: D's way out is waited for in the shadow of its wgmmas, and the store
// promotes what is left. Another 1.2% in the mean at K = 512. Not where a turn is two blocks (7% slower), nor where scales would
// take too many registers.
constexpr bool kLastApart = kFirstApart && kTileM >= 64 && kTurn == 1 && kSegments <= 7;
// A stage's scales, those of its blocks side by side: of A's rows, then B's of each segment: consumers need not ask where in a
// tile B's next scale begins.
constexpr int kScalesOfB = kTileM + 4, kScaleSlots = kScalesOfB + (kSegments + 3) / 4 * 4;
// Columns of a tile that are a consumer's in the end (of two slices, half of them), and of these the ones that it stores: of a split
// the largest share, whole groups of eight (exchange.cuh); swapped, all are equal.
constexpr int kConsumerN = kTileN / kSlices, kConsumerGroups = kConsumerN / 8;       // groups of eight columns
constexpr int kColumns = kSwapAB ? kTileN / kSplit : (kConsumerGroups + kSplit - 1) / kSplit * 8;
constexpr int kPartThreads = kTileM < 64 ? kTileM * 2 : 128;     // of a consumer, that hold rows of the tile
constexpr int kPart = kSwapAB ? 16 / kSplit * kTileM             // float4 that they send to each peer, of 64 rows
                              : kPartThreads * kColumns / 8;
constexpr int kPanel = panel_columns(kColumns);
constexpr int kPanels = kColumns / kPanel;
constexpr bool kSwizzled = kPanel % 32 == 0;                     // see panel_columns
// D's way out: through shared memory, from there by TMA while the next tile is multiplied, or, where a CTA has few tiles (deep
// stages), by each warp as soon as it has its rows; else straight from registers.
constexpr bool kStaged = kTileM >= 64 && kSplit == 1, kStoredByTma = kStaged && kDepth == 1;
constexpr int kPanelSize = (kStaged ? kWaves * 64 : 1) * kPanel;

struct Yes { static constexpr bool value = true; };              // for generic lambdas, as std::true_type is: no headers here
struct No { static constexpr bool value = false; };

static_assert(kSwapAB || kTileM == 32 || kTileM == 64 || kTileM == 128 || kTileM == 192 || kTileM == 256, "see kWaves");
static_assert(kTileN % (kSwapAB ? 8 : 16) == 0, "see wgmma.cuh, stage_wave");
static_assert(kTileN <= 192, "registers hold no more");
static_assert(kTileM <= 128 || kTileN <= 128, "the sums of a 256 x 192 tile do not fit in registers");
static_assert(kShare <= 2 && kCluster <= 4, "wider clusters reach fewer SMs");
static_assert(!kSwapAB || (kTileM % 8 == 0 && kTileM <= 32 && kShare == 1 && kSplit != 3), "see swapped.cuh");
static_assert(!kSwapAB || kKind != kContiguous, "a tile of a few rows would count more of its segment");
static_assert(kSwapAB || kTileN >= 8 * kSplit, "a CTA stores whole registers of wgmma");
static_assert(kSlices == 1 || (kTileM == 64 && kDepth == kSlices), "a slice is a block of each stage");
static_assert(!kStaged || kConsumerN % 16 == 0, "see stage_wave");
static_assert(kSwapAB || kDepth == 1 || (kWaves == 1 && kDepth % kShare == 0), "deep stages come by whole blocks");
static_assert(!kBulkScales || kScalesAhead, "beside bulk copies, warps that copy scales wait for the first load");
static_assert(kSwapAB || kDepth == 1 || kTwoPartials, "a deep stage is multiplied in one turn");
static_assert(kKind != kContiguous || kTileM <= 128, "segments are aligned to 128 rows only");
static_assert(!kOneTile || kKind == kDense, "of groups nobody knows on the host how many tiles there are");
static_assert(kOneTile || kSplit == 1, "the sums of a split K are exchanged once");
static_assert(kKind == kDense || kConsumers <= 2, "three consumers have no registers to look for groups");

}  // namespace fp8gemm
