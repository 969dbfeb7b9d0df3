// wgmma m64nNk32, e4m3 x e4m3 -> FP32, both operands in 128-byte-swizzled shared memory, K contiguous.
//
// A warpgroup (128 threads) computes D(64 x N) += A(64 x 32) . B(N x 32)'. Thread t holds, in d[4 * j ...], columns
// 8 * j + 2 * (t % 4) + {0, 1} of rows r = 16 * (t / 32) + (t % 32) / 4 (first two) and r + 8 (last two).
// Inline PTX wants its operands spelled out, hence the lists below: step i adds the eight columns' four registers.
#pragma once
#include "ptx.cuh"

namespace fp8gemm {

PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// Descriptor of an operand in shared memory: rows of 128 bytes, swizzled by TMA in atoms of 8 rows (1024 bytes apart).
// Addresses count 16 bytes: add 2 for the next 32 of K. They are kept apart so that a loop adds to 32 bits only.
PTX u32 wgmma_address(const void* tile) {
    constexpr u32 kUnused = 1u << 16;
    return kUnused | shared_address(tile) / 16;
}
PTX u64 wgmma_operand(u32 address) {
    constexpr u32 kSwizzle128 = 1u << 30, kAtomStride = 1024 / 16;
    return static_cast<u64>(kSwizzle128 | kAtomStride) << 32 | address;
}

template <int N> struct Wgmma;                   // Wgmma<N>::mma(d, a, b, accumulate): d = a . b' (+ d)

#define WGMMA(N, D, R, A, B, C)                                                                              \
    template <> struct Wgmma<N> {                                                                            \
        PTX static void mma(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                               \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #C ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" D "}, %" #A ", %" #B   \
                         ", p, 1, 1; }"                                                                      \
                         : R : "l"(a), "l"(b), "r"(accumulate));                                             \
        }                                                                                                    \
    };

#define D0 "%0, %1, %2, %3"
#define R0 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define D1 D0 ", %4, %5, %6, %7"
#define R1 R0, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define D2 D1 ", %8, %9, %10, %11"
#define R2 R1, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define D3 D2 ", %12, %13, %14, %15"
#define R3 R2, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define D4 D3 ", %16, %17, %18, %19"
#define R4 R3, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define D5 D4 ", %20, %21, %22, %23"
#define R5 R4, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define D6 D5 ", %24, %25, %26, %27"
#define R6 R5, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define D7 D6 ", %28, %29, %30, %31"
#define R7 R6, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define D8 D7 ", %32, %33, %34, %35"
#define R8 R7, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define D9 D8 ", %36, %37, %38, %39"
#define R9 R8, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define D10 D9 ", %40, %41, %42, %43"
#define R10 R9, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define D11 D10 ", %44, %45, %46, %47"
#define R11 R10, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define D12 D11 ", %48, %49, %50, %51"
#define R12 R11, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define D13 D12 ", %52, %53, %54, %55"
#define R13 R12, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define D14 D13 ", %56, %57, %58, %59"
#define R14 R13, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define D15 D14 ", %60, %61, %62, %63"
#define R15 R14, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define D16 D15 ", %64, %65, %66, %67"
#define R16 R15, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define D17 D16 ", %68, %69, %70, %71"
#define R17 R16, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define D18 D17 ", %72, %73, %74, %75"
#define R18 R17, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define D19 D18 ", %76, %77, %78, %79"
#define R19 R18, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define D20 D19 ", %80, %81, %82, %83"
#define R20 R19, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define D21 D20 ", %84, %85, %86, %87"
#define R21 R20, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define D22 D21 ", %88, %89, %90, %91"
#define R22 R21, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define D23 D22 ", %92, %93, %94, %95"
#define R23 R22, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

WGMMA(8, D0, R0, 4, 5, 6)
WGMMA(16, D1, R1, 8, 9, 10)
WGMMA(32, D3, R3, 16, 17, 18)
WGMMA(48, D5, R5, 24, 25, 26)
WGMMA(56, D6, R6, 28, 29, 30)
WGMMA(64, D7, R7, 32, 33, 34)
WGMMA(80, D9, R9, 40, 41, 42)
WGMMA(96, D11, R11, 48, 49, 50)
WGMMA(112, D13, R13, 56, 57, 58)
WGMMA(128, D15, R15, 64, 65, 66)
WGMMA(144, D17, R17, 72, 73, 74)
WGMMA(160, D19, R19, 80, 81, 82)
WGMMA(176, D21, R21, 88, 89, 90)
WGMMA(192, D23, R23, 96, 97, 98)

#undef WGMMA

}  // namespace fp8gemm
