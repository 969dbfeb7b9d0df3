// Loads kernels, encodes tensor maps, launches.
#include <algorithm>
#include <cinttypes>
#include <cstddef>
#include <new>

#include "../kernels/params.h"
#include "dlpack.h"
#include "driver.h"
#include "error.h"

using namespace fp8gemm;

struct fp8gemm_kernel {
    int device_id;
    CUfunction function;
    float memory_bytes_per_cycle;                                // of an SM
};

namespace {

// A CTA asks for more than half of an SM's 228 KB, so that no SM takes two. In a graph it would: the next kernel's CTAs come
// as SMs fall free, and two would share one while others have none (seven GEMMs of 16 rows 82 instead of 75 us).
constexpr int kLeastShared = 116 << 10;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// What a tensor map shows of a matrix or a stack of them, in four dimensions: columns, rows, blocks of columns (one of all
// columns or, blocked, as wide as the box), stack. And in which boxes: swizzled if their rows are 128 or 64 bytes.
struct Box {
    int columns, rows;
    bool blocked = false;
    int blocks = 1;
};

int encode_map(const Driver& cu, const fp8gemm_tensor& t, const Box& b, const char* name, TensorMap* map) {
    // L2 asks memory for 128 bytes at a time. With 256 a stream of weights takes up to 7% longer (native/README.md).
    enum { kUint8 = 0, kUint16 = 1, kNoSwizzle = 0, kSwizzle64 = 2, kSwizzle128 = 3, kPromote128 = 2 };
    const int row = t.ndim - 2, size = t.dtype_bits / 8, bytes = b.columns * size;
    const int swizzle = bytes == 128 ? kSwizzle128 : bytes == 64 ? kSwizzle64 : kNoSwizzle;
    const uint64_t columns = t.shape[row + 1], rows = t.shape[row], row_bytes = t.stride[row] * size;
    const uint64_t groups = row ? t.shape[0] : 1, group_bytes = row ? t.stride[0] * size : row_bytes;
    const uint64_t dims[] = {b.blocked ? b.columns : columns, rows, b.blocked ? columns / b.columns : 1, groups};
    const uint64_t strides[] = {row_bytes, b.blocked ? bytes : row_bytes, group_bytes};
    const uint32_t box[] = {static_cast<uint32_t>(b.columns), static_cast<uint32_t>(b.rows), static_cast<uint32_t>(b.blocks), 1};
    const uint32_t steps[] = {1, 1, 1, 1};
    const CUresult result = cu.cuTensorMapEncodeTiled(map, size == 1 ? kUint8 : kUint16, 4, t.data, dims, strides, box, steps, 0,
                                                      swizzle, kPromote128, 0);
    if (!result) return FP8GEMM_OK;
    return fail(FP8GEMM_DRIVER, name, "cuTensorMapEncodeTiled refused (%llu, %llu, %llu) with strides of %llu and %llu bytes "
                "(CUDA error %d)", static_cast<unsigned long long>(columns), static_cast<unsigned long long>(rows),
                static_cast<unsigned long long>(groups), static_cast<unsigned long long>(row_bytes),
                static_cast<unsigned long long>(group_bytes), result);
}

static_assert(offsetof(GemmParams, a) == 64, "what the first load needs is one line");

// Everything but the maps and the plan.
GemmParams make_params(const fp8gemm_operands& o, const fp8gemm_problem& p) {
    GemmParams out{};
    auto row = [](const fp8gemm_tensor& t) { return t.stride[t.ndim - 2]; };
    auto group = [](const fp8gemm_tensor& t) { return t.ndim == 3 ? t.stride[0] : 0; };
    out.a_data = static_cast<const unsigned char*>(o.a.data), out.a_row = row(o.a), out.a_group = group(o.a);
    out.b_data = static_cast<const unsigned char*>(o.b.data), out.b_row = row(o.b), out.b_group = group(o.b);
    out.d_data = static_cast<unsigned short*>(o.d.data), out.d_row = row(o.d), out.d_group = group(o.d);
    out.sa = static_cast<const float*>(o.sa.data);
    out.sa_row = row(o.sa), out.sa_k = o.sa.stride[o.sa.ndim - 1], out.sa_group = group(o.sa);
    out.sb = static_cast<const float*>(o.sb.data);
    out.sb_row = row(o.sb), out.sb_k = o.sb.stride[o.sb.ndim - 1], out.sb_group = group(o.sb);
    out.layout = p.kind == FP8GEMM_DENSE ? nullptr : static_cast<const int*>(o.layout.data);
    out.m = p.m, out.n = p.n, out.k = p.k, out.groups = p.groups;
    out.d_staged = p.output_by_tma, out.sa_by_bulk = p.scales_by_bulk;
    return out;
}

// Whether `depth` scales from a multiple of `depth` on, along K, lie in one piece, aligned to its size.
bool in_pieces(const float* scales, int64_t row, int64_t k, int64_t group, int depth) {
    return k == 1 && row % depth == 0 && group % depth == 0 && reinterpret_cast<uintptr_t>(scales) % (depth * sizeof(float)) == 0;
}

// Cycles from one of a CTA's first stages to the next. Asked for all at once, they are a queue at the memory in which what is
// wanted first stands behind what is wanted last. So: half of what memory takes to bring a stage of B to all CTAs, A's bytes over
// shared memory's width, and a little more (native/README.md, "The pace of the first stages"); but no faster than 70 bytes a cycle,
// what an SM takes in through its port ("Slices, a longer ring, spinning copies").
unsigned short pace_of(const fp8gemm_plan& plan, int ctas, int a_rows, float memory_bytes_per_cycle) {
    if (plan.depth == 1) return 0;
    constexpr float kSharedBytesPerCycle = 128, kTakenInPerCycle = 70, kMore = 100;
    const float row_bytes = 128.0f * plan.depth, a = row_bytes * a_rows, b = row_bytes * plan.tile_n;
    const float cycles = 0.5f * b / plan.cluster_m * ctas / memory_bytes_per_cycle + a / kSharedBytesPerCycle + kMore;
    return static_cast<unsigned short>(std::min(std::max(cycles, (a + b) / kTakenInPerCycle), 4000.0f));
}

// A launch in clusters of CTAs along x, which may be set up while the kernel before it still runs: a kernel that says so
// (`early`) waits by itself before it touches memory.
struct Launch {
    CUlaunchAttribute attributes[2] = {};
    CUlaunchConfig config;

