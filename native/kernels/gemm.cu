// The FP8 GEMM with fine-grained scales for Hopper (sm_90a), dense and grouped:
//
//     D[m, n] = sum over 128-wide blocks kb of K:  sa[m, kb] * sb[n / 128, kb] * (A[m, kb] . B[n, kb])
//
// A persistent, warp-specialised kernel. Each CTA walks over output tiles (scheduler.cuh). Its warps have two roles:
//
//   producer   one warpgroup: warp 0 streams A and B by TMA into a ring of stages, and scales where it can; the other
//              warps bring the rest of the scales
//   consumers  one or two warpgroups: wgmma on the tensor cores, promotion by FP32 FMAs, epilogue
//
// A stage holds 128 of K of a tile: A, B and their scales. Two barriers guard it: `full` (everything has landed) and
// `empty` (every consumer that reads it, in every CTA that shares it, is done). The tensor core keeps about 14 bits
// of a sum, so a partial sum lives there for one stage only; FP32 registers hold the rest (two-level accumulation).
//
// The plan comes in as macros (plan.cuh); shapes, strides and scale layouts are run-time parameters (params.h).
#include "params.h"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "wgmma.cuh"

namespace fp8gemm {

struct alignas(1024) SharedStorage {
    u8 a[kStages][kTileM * kTileK];
    u8 b[kStages][kTileN * kTileK];
    u16 d[kConsumers][kWaves][kPanels][64 * kPanel];
    float scales[kStages][kScaleSlots];
    u64 full[kStages], empty[kStages];
};
#ifdef SMEM_BYTES
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "fp8gemm/plan.py and SharedStorage disagree");
#endif

// The ring position: stage 0 .. kStages-1, and a phase that flips on each wrap.
struct Ring {
    int stage = 0;
    u32 phase = 0;
    __device__ void advance() { if (++stage == kStages) { stage = 0; phase ^= 1; } }
};

// ---- producer: A and B ---------------------------------------------------------------------------------------------
// In a cluster the operand that both CTAs need is loaded half by half, each half multicast to both.
__device__ void load_operands(const GemmParams& p, SharedStorage& s, int k_blocks) {
    constexpr bool kShareA = kClusterN > 1, kShareB = kClusterM > 1;
    constexpr int kRowsA = kShareA ? kTileM / 2 : kTileM, kRowsB = kShareB ? kTileN / 2 : kTileN;
    constexpr u64 kEvictNormal = 0x1000000000000000;
    const int rank = kCluster > 1 ? cluster_rank() : 0;
    const int part_a = kShareA ? rank * kRowsA : 0, part_b = kShareB ? rank * kRowsB : 0;
    const int operand_bytes = (p.a_box_rows * kClusterN + kTileN) * kTileK;
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        const int group_a = kKind == kMasked ? tile.group : 0;
        const u32 scale_bytes = p.sa_by_bulk ? min(max(p.m - tile.row, 0), kTileM) * sizeof(float) : 0;
        const float* sa = p.sa + group_a * p.sa_group + tile.row;
        for (int kb = 0; kb < k_blocks; ++kb, ring.advance(), sa += p.sa_k) {
            barrier_wait(&s.empty[ring.stage], ring.phase ^ 1);
            if (elect_one()) {
                u64* full = &s.full[ring.stage];
                u8 *a = s.a[ring.stage] + part_a * kTileK, *b = s.b[ring.stage] + part_b * kTileK;
                const int k = kb * kTileK;
                barrier_arrive_expect(full, operand_bytes + scale_bytes);
                if (scale_bytes) bulk_load(s.scales[ring.stage], sa, scale_bytes, full);
                if constexpr (kShareA)
                    tma_load_multicast(a, p.a, k, tile.row + part_a, group_a, full, kEvictNormal, 3);
                else
                    tma_load(a, p.a, k, tile.row, group_a, full, kEvictNormal);
                if (kShareB && !tile.alone) {
                    tma_load_multicast(b, p.b, k, tile.column + part_b, tile.group, full, p.b_policy, 3);
                } else {
                    for (int n = 0; n < kTileN; n += kRowsB)
                        tma_load(s.b[ring.stage] + n * kTileK, p.b, k, tile.column + n, tile.group, full, p.b_policy);
                }
            }
            __syncwarp();
        }
    }
}

// ---- producer: scales ----------------------------------------------------------------------------------------------
// Bulk copies bring A's scales where rows are fastest in memory. The rest, B's one or two and A's in any other layout,
// come by four-byte copies, so that no layout needs a transposing pass.
__device__ int first_copied_scale(const GemmParams& p) { return p.sa_by_bulk ? kTileM : 0; }
// Whole warps, though B's scales need two threads: two alone in their warp made short K 8% slower.
__device__ int scale_threads(const GemmParams& p) { return p.sa_by_bulk ? 32 : kScaleThreads; }

