// How every function of the library reports failure: `return fail(STATUS, "argument", "value %d, limit %d", ...)`.
#pragma once
#include "fp8gemm.h"

namespace fp8gemm {

__attribute__((format(printf, 3, 4)))
int fail(fp8gemm_status status, const char* argument, const char* format, ...);

#define FP8GEMM_TRY(call)                        \
    do {                                         \
        if (int status_ = (call)) return status_; \
    } while (0)

}  // namespace fp8gemm
