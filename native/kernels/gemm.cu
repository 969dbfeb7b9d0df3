// The FP8 GEMM with fine-grained scales for Hopper (sm_90a), dense and grouped:
//
//     D[m, n] = sum over 128-wide blocks kb of K:  sa[m, kb] * sb[n / 128, kb] * (A[m, kb] . B[n, kb])
//
// A persistent, warp-specialised kernel. Each CTA walks over output tiles (scheduler.cuh). Its warps have two roles:
//
//   producer   one warpgroup: a warp streams A, B and, where it can, A's scales into a ring of stages; others bring the rest
//              (scales.cuh)
//   consumers  one to three warpgroups: wgmma on the tensor cores, promotion by FP32 FMAs, epilogue
//
// A stage holds one or more blocks (128) of K of a tile: A, B and their scales. Two barriers guard it: `full` (all has landed)
// and `empty` (every consumer that reads it, in every CTA that shares it, is done). The tensor core keeps about 14 bits of a
// sum, so a partial sum lives there for one block only; FP32 registers hold the rest (two-level accumulation).
// Where tiles are few, the CTAs of a cluster share a tile's K, and each adds up their sums of some columns, in order. So do a
// CTA's two consumers where one alone would be as slow as memory: a stage's blocks are their slices.
//
// The plan comes in as macros (plan.cuh); shapes, strides and scale layouts are run-time parameters (params.h).
#include "cluster.cuh"
#include "epilogue.cuh"
#include "exchange.cuh"
#include "params.h"
#include "plan.cuh"
#include "ptx.cuh"
#include "scales.cuh"
#include "scheduler.cuh"
#include "storage.cuh"
#include "swapped.cuh"
#include "wgmma.cuh"

