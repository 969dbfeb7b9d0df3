#include "python.h"

#include <dlfcn.h>

namespace fp8gemm {
namespace {

struct Found {
    Python python;
    bool complete = true;

    Found() {
        struct { const char* name; void** slot; } const symbols[] = {
#define FP8GEMM_SLOT(result, name, ...) {#name, reinterpret_cast<void**>(&python.name)},
            FP8GEMM_PYTHON_CALLS(FP8GEMM_SLOT)
#undef FP8GEMM_SLOT
#define FP8GEMM_SLOT(name) {#name, reinterpret_cast<void**>(&python.name)},
            FP8GEMM_PYTHON_OBJECTS(FP8GEMM_SLOT)
#undef FP8GEMM_SLOT
        };
        for (const auto& symbol : symbols) {
            *symbol.slot = dlsym(RTLD_DEFAULT, symbol.name);
            complete = complete && *symbol.slot;
        }
    }
};

}  // namespace

const Python* python() {
    static const Found found;
    return found.complete ? &found.python : nullptr;
}

}  // namespace fp8gemm