__device__ void load_scales(const GemmParams& p, SharedStorage& s, int k_blocks) {
    constexpr int kCopies = (kScales + kScaleThreads - 1) / kScaleThreads;
    const int thread = threadIdx.x % 128 - 32, first = first_copied_scale(p) + thread;
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        const float* from[kCopies];
        bool valid[kCopies];
        for (int c = 0; c < kCopies; ++c) {
            const int i = first + c * kScaleThreads;
            if (i < kTileM) {
                valid[c] = i < tile.rows;
                from[c] = p.sa + (kKind == kMasked ? tile.group * p.sa_group : 0) + (tile.row + i) * p.sa_row;
            } else {
                const int block = tile.column / 128 + i - kTileM;
                valid[c] = i < kScales && block * 128 < p.n;
                from[c] = p.sb + tile.group * p.sb_group + block * p.sb_row;
            }
            if (!valid[c]) from[c] = p.sa;       // zeros are copied, but the address must be a good one
        }
        for (int kb = 0; kb < k_blocks; ++kb, ring.advance()) {
            barrier_wait(&s.empty[ring.stage], ring.phase ^ 1);
            for (int c = 0; c < kCopies; ++c) {
                const int i = first + c * kScaleThreads;
                if (i < kScales) copy_async_4(&s.scales[ring.stage][i], from[c], valid[c]);
                if (valid[c]) from[c] += i < kTileM ? p.sa_k : p.sb_k;
            }
            copy_async_arrive(&s.full[ring.stage]);
        }
    }
}

// ---- consumer: epilogue --------------------------------------------------------------------------------------------
// Position of (row, column) in a panel of D: 16-byte chunks, swizzled as TMA expects for rows of kPanel columns.
__device__ u32 panel_offset(int row, int column) {
    const u32 offset = (row * kPanel + column) * sizeof(u16);
    return offset ^ ((offset >> 3) & (kPanel * sizeof(u16) - 16));
}

// 64 rows of sums, as wgmma leaves them, to bf16 in shared memory.
__device__ void stage_wave(u16 (&panels)[kPanels][64 * kPanel], const float (&sum)[kTileN / 2]) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kTileN / 16; ++j) {      // 16 x 16 a warp: lane l addresses row l % 16, columns l / 16 * 8 ...
        const int panel = j * 16 / kPanel, column = j * 16 % kPanel + lane / 16 * 8;
        const float* v = &sum[j * 8];
        store_matrix_x4(shared_address(panels[panel]) + panel_offset(row, column), pack_bf16(v[0], v[1]),
                        pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}

// What TMA can't store: strides off 16 bytes, and a group's tail, below which another group's rows begin.
__device__ void copy_wave(const GemmParams& p, const u16 (&panels)[kPanels][64 * kPanel], u16* d, int rows,
                          int columns) {
    constexpr int kChunks = kTileN / 8;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < rows * kChunks; i += 128) {
        const int row = i / kChunks, column = i % kChunks * 8;
        const u8* from = reinterpret_cast<const u8*>(panels[column / kPanel]) + panel_offset(row, column % kPanel);
        u16* to = d + row * p.d_row + column;
        if (p.d_by_tma && column + 8 <= columns) {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll 1
            for (int e = 0; e < min(8, columns - column); ++e) to[e] = reinterpret_cast<const u16*>(from)[e];
        }
    }
}