namespace fp8gemm {

// ---- producer: A and B ---------------------------------------------------------------------------------------------
// Where a box begins, from a block of K on: params.h.
__device__ BoxStart box_from(int block, int row, int group) {
    return kDepth > 1 ? BoxStart{0, row, block, group} : BoxStart{block * kTileK, row, 0, group};
}

// In a cluster each CTA loads for both half of the operand that both need: of its rows or, in a deep stage, of its blocks.
__device__ void load_operands(const GemmParams& p, SharedStorage& s, int first_block, int last_block) {
    constexpr u64 kEvictNormal = 0x1000000000000000;
    constexpr bool kShareA = kClusterN > 1, kShareB = kClusterM > 1, kDeep = kDepth > 1;
    constexpr int kBlocksA = kShareA && kDeep ? kDepth / 2 : kDepth, kBlocksB = kShareB && kDeep ? kDepth / 2 : kDepth;
    constexpr int kRowsB = kShareB && !kDeep ? kTileN / 2 : kTileN;
    const int rank = share_rank();
    const u32 pair = 3u << split_rank() * kShare;                // the CTAs that share, by their ranks
    const int a_row = kShareA && !kDeep ? rank * kTileM / 2 : 0, b_row = kShareB && !kDeep ? rank * kRowsB : 0;
    const int a_block = kShareA && kDeep ? rank * kBlocksA : 0, b_block = kShareB && kDeep ? rank * kBlocksB : 0;
    const int operand_bytes = (p.a_box_rows * (kDeep ? 1 : kClusterN) + kTileN) * kTileK * kDepth;
    bool ready = false, loading = false;
    u32 begun = 0, ahead = 0;                                    // when B was first asked for; how many stages are
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        const int group_a = kKind == kMasked ? tile.group : 0;
        const u32 tile_scale_bytes = scales_by_bulk(p) ? scale_rows(p, tile).bulk * sizeof(float) : 0;
        const float* sa = p.sa + group_a * p.sa_group + scale_rows(p, tile).first + first_block * p.sa_k;
        if (!ready) {                                            // all before it needs neither them
            begun = kDeep ? cycles() : 0;
            if (kKind == kDense && p.m <= kFewRows && elect_one())               // for B's first stage, in L2
                tma_prefetch(p.b, box_from(first_block + b_block, tile.column + b_row, 0));
            __syncwarp();
            wait_for_barriers(), ready = true;
        }
        dependency_wait();                                       // nor (dense) what earlier kernels write
        for (int kb = first_block; kb < last_block; kb += kDepth, ring.advance(), sa += p.sa_k) {
            Stage& stage = ring.stage(s);
            barrier_wait(&stage.empty, ring.phase ^ 1);
            if (elect_one()) {
                u64* full = &stage.full;
                const u32 scale_bytes = kTurn == kDepth || kb < blocks_of_k(p) ? tile_scale_bytes : 0;
                u8 *const a = stage.a + a_row * kTileK, *const b = stage.b;
                barrier_arrive_expect(full, operand_bytes + scale_bytes);
                if (!kDeep && scale_bytes) bulk_load(stage.scales, sa, scale_bytes, full);
                if (kShareB && !tile.alone) {                    // B first: of a decode stage it is most
                    const BoxStart at = box_from(kb + b_block, tile.column + b_row, tile.group);
                    tma_load<true>(b + (b_block * kTileN + b_row) * kTileK, p.b, at, full, p.b_policy, pair);
                } else {
                    for (int j = 0; j < kDepth; j += kBlocksB)
                        for (int n = 0; n < kTileN; n += kRowsB) {
                            const BoxStart at = box_from(kb + j, tile.column + n, tile.group);
                            tma_load<false>(b + (j * kTileN + n) * kTileK, p.b, at, full, p.b_policy, pair);
                        }
                }
                const BoxStart at = box_from(kb + a_block, tile.row + a_row, group_a);
                tma_load<kShareA>(a + a_block * p.a_box_rows * kTileK, p.a, at, full, kEvictNormal, pair);
            }
            __syncwarp();
            if (!loading) named_barrier_arrive(kLoading, kThreads), loading = true;
            if (kDeep && ++ahead < kStages)                      // as memory brings them: params.h
                while (cycles() - begun < ahead * p.pace) {}
        }
        if (kOneTile) break;                                     // the compiler need not find out: plan.cuh
    }
    if (!ready) wait_for_barriers();
    if (!loading) named_barrier_arrive(kLoading, kThreads);      // a share of K may be empty
    // Where a peer arrives at our barriers, we stay until it has done so for the last time.
    if constexpr (kShare > 1)
        for (int i = 0; i < kStages; ++i, ring.advance()) barrier_wait(&ring.stage(s).empty, ring.phase ^ 1);
}

