// The stub driver with what the tuner needs besides: memory that holds bytes, and a clock that launches advance. The
// tuner's own kernels are played: comparing finds no error, unless stub_wrong_shared names the plan's shared memory.
#include <dlfcn.h>

#define cuMemcpyDtoH_v2 without_memory
#define cuEventCreate without_clock
#define cuEventRecord recorded_nowhere
#define cuEventDestroy_v2 event_is_kept
#define cuLaunchKernelEx launch_and_keep
#include "stub_driver.cpp"
#undef cuMemcpyDtoH_v2
#undef cuEventCreate
#undef cuEventRecord
#undef cuEventDestroy_v2
#undef cuLaunchKernelEx

extern "C" {
__attribute__((visibility("default"))) std::atomic<int> stub_wrong_shared{0}, stub_allocated{0}, stub_slow_flushes{0};
}

namespace {
double now = 0;                                  // milliseconds
unsigned last_shared = 0;
struct Event { double at; };
}

CALL(cuCtxSetCurrent, void* context) { depth = 1, contexts[0] = context; return 0; }
CALL(cuMemAlloc_v2, Pointer* data, size_t bytes) {
    ++stub_allocated;
    *data = reinterpret_cast<Pointer>(aligned_alloc(256, (bytes + 255) / 256 * 256));
    return 0;
}
CALL(cuMemFree_v2, Pointer data) { --stub_allocated; free(reinterpret_cast<void*>(data)); return 0; }
CALL(cuMemcpyHtoDAsync_v2, Pointer to, const void* from, size_t bytes, void*) {
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return 0;
}
CALL(cuMemcpyDtoH_v2, void* to, Pointer from, size_t bytes) { memcpy(to, reinterpret_cast<void*>(from), bytes); return 0; }
CALL(cuMemsetD16Async, Pointer to, unsigned short value, size_t count, void*) {
    for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned short*>(to)[i] = value;
    return 0;
}
CALL(cuMemsetD32Async, Pointer to, unsigned value, size_t count, void*) {
    for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(to)[i] = value;
    return 0;
}
CALL(cuMemGetInfo_v2, size_t* free_bytes, size_t* total) { *free_bytes = size_t(4) << 30, *total = size_t(8) << 30; return 0; }
CALL(cuDeviceGetUuid_v2, unsigned char* uuid, int device) {
    for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(16 * device + i);
    return 0;
}
CALL(cuStreamDestroy_v2, void*) { return 0; }
CALL(cuEventCreate, void** event, unsigned) { *event = new Event{}; return 0; }
CALL(cuEventDestroy_v2, void* event) { delete static_cast<Event*>(event); return 0; }
CALL(cuEventRecord, void* event, void*) { static_cast<Event*>(event)->at = now; return 0; }
CALL(cuEventElapsedTime_v2, float* ms, void* start, void* end) {
    *ms = static_cast<float>(static_cast<Event*>(end)->at - static_cast<Event*>(start)->at);
    return 0;
}
CALL(cuEventElapsedTime, float* ms, void* start, void* end) { return cuEventElapsedTime_v2(ms, start, end); }
CALL(cuLaunchKernelEx, const fp8gemm::CUlaunchConfig* config, const Function* function, void** arguments, void** more) {
    last_shared = config->shared_bytes;
    now += 0.010 + config->shared_bytes % 7919 * 1e-6 + config->grid_x * 1e-6;
    return launch_and_keep(config, function, arguments, more);
}
CALL(cuLaunchKernel, const Function* function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
     void** arguments, void**) {
    if (!strcmp(function->name, "fp8gemm_flush")) now += stub_slow_flushes > 0 && stub_slow_flushes-- % 2 ? 0.5 : 0.12;
    if (!strcmp(function->name, "fp8gemm_compare")) {
        double* errors = *static_cast<double**>(arguments[3]);
        const bool wrong = last_shared == static_cast<unsigned>(stub_wrong_shared.load());
        for (unsigned row = 0; row < grid; ++row) errors[3 * row] = wrong ? 9 : 1, errors[3 * row + 1] = 1, errors[3 * row + 2] = 0;
    }
    return 0;
}
// What cuda-python finds the rest by.
CALL(cuGetProcAddress_v2, const char* name, void** function, int, uint64_t, int* status) {
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(self, newer);
    if (!*function) *function = dlsym(self, name);
    if (status) *status = *function ? 0 : 1;
    return 0;
}
