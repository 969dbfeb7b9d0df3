#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local fp8gemm_error last;
}

namespace fp8gemm {

int fail(fp8gemm_status status, const char* argument, const char* format, ...) {
    last.status = status;
    snprintf(last.argument, sizeof last.argument, "%s", argument);
    va_list values;
    va_start(values, format);
    vsnprintf(last.message, sizeof last.message, format, values);
    va_end(values);
    return status;
}

}  // namespace fp8gemm

const fp8gemm_error* fp8gemm_last_error(void) { return &last; }
int fp8gemm_abi_version(void) { return FP8GEMM_ABI_VERSION; }
