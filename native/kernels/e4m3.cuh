// Conversions between e4m3 and FP32, for the kernels that don't use the tensor core.
#pragma once
#include "ptx.cuh"

namespace fp8gemm {

PTX void e4m3x2_to_float(u16 pair, float& low, float& high) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(halves));
}
PTX u16 float_to_e4m3x2(float low, float high) { // round to nearest even, saturate to +-448, NaN stays NaN
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
PTX float max_nan(float a, float b) {            // unlike fmaxf, keeps a NaN
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

}  // namespace fp8gemm
