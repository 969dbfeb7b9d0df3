// The CPU backend's entry points: groups as the GPU's scheduler reads them, each a dense GEMM (cpu_gemm.cpp).
#include "cpu.h"

#include <algorithm>

#include "dlpack.h"
#include "error.h"

using namespace fp8gemm;

namespace {

// One dense GEMM: rows [first, first + rows) of group `ga` of A and D, times group `gb` of B.
void run(const fp8gemm_operands& o, const fp8gemm_problem& p, const fp8gemm_cpu_plan& plan, int64_t ga, int64_t gb,
         int64_t first, int64_t rows) {
    auto at = [](const fp8gemm_tensor& t, int64_t group, int64_t row) {
        return (t.ndim == 3 ? group * t.stride[0] : 0) + row * t.stride[t.ndim - 2];
    };
    auto row = [](const fp8gemm_tensor& t) { return t.stride[t.ndim - 2]; };
    CpuGemm gemm{};
    gemm.m = rows, gemm.n = p.n, gemm.k = p.k;
    gemm.a = static_cast<const uint8_t*>(o.a.data) + at(o.a, ga, first), gemm.a_row = row(o.a);
    gemm.b = static_cast<const uint8_t*>(o.b.data) + at(o.b, gb, 0), gemm.b_row = row(o.b);
    gemm.sa = static_cast<const float*>(o.sa.data) + at(o.sa, ga, first);
    gemm.sa_row = row(o.sa), gemm.sa_k = o.sa.stride[o.sa.ndim - 1];
    gemm.sb = static_cast<const float*>(o.sb.data) + at(o.sb, gb, 0);
    gemm.sb_row = row(o.sb), gemm.sb_k = o.sb.stride[o.sb.ndim - 1];
    gemm.d = static_cast<uint16_t*>(o.d.data) + at(o.d, ga, first), gemm.d_row = row(o.d);
    gemm.threads = plan.threads, gemm.tile_n = plan.tile_n;
    cpu_gemm(gemm);
}

}  // namespace

int fp8gemm_cpu_gemm(const fp8gemm_operands* o, const fp8gemm_problem* p, const fp8gemm_cpu_plan* plan) {
    const auto* layout = static_cast<const int32_t*>(o->layout.data);
    switch (p->kind) {
    case FP8GEMM_DENSE:
        run(*o, *p, *plan, 0, 0, 0, p->m);
        break;
    case FP8GEMM_CONTIGUOUS:                     // runs of one index
        for (int64_t first = 0, last; first < p->m; first = last) {
            for (last = first; last < p->m && layout[last] == layout[first]; ++last) {}
            if (layout[first] >= 0 && layout[first] < p->groups) run(*o, *p, *plan, 0, layout[first], first, last - first);
        }
        break;
    case FP8GEMM_RAGGED:
        for (int64_t g = 0; g < p->groups; ++g) {
            const int32_t first = g ? std::clamp(layout[g - 1], 0, p->m) : 0, last = std::clamp(layout[g], 0, p->m);
            if (last > first) run(*o, *p, *plan, 0, g, first, last - first);
        }
        break;
    case FP8GEMM_MASKED:
        for (int64_t g = 0; g < p->groups; ++g) run(*o, *p, *plan, g, g, 0, std::clamp(layout[g], 0, p->m));
        break;
    default:
        return fail(FP8GEMM_ARGUMENT, "kind", "%d, known are 0 to 3", p->kind);
    }
    return FP8GEMM_OK;
}

int fp8gemm_cpu_cast(int per_block, const fp8gemm_tensor* x, const fp8gemm_tensor* q, const fp8gemm_tensor* s, int threads) {
    const FloatType type = x->dtype_bits == 32 ? FloatType::f32 : x->dtype_code == dlpack::kFloat ? FloatType::f16 : FloatType::bf16;
    auto* cast = per_block ? cpu_cast_per_block : cpu_cast_per_token;
    cast(x->shape[0], x->shape[1], type, x->data, x->stride[0], static_cast<uint8_t*>(q->data), q->stride[0],
         static_cast<float*>(s->data), s->stride[0], s->stride[1], threads);
    return FP8GEMM_OK;
}

int fp8gemm_cpu_copy(const fp8gemm_tensor* x, const fp8gemm_tensor* s) {
    const int row = x->ndim - 2;
    const bool stack = x->ndim == 3;
    auto at = [&](const fp8gemm_tensor* t, int64_t g, int64_t i, int64_t j) {
        return static_cast<float*>(t->data) + (stack ? g * t->stride[0] : 0) + i * t->stride[row] + j * t->stride[row + 1];
    };
    for (int64_t g = 0; g < (stack ? x->shape[0] : 1); ++g)
        for (int64_t j = 0; j < x->shape[row + 1]; ++j)
            for (int64_t i = 0; i < x->shape[row]; ++i) *at(s, g, i, j) = *at(x, g, i, j);
    return FP8GEMM_OK;
}

const char* fp8gemm_cpu_features(void) { return cpu_features(); }