// ---- consumer ------------------------------------------------------------------------------------------------------
// Gives a stage back to every producer that fills it: one arrival a warp, in each CTA of the cluster.
__device__ void release(u64* empty) {
    const int lane = threadIdx.x % 32;
    if constexpr (kCluster == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else if (lane < kCluster) {
        barrier_arrive_remote(empty, lane);
    }
}

__device__ void multiply(const GemmParams& p, SharedStorage& s, int k_blocks, int consumer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = threadIdx.x % 128 == 0;
    const int first_row = consumer * kWaves * 64;
    const u32 a_first = wgmma_address(s.a[0] + first_row * kTileK), b_first = wgmma_address(s.b[0]);
    const float* scales_first = s.scales[0] + first_row + warp * 16 + lane / 4;
    Ring ring;
    Scheduler tiles(p);
    for (Tile tile; tiles.next(tile);) {
        // Nothing of ours here: keep the ring going. The vote tells the assembler that the warp agrees; it then keeps
        // the ring's position in uniform registers, where wgmma wants its descriptors (without, grouped: 9% slower).
        if (__any_sync(0xffffffff, tile.rows <= first_row)) {
            for (int kb = 0; kb < k_blocks; ++kb, ring.advance()) {
                barrier_wait(&s.full[ring.stage], ring.phase);
                release(&s.empty[ring.stage]);
            }
            continue;
        }

        float sum[kWaves][kTileN / 2] = {};
        const int b_split = 128 - tile.column % 128;             // columns of the tile before its second B scale
        bool landed = false;
        for (int kb = 0; kb < k_blocks; ++kb) {
            const int stage = ring.stage;
            if (!landed) barrier_wait(&s.full[stage], ring.phase);
            const float *sa = scales_first + stage * kScaleSlots, *sb = s.scales[stage] + kTileM;
            const float scale_b[] = {sb[0], sb[kSegments > 1]};
            float scale_a[kWaves][2];
#pragma unroll
            for (int w = 0; w < kWaves; ++w) scale_a[w][0] = sa[w * 64], scale_a[w][1] = sa[w * 64 + 8];
#pragma unroll
            for (int w = 0; w < kWaves; ++w) {
                float partial[kTileN / 2];
                const u32 a = a_first + (stage * kTileM + w * 64) * (kTileK / 16);
                const u32 b = b_first + stage * kTileN * (kTileK / 16);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kTileK / 32; ++k)
                    Wgmma<kTileN>::mma(partial, wgmma_operand(a + 2 * k), wgmma_operand(b + 2 * k), k > 0);
                wgmma_commit();
                if (w == kWaves - 1) ring.advance();
                wgmma_wait<0>();
                float scale[kSegments][2];
#pragma unroll
                for (int i = 0; i < kSegments; ++i)
                    for (int half = 0; half < 2; ++half)
                        scale[i][half] = scale_a[w][half] * (i * kSegment < b_split ? scale_b[0] : scale_b[1]);
                if (w == kWaves - 1) {                           // before the promotion: neither side need wait for it
                    release(&s.empty[stage]);
                    landed = barrier_test(&s.full[ring.stage], ring.phase);
                }
#pragma unroll
                for (int i = 0; i < kTileN / 2; ++i) sum[w][i] += scale[i * 2 / kSegment][i / 2 % 2] * partial[i];
            }
        }

        if (leader) tma_store_wait_read();                       // the last tile's store has left the buffer
        named_barrier_sync(1 + consumer, 128);
#pragma unroll
        for (int w = 0; w < kWaves; ++w) stage_wave(s.d[consumer][w], sum[w]);
        fence_async_proxy();
        named_barrier_sync(1 + consumer, 128);
#pragma unroll
        for (int w = 0; w < kWaves; ++w) {
            const int first = first_row + w * 64, rows = min(tile.rows - first, 64), columns = p.n - tile.column;
            const int row = tile.row + first, group = kKind == kMasked ? tile.group : 0;
            if (p.d_by_tma && (rows == 64 || kKind == kDense)) {         // dense: TMA clips at D's edges by itself
                if (leader && rows > 0)
                    for (int i = 0; i < kPanels && i * kPanel < columns; ++i)
                        tma_store(p.d, s.d[consumer][w][i], tile.column + i * kPanel, row, group);
            } else {
                u16* d = p.d_data + group * p.d_group + row * p.d_row + tile.column;
                copy_wave(p, s.d[consumer][w], d, rows, columns);
            }
        }
        if (leader) tma_store_commit();
    }
    if (leader) tma_store_wait();
}

// ---- the kernel ----------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(kThreads, 1) fp8gemm_gemm(const __grid_constant__ GemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    SharedStorage& s = *reinterpret_cast<SharedStorage*>(shared);
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), warpgroup = warp / 4;

    if (threadIdx.x == 0) {
        prefetch_map(p.a), prefetch_map(p.b);
        if (p.d_by_tma) prefetch_map(p.d);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&s.full[i], 1 + scale_threads(p));
            barrier_init(&s.empty[i], kConsumers * 4 * kCluster);
        }
        fence_barrier_init();
    }
    if constexpr (kCluster > 1) cluster_sync_barriers();
    else __syncthreads();

    const int k_blocks = (p.k + kTileK - 1) / kTileK;
    if (warpgroup == kConsumers) {
        if constexpr (kConsumers == 2) registers_decrease<40>();
        if (warp % 4 == 0) load_operands(p, s, k_blocks);
        else if ((warp % 4 - 1) * 32 < scale_threads(p)) load_scales(p, s, k_blocks);
    } else {
        if constexpr (kConsumers == 2) registers_increase<232>();
        multiply(p, s, k_blocks, warpgroup);
    }
    if constexpr (kCluster > 1) cluster_sync();  // a peer may still write here or arrive at these barriers
}

}  // namespace fp8gemm