    Launch(int x, int y, int z, int threads, int shared, int cluster, bool early, void* stream) {
        enum { kClusterDimension = 4, kProgrammaticStreamSerialization = 6 };
        attributes[0].id = kClusterDimension;
        attributes[0].cluster = {static_cast<unsigned>(cluster), 1, 1};
        attributes[1].id = kProgrammaticStreamSerialization;
        attributes[1].programmatic = 1;
        config = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z), static_cast<unsigned>(threads), 1, 1,
                  static_cast<unsigned>(shared), static_cast<CUstream>(stream), attributes, early ? 2u : cluster > 1 ? 1u : 0u};
    }
};

// A grid's second and third extent end at 65535: blocks of `unit` along a dimension of an operand.
int check_extent(const char* name, const char* dimension, int64_t size, int64_t unit) {
    constexpr int64_t kMostBlocks = 65535;
    if (size <= kMostBlocks * unit) return FP8GEMM_OK;
    return fail(FP8GEMM_SHAPE, name, "%s = %" PRId64 "; this kernel takes at most %" PRId64, dimension, size, kMostBlocks * unit);
}

int launch(const Driver& cu, CUfunction function, const Launch& l, void* params) {
    void* arguments[] = {params};
    FP8GEMM_CU(cu, cuLaunchKernelEx, &l.config, function, arguments, nullptr);
    return FP8GEMM_OK;
}

}  // namespace

int fp8gemm_require_no_capture(int device_id, void* stream) {
    if (!stream) return FP8GEMM_OK;
    int capturing = 0;
    FP8GEMM_TRY(fp8gemm_stream_capturing(device_id, stream, &capturing));
    if (!capturing) return FP8GEMM_OK;
    return fail(FP8GEMM_NOT_PREPARED, "", "the kernel of this call is not loaded, and a stream capture is open; use "
                "fp8gemm.prepare(), or make the call once, before the capture");
}