// ---- consumer ------------------------------------------------------------------------------------------------------
__device__ void multiply(const GemmParams& p, SharedStorage& s, int first_block, int last_block, int consumer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int first_row = first_row_of(consumer), blocks = blocks_of_k(p);
    const int slice = kSlices > 1 ? consumer * kStageItems : 0;  // a stage's block that this consumer begins with
    const u32 a_block = p.a_box_rows * (kTileK / 16);            // from one block of a deep stage to the next
    const u32 a_first = keep_uniform(wgmma_address(s.stages[0].a + first_row * kTileK) + slice * a_block);
    const u32 b_first = keep_uniform(wgmma_address(s.stages[0].b + slice * kTileN * kTileK));
    const u32 empty_first = keep(empty_of_first(s));
    const u32 sb_first = keep(shared_address(&s.stages[0].scales[kScalesOfB][slice]));
    u32 rounds = 0;
    if (kInTurn && consumer == kConsumers - 1) yield_tensor_core(consumer);      // to the first
    Ring ring;
    Scheduler tiles(p);
    // Where a tile's first turn is apart, it asks for the next tile; else the loop's head does. Once a tile, either way.
    Tile tile, next;
    bool more = kFirstApart && tiles.next(next);
    while (kFirstApart ? more : tiles.next(next)) {
        tile = next;

        // Nothing of ours here: keep the ring going. The vote tells the assembler that the warp agrees; it then keeps
        // the ring's position in uniform registers, where wgmma wants its descriptors (without, grouped: 9% slower).
        if (__any_sync(0xffffffff, tile.rows <= first_row)) {
            for (int kb = first_block; kb < last_block; kb += kDepth, ring.advance()) {
                barrier_wait(&ring.stage(s).full, ring.phase);
                if (kInTurn) take_tensor_core(consumer), yield_tensor_core(consumer);
                release(empty_first + ring.offset);
            }
            if (kOneTile) break;
            more = kFirstApart && tiles.next(next);
            continue;
        }

        if (kSplit > 1) open_exchange(s, consumer, parts_bytes(consumer));
        float sum[kWaves][kTileN / 2] = {};
        const int scale_row = first_row + warp * 16 % kTileM + lane / 4 + scale_rows(p, tile).lead;
        const u32 sa_first = keep(shared_address(&s.stages[0].scales[scale_row][slice]));
        u32 a_stage = a_first + ring.offset / 16, b_stage = b_first + ring.offset / 16;
        int kb = first_block;
        bool landed = false;                                     // the next stage
        Unpromoted rest;
        // The first finds no sums, the last leaves some to the store; after a rehearsal the stage is still to come.
        auto turn = [&](auto first, auto last, u32 rehearsal = 0) {
            float scale_a[kItems][2], scale_b[kTurn][kSegments], partial[kPartials][kTileN / 2];
            auto promote = [&](int item) {
                const int w = kTurn > 1 ? 0 : item, j = kTurn > 1 ? item : 0;
                const bool late = last.value && item == kItems - 1;
                if (kDepth == 1 && j > 0 && kb + j >= blocks) return;            // deep stages: zeros there, and no branch
                float scale[kSegments][2];
#pragma unroll
                for (int i = 0; i < kSegments; ++i)
                    for (int half = 0; half < 2; ++half)
                        (late ? rest.scale : scale)[i][half] = scale_a[item][half] * scale_b[j][i];
#pragma unroll
                for (int i = 0; i < kTileN / 2; ++i)
                    if (late) rest.partial[i] = partial[item % kPartials][i];
                    else sum[w][i] = scale[i * 2 / kSegment][i / 2 % 2] * partial[item % kPartials][i] +
                                     (first.value && j == 0 ? 0 : sum[w][i]);
            };
            u32 used = 0, used_before = 0;                       // `empty` of the last two stages
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                const int w = kTurn > 1 ? 0 : item, j = kTurn > 1 ? item % kStageItems : 0;
                if (item % kStageItems == 0) {                   // the first of a stage
                    if (item > 0) barrier_wait(&ring.stage(s).full, ring.phase);
#pragma unroll
                    for (int i = 0; i < kStageItems; ++i) {
                        const int wave = kDepth > 1 ? 0 : i, block = kDepth > 1 ? i : 0;
                        const u32 sa = sa_first + ring.offset, sb = sb_first + ring.offset;
                        scale_a[item + i][0] = load_shared(sa, wave * 64 * kDepth + block);
                        scale_a[item + i][1] = load_shared(sa, (wave * 64 + 8) * kDepth + block);
                        if (wave > 0) continue;
#pragma unroll
                        for (int g = 0; g < kSegments; ++g)
                            scale_b[(item + i) % kTurn][g] = load_shared(sb, g * kDepth + block);
                    }
                }
                const u32 a = a_stage + w * 64 * (kTileK / 16) + j * a_block, b = b_stage + j * kTileN * (kTileK / 16);
                if (kInTurn) take_tensor_core(consumer);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kTileK / 32; ++k)
                    Wgmma<kTileN>::mma(partial[item % kPartials], wgmma_operand(a + 2 * k), wgmma_operand(b + 2 * k),
                                       k > 0);
                wgmma_commit();
                if (kInTurn) yield_tensor_core(consumer);
                if (first.value && item == 0) more = tiles.next(next);
                if (item % kStageItems == kStageItems - 1) {     // the last
                    used_before = used, used = empty_first + ring.offset;
                    const bool wraps = ring.advance();           // from ring.offset they would be computed in the loop's head
                    a_stage = wraps ? a_first : a_stage + sizeof(Stage) / 16;
                    b_stage = wraps ? b_first : b_stage + sizeof(Stage) / 16;
                }
                const int done = item - (kPartials - 1);
                if (done < 0 || done == kItems - 1) continue;
                wgmma_wait<kPartials - 1>();
                if (kTurn > kDepth) release(used_before);
                promote(done);
            }
            if (last.value) wait_for_staging(consumer);
            wgmma_wait<0>();
            if (!rehearsal) release(used);                       // before the promotion: neither side need wait for it
            landed = barrier_test(&ring.stage(s).full, ring.phase);
            promote(kItems - 1);
            kb += kTurn;
        };
        if constexpr (kFirstApart) {
            auto await = [&] { if (!landed) barrier_wait(&ring.stage(s).full, ring.phase); };
            await(), turn(Yes{}, No{});                          // there is one: K = 0 is the reference kernel's
            const int end = kLastApart ? last_block - kTurn : last_block;
            if (kb < end) await();
            for (; kb < end; await()) {
                turn(No{}, No{});
                if (kb >= end) break;                            // here, not above: one branch a turn is taken, not two
                if (!kTwiceUnrolled) continue;
                await(), turn(No{}, No{});
                if (kb >= end) break;
            }
            if (kLastApart && kb < last_block) await(), turn(No{}, Yes{});
            else if (kLastApart) wait_for_staging(consumer), rest = {};          // the first was the last
        } else {
            u32 rehearsal = kBrief ? keep(first_block < last_block) : 0;         // kept: it must be the same code
            if (rehearsal) kb = last_block - kTurn;              // one turn: a wgmma's warps must agree how many there are
            for (;;) {
                while (kb < last_block) {                        // the sums are zeroed ahead of the first wait so, not behind it
                    if (!rehearsal) barrier_wait(&ring.stage(s).full, ring.phase);
                    do turn(No{}, No{}, rehearsal);
                    while (landed && kb < last_block);           // one branch
                }
                if (!rehearsal) break;
                rehearsal = 0, kb = first_block, ring = Ring(), a_stage = a_first, b_stage = b_first;
#pragma unroll
                for (int i = 0; i < kTileN / 2; ++i) sum[0][i] = 0;
            }
        }
        finish_tile(p, s, sum, rest, tile, consumer, rounds);
        if (kOneTile) break;
    }
    if (kStoredByTma && threadIdx.x % 128 == 0 && p.d_staged) tma_store_wait();
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(kThreads, 1) fp8gemm_gemm(const __grid_constant__ GemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    SharedStorage& s = *reinterpret_cast<SharedStorage*>(shared);
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), warpgroup = warp / 4;
    const int part = split_rank();                               // of K
    if (kMoveRegisters && warpgroup == kConsumers) registers_decrease<kProducerRegisters>();
    if (laid_first(warp == kLoader)) {           // all code up to the first load in one piece: it comes from memory
        if (elect_one()) prefetch_map(p.a), prefetch_map(p.b);
        announce_barriers();
        return load_operands(p, s, share_of_k(p, part), share_of_k(p, part + 1));
    }
    set_up_barriers(s, warp, 1 + scale_arrivals(p));
    announce_barriers();
    const int first = share_of_k(p, part), last = share_of_k(p, part + 1);
    if (warpgroup < kConsumers) {
        wait_for_barriers();
        dependents_launch();
        if constexpr (kMoveRegisters) registers_increase<kConsumerRegisters>();
        wait_for_first_load();
        if constexpr (kSwapAB) multiply_swapped(p, s, first, last);
        else multiply(p, s, first, last, warpgroup);
    } else {
        if (!kScalesAhead) wait_for_barriers(), named_barrier_arrive(kLoading, kThreads);
        else if (kShare == 1) named_barrier_arrive(kReady, kThreads);
        if (!scales_by_bulk(p)) load_scales(p, s, first, last);
        else if (warp == kLoader + 1) load_other_scales(p, s, first, last);
        else wait_for_first_load();
    }
}

}  // namespace fp8gemm
