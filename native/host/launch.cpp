// Loads kernels, encodes tensor maps, launches.
#include <algorithm>
#include <new>

#include "../kernels/params.h"
#include "dlpack.h"
#include "driver.h"
#include "error.h"

using namespace fp8gemm;

struct fp8gemm_kernel {
    int device_id;
    CUfunction function;
};

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// A (columns, rows, groups) view of a matrix or a stack of them, in swizzled boxes of columns x rows.
int encode_map(const Driver& cu, const fp8gemm_tensor& t, int box_columns, int box_rows, const char* name, TensorMap* map) {
    enum { kUint8 = 0, kUint16 = 1, kSwizzle32 = 1, kSwizzle64 = 2, kSwizzle128 = 3, kPromote256 = 3 };
    const int row = t.ndim - 2, size = t.dtype_bits / 8, bytes = box_columns * size;
    const int swizzle = bytes == 128 ? kSwizzle128 : bytes == 64 ? kSwizzle64 : kSwizzle32;
    const uint64_t row_bytes = t.stride[row] * size;
    const uint64_t dims[] = {static_cast<uint64_t>(t.shape[row + 1]), static_cast<uint64_t>(t.shape[row]),
                             row ? static_cast<uint64_t>(t.shape[0]) : 1};
    const uint64_t strides[] = {row_bytes, row ? static_cast<uint64_t>(t.stride[0]) * size : row_bytes};
    const uint32_t box[] = {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows), 1}, steps[] = {1, 1, 1};
    const CUresult result = cu.cuTensorMapEncodeTiled(map, size == 1 ? kUint8 : kUint16, 3, t.data, dims, strides, box, steps,
                                                      0, swizzle, kPromote256, 0);
    if (!result) return FP8GEMM_OK;
    return fail(FP8GEMM_DRIVER, name, "cuTensorMapEncodeTiled refused (%llu, %llu, %llu) with strides of %llu and %llu bytes "
                "(CUDA error %d)", static_cast<unsigned long long>(dims[0]), static_cast<unsigned long long>(dims[1]),
                static_cast<unsigned long long>(dims[2]), static_cast<unsigned long long>(strides[0]),
                static_cast<unsigned long long>(strides[1]), result);
}

int greatest_common_divisor(int a, int b) { return b ? greatest_common_divisor(b, a % b) : a; }

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
    out.d_by_tma = p.output_by_tma, out.sa_by_bulk = p.scales_by_bulk;
    return out;
}

int launch(const Driver& cu, CUfunction function, unsigned x, unsigned y, unsigned z, int threads, int shared, int cluster,
           void* stream, void* params) {
    enum { kClusterDimension = 4 };
    CUlaunchAttribute attribute{};
    attribute.id = kClusterDimension;
    attribute.cluster = {static_cast<unsigned>(cluster), 1, 1};
    CUlaunchConfig config{x, y, z, static_cast<unsigned>(threads), 1, 1, static_cast<unsigned>(shared),
                          static_cast<CUstream>(stream), &attribute, cluster > 1 ? 1u : 0u};
    void* arguments[] = {params};
    FP8GEMM_CU(cu, cuLaunchKernelEx, &config, function, arguments, nullptr);
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
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    int mode = kRelaxed;                         // another thread may be capturing
    FP8GEMM_CU(*cu, cuThreadExchangeStreamCaptureMode, &mode);
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    CUresult result = cu->cuModuleLoadData(&module, cubin);
    if (!result) result = cu->cuModuleGetFunction(&function, module, name);
    if (!result && shared_bytes) result = cu->cuFuncSetAttribute(function, kMaxDynamicSharedSize, shared_bytes);
    auto* kernel = result ? nullptr : new (std::nothrow) fp8gemm_kernel{device_id, function};
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
    params.raster = plan->raster, params.b_policy = plan->b_policy;
    const int tile_k = 128;                      // a CTA loads its own part of an operand that its cluster shares
    // Rows that TMA fills with zeros cost it more than rows that it reads (M = 1: 27 instead of 13 us): load none.
    params.a_box_rows = std::min(plan->tile_m / plan->cluster_n, round_up(p->m, 8));
    FP8GEMM_TRY(encode_map(*cu, o->a, tile_k, params.a_box_rows, "a", &params.a));
    FP8GEMM_TRY(encode_map(*cu, o->b, tile_k, plan->tile_n / plan->cluster_m, "b", &params.b));
    if (p->output_by_tma)
        FP8GEMM_TRY(encode_map(*cu, o->d, greatest_common_divisor(plan->tile_n, 64), 64, "d", &params.d));
    const int cluster = plan->cluster_m * plan->cluster_n;
    return launch(*cu, kernel->function, plan->num_sms / cluster * cluster, 1, 1, plan->threads, plan->shared_bytes, cluster,
                  stream, &params);
}

int fp8gemm_launch_reference(const fp8gemm_kernel* kernel, const fp8gemm_operands* o, const fp8gemm_problem* p, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    GemmParams params = make_params(*o, *p);
    const int groups = p->kind == FP8GEMM_RAGGED || p->kind == FP8GEMM_MASKED ? p->groups : 1;
    return launch(*cu, kernel->function, ceil_div(p->m, 64), ceil_div(p->n, 64), groups, 256, 0, 1, stream, &params);
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
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    CastParams params{x->data, static_cast<unsigned char*>(q->data), static_cast<float*>(s->data), x->shape[0], x->shape[1],
                      x->stride[0], q->stride[0], s->stride[0], s->stride[1]};
    const int rows = static_cast<int>(x->shape[0]), blocks = ceil_div(static_cast<int>(x->shape[1]), 128);
    return launch(*cu, kernel->function, ceil_div(rows, per_block ? 128 : 8), blocks, 1, 256, 0, 1, stream, &params);
}

int fp8gemm_launch_copy(const fp8gemm_kernel* kernel, const fp8gemm_tensor* x, const fp8gemm_tensor* s, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(kernel->device_id, &cu));
    const int row = x->ndim - 2;
    const bool stack = x->ndim == 3;
    CopyParams params{static_cast<const float*>(x->data), static_cast<float*>(s->data), x->shape[row],
                      x->stride[row], x->stride[row + 1], stack ? x->stride[0] : 0,
                      s->stride[row], s->stride[row + 1], stack ? s->stride[0] : 0};
    return launch(*cu, kernel->function, ceil_div(static_cast<int>(x->shape[row]), 256), static_cast<int>(x->shape[row + 1]),
                  stack ? static_cast<int>(x->shape[0]) : 1, 256, 0, 1, stream, &params);
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