int fp8gemm_kernel_load(int device_id, const void* cubin, size_t, const char* name, int shared_bytes, fp8gemm_kernel** out) {
    enum { kMaxDynamicSharedSize = 8 };
    enum { kInvalidImage = 200, kNoBinaryForGpu = 209, kUnsupportedPtx = 222 };
    fp8gemm_device device;
    FP8GEMM_TRY(fp8gemm_device_read(device_id, &device));
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    int mode = kRelaxed;                         // another thread may be capturing
    FP8GEMM_CU(*cu, cuThreadExchangeStreamCaptureMode, &mode);
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    CUresult result = cu->cuModuleLoadData(&module, cubin);
    if (!result) result = cu->cuModuleGetFunction(&function, module, name);
    if (!result && shared_bytes)
        result = cu->cuFuncSetAttribute(function, kMaxDynamicSharedSize, std::max(shared_bytes, kLeastShared));
    constexpr float kUsualRate = 2400;           // an H200's, where the driver does not tell
    const bool known = device.memory_bandwidth > 0 && device.clock_khz > 0;
    const float rate = known ? static_cast<float>(device.memory_bandwidth / (1e3 * device.clock_khz)) : kUsualRate;
    auto* kernel = result ? nullptr : new (std::nothrow) fp8gemm_kernel{device_id, function, rate};
    if (module && !kernel) cu->cuModuleUnload(module);
    cu->cuThreadExchangeStreamCaptureMode(&mode);
    if (result == kInvalidImage || result == kNoBinaryForGpu || result == kUnsupportedPtx) {
        int version = 0;
        cu->cuDriverGetVersion(&version);
        return fail(FP8GEMM_UNAVAILABLE, "", "the driver (CUDA %d.%d) does not take the compiled kernel (error %d); it may be "
                    "older than the compiler, or the GPU is not a Hopper", version / 1000, version % 1000 / 10, result);
    }
    if (result) return driver_failure(*cu, result, "loading a kernel");
    if (!kernel) return fail(FP8GEMM_ARGUMENT, "", "no host memory");
    *out = kernel;
    return FP8GEMM_OK;
}

int fp8gemm_launch_gemm(const fp8gemm_kernel* kernel, const fp8gemm_operands* o, const fp8gemm_problem* p,
                        const fp8gemm_plan* plan, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    GemmParams params = make_params(*o, *p);
    params.b_policy = plan->b_policy;
    const int tile_k = 128;
    const bool deep = plan->depth > 1;
    if (deep && p->k % tile_k)
        return fail(FP8GEMM_ARGUMENT, "", "a plan of depth %d, K = %d; its boxes hold whole blocks of %d", plan->depth, p->k,
                    tile_k);
    params.d_staged &= plan->tile_m >= 64 && plan->split == 1;   // else from registers
    // A CTA loads its own part of an operand that its cluster shares: some rows, or some blocks of a deep stage. Rows that
    // TMA fills with zeros cost it more than rows that it reads (M = 1: 27 instead of 13 us): load none.
    Box a{tile_k, std::min(plan->tile_m / (deep ? 1 : plan->cluster_n), round_up(p->m, 8)), deep};
    Box b{tile_k, plan->tile_n / (deep ? 1 : plan->cluster_m), deep};
    if (deep) a.blocks = plan->depth / plan->cluster_n, b.blocks = plan->depth / plan->cluster_m;
    params.a_box_rows = a.rows;
    FP8GEMM_TRY(encode_map(*cu, o->a, a, "a", &params.a));
    FP8GEMM_TRY(encode_map(*cu, o->b, b, "b", &params.b));
    if (params.d_staged && !deep) {              // by TMA; of deep stages each warp stores its rows
        const int panel = panel_columns(plan->tile_n), consumers = plan->threads / 128 - 1;
        params.d_blocked = p->n % panel == 0;
        const Box d{panel, plan->tile_m / consumers, params.d_blocked != 0, params.d_blocked ? plan->tile_n / panel : 1};
        FP8GEMM_TRY(encode_map(*cu, o->d, d, "d", &params.d));
    }
    const int columns = ceil_div(p->n, plan->tile_n * plan->cluster_n), rows = ceil_div(p->m, plan->tile_m * plan->cluster_m);
    const bool searches = p->kind == FP8GEMM_RAGGED || p->kind == FP8GEMM_MASKED;      // for groups: rows are not known here
    const int cluster = plan->cluster_m * plan->cluster_n * plan->split;
    const int shared = std::max(plan->shared_bytes, kLeastShared);
    int clusters = plan->num_sms / cluster;
    if (p->kind == FP8GEMM_DENSE)                // more would find no tile
        clusters = static_cast<int>(std::min<int64_t>(clusters, int64_t{rows} * columns));
    set_tiles(params, rows, columns, searches ? plan->raster : std::min(plan->raster, rows), clusters);
    if (deep && p->k % (tile_k * plan->depth) == 0) {
        params.sa_in_pieces = in_pieces(params.sa, params.sa_row, params.sa_k, params.sa_group, plan->depth);
        params.sb_in_pieces = in_pieces(params.sb, params.sb_row, params.sb_k, params.sb_group, plan->depth);
    }
    params.pace = pace_of(*plan, clusters * cluster, a.rows, kernel->memory_bytes_per_cycle);
    // Of one tile a cluster, the grid says which (plan.cuh). fp8gemm/cost.py sees to it that there are SMs for all.
    const bool one = plan->one_tile;
    const Launch all((one ? rows : clusters) * cluster, one ? columns : 1, 1, plan->threads, shared, cluster, true, stream);
    return launch(*cu, kernel->function, all, &params);
}

int fp8gemm_launch_reference(const fp8gemm_kernel* kernel, const fp8gemm_operands* o, const fp8gemm_problem* p, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    GemmParams params = make_params(*o, *p);
    const int groups = p->kind == FP8GEMM_RAGGED || p->kind == FP8GEMM_MASKED ? p->groups : 1;
    FP8GEMM_TRY(check_extent("b", "N", p->n, 64));
    FP8GEMM_TRY(check_extent("b", "G", groups, 1));
    const Launch all(ceil_div(p->m, 64), ceil_div(p->n, 64), groups, 256, 0, 1, false, stream);
    return launch(*cu, kernel->function, all, &params);
}

int fp8gemm_run(const fp8gemm_entry* entry, const fp8gemm_operands* o, const fp8gemm_problem* p, void* stream) {
    if (p->m == 0) return FP8GEMM_OK;
    if (entry->key.device_type == dlpack::kCPU) return fp8gemm_cpu_gemm(o, p, &entry->cpu_plan);
    if (entry->key.reference) return fp8gemm_launch_reference(entry->kernel, o, p, stream);
    return fp8gemm_launch_gemm(entry->kernel, o, p, &entry->plan, stream);
}

int fp8gemm_launch_cast(const fp8gemm_kernel* kernel, int per_block, const fp8gemm_tensor* x, const fp8gemm_tensor* q,
                        const fp8gemm_tensor* s, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(check_extent("x", "K", x->shape[1], 128));
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    CastParams params{x->data, static_cast<unsigned char*>(q->data), static_cast<float*>(s->data), x->shape[0], x->shape[1],
                      x->stride[0], q->stride[0], s->stride[0], s->stride[1]};
    const int rows = static_cast<int>(x->shape[0]), blocks = ceil_div(static_cast<int>(x->shape[1]), 128);
    const Launch all(ceil_div(rows, per_block ? 128 : 8), blocks, 1, 256, 0, 1, false, stream);
    return launch(*cu, kernel->function, all, &params);
}

int fp8gemm_launch_copy(const fp8gemm_kernel* kernel, const fp8gemm_tensor* x, const fp8gemm_tensor* s, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    const int row = x->ndim - 2;
    const bool stack = x->ndim == 3;
    FP8GEMM_TRY(check_extent("x", "columns", x->shape[row + 1], 1));
    FP8GEMM_TRY(check_extent("x", "G", stack ? x->shape[0] : 1, 1));
    CopyParams params{static_cast<const float*>(x->data), static_cast<float*>(s->data), x->shape[row],
                      x->stride[row], x->stride[row + 1], stack ? x->stride[0] : 0,
                      s->stride[row], s->stride[row + 1], stack ? s->stride[0] : 0};
    const int groups = stack ? static_cast<int>(x->shape[0]) : 1, columns = static_cast<int>(x->shape[row + 1]);
    const Launch all(ceil_div(static_cast<int>(x->shape[row]), 256), columns, groups, 256, 0, 1, false, stream);
    return launch(*cu, kernel->function, all, &params);
}

int fp8gemm_copy_to_host(int device_id, void* stream, const void* from, size_t bytes, void* to) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    int capturing = 0;
    FP8GEMM_CU(*cu, cuStreamIsCapturing, static_cast<CUstream>(stream), &capturing);
    if (capturing) return fail(FP8GEMM_NOT_PREPARED, "", "validate=True waits for the stream, which is being captured");
    FP8GEMM_CU(*cu, cuStreamSynchronize, static_cast<CUstream>(stream));
    FP8GEMM_CU(*cu, cuMemcpyDtoH_v2, to, reinterpret_cast<CUdeviceptr>(from), bytes);
    return FP8GEMM_OK;
}
