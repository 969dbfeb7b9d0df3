// A CUDA driver without a GPU: two Hopper devices that compute nothing. It keeps every launch, to be asked for with
// stub_launch(i), and writes each call that orders streams or owns memory to stderr.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../native/host/driver.h"
#include "../native/kernels/params.h"

#define CALL(name, ...) extern "C" __attribute__((visibility("default"))) int name(__VA_ARGS__)
using Pointer = unsigned long long;

// Set by tests: what launches return, and whether they wait.
extern "C" {
__attribute__((visibility("default"))) std::atomic<int> stub_launch_result{0}, stub_launches_wait{0}, stub_waiting{0};
__attribute__((visibility("default"))) std::atomic<int> stub_quiet{0}, stub_modules{0};  // modules: loaded so far
// Launches in another context than their kernel's, or by another plan than their kernel's name says ("plan3": one whose
// L2 policy is 3). Those of such names are not kept.
__attribute__((visibility("default"))) std::atomic<int> stub_wrong_launches{0};
}

namespace {

struct Map {                                     // what a tensor map of ours says: the arguments it was encoded with
    const void* address;
    uint64_t dims[4], strides[3];
    uint32_t box[4];
    uint8_t rank, type, swizzle, promotion;
};
static_assert(sizeof(Map) <= sizeof(fp8gemm::TensorMap), "fits in a CUtensorMap");

struct Function { int device; char name[32]; };
struct Launch {
    fp8gemm::CUlaunchConfig config;
    unsigned cluster;
    const Function* function;
    void* context;
    fp8gemm::GemmParams params;
    std::atomic<long> number;                    // from 1; written last
};

constexpr int kKept = 4096;
Launch kept[kKept];                              // the latest
std::atomic<long> launches{0};
thread_local void* contexts[8];
thread_local int depth = 0;

template <class... Values> void say(const char* format, Values... values) {
    if (!stub_quiet.load()) fprintf(stderr, format, values...);
}

void* context_of(int device) { return reinterpret_cast<void*>(static_cast<uintptr_t>(8 + device)); }
void* current() { return depth ? contexts[depth - 1] : nullptr; }

}  // namespace

CALL(cuInit, unsigned) { return 0; }
CALL(cuDriverGetVersion, int* version) { *version = 13000; return 0; }
CALL(cuGetErrorName, int, const char** text) { *text = "CUDA_ERROR_STUB"; return 0; }
CALL(cuGetErrorString, int, const char** text) { *text = "stub"; return 0; }
CALL(cuDeviceGetCount, int* count) { *count = 2; return 0; }
CALL(cuDeviceGet, int* device, int id) { *device = id; return id < 0 || id > 1 ? 101 : 0; }
CALL(cuDeviceGetName, char* name, int size, int) { snprintf(name, size, "stub"); return 0; }
CALL(cuDeviceGetAttribute, int* value, int attribute, int device) {
    switch (attribute) {
    case 75: *value = 9; break;                  // compute capability
    case 76: *value = 0; break;
    case 16: *value = device ? 78 : 132; break;  // SMs
    case 38: *value = 60 << 20; break;           // L2
    case 97: *value = 232448; break;             // shared memory of a CTA
    case 13: *value = 2000000; break;            // clock, kHz
    case 36: *value = 3200000; break;            // memory's
    case 37: *value = 6000; break;               // bits of its bus: 2400 bytes a cycle
    default: *value = 1;
    }
    return 0;
}
CALL(cuDevicePrimaryCtxRetain, void** context, int device) { *context = context_of(device); return 0; }
CALL(cuCtxGetCurrent, void** context) { *context = current(); return 0; }
CALL(cuCtxPushCurrent_v2, void* context) { contexts[depth++] = context; return 0; }
CALL(cuCtxPopCurrent_v2, void** context) { *context = contexts[--depth]; return 0; }
CALL(cuModuleLoadData, void** module, const void*) {
    *module = context_of(0), ++stub_modules;
    return 0;
}
CALL(cuModuleUnload, void*) { return 0; }
CALL(cuModuleGetFunction, void** function, void*, const char* name) {
    auto* made = new Function{static_cast<int>(reinterpret_cast<uintptr_t>(current()) - 8), ""};
    snprintf(made->name, sizeof made->name, "%s", name);
    *function = made;
    return 0;
}
CALL(cuFuncSetAttribute, void*, int, int) { return 0; }
CALL(cuTensorMapEncodeTiled, void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
     const uint32_t* box, const uint32_t*, int, int swizzle, int promotion, int) {
    Map said{address, {}, {}, {}, static_cast<uint8_t>(rank), static_cast<uint8_t>(type), static_cast<uint8_t>(swizzle),
             static_cast<uint8_t>(promotion)};
    memcpy(said.dims, dims, rank * sizeof *dims), memcpy(said.box, box, rank * sizeof *box);
    memcpy(said.strides, strides, (rank - 1) * sizeof *strides);
    memcpy(map, &said, sizeof said);
    return 0;
}
CALL(cuLaunchKernelEx, const fp8gemm::CUlaunchConfig* config, const Function* function, void** arguments, void**) {
    ++stub_waiting;
    while (stub_launches_wait.load()) {}
    --stub_waiting;
    if (int result = stub_launch_result.load()) return result;
    const auto& params = *static_cast<const fp8gemm::GemmParams*>(arguments[0]);
    if (current() != context_of(function->device)) ++stub_wrong_launches;
    if (!strncmp(function->name, "plan", 4)) {
        if (params.b_policy != static_cast<unsigned>(atoi(function->name + 4))) ++stub_wrong_launches;
        ++launches;
        return 0;
    }
    const long i = launches.fetch_add(1);
    Launch& launch = kept[i % kKept];
    launch.config = *config, launch.function = function, launch.context = current();
    launch.cluster = config->attribute_count ? config->attributes[0].cluster.x : 1;
    const bool gemm = !strcmp(function->name, "fp8gemm_gemm") || !strcmp(function->name, "fp8gemm_reference");
    if (gemm) memcpy(&launch.params, &params, sizeof params);
    launch.number.store(i + 1, std::memory_order_release);
    return 0;
}
CALL(cuMemAllocAsync, Pointer* data, size_t bytes, void* stream) {
    say("allocate %zu on %p\n", bytes, stream);
    *data = reinterpret_cast<Pointer>(malloc(bytes));
    return 0;
}
CALL(cuMemFreeAsync, Pointer data, void* stream) {
    say("free on %p\n", stream);
    free(reinterpret_cast<void*>(data));
    return 0;
}
CALL(cuMemcpyDtoH_v2, void*, Pointer, size_t) { return 0; }
CALL(cuStreamSynchronize, void*) { return 0; }
CALL(cuStreamCreate, void** stream, unsigned) { *stream = reinterpret_cast<void*>(0x77); return 0; }
CALL(cuStreamIsCapturing, void* stream, int* status) { *status = stream == reinterpret_cast<void*>(0xca); return 0; }
CALL(cuStreamWaitEvent, void* stream, void*, unsigned) { say("wait on %p\n", stream); return 0; }
CALL(cuThreadExchangeStreamCaptureMode, int*) { return 0; }
CALL(cuEventCreate, void** event, unsigned) { *event = reinterpret_cast<void*>(8); return 0; }
CALL(cuEventRecord, void*, void* stream) { say("record on %p\n", stream); return 0; }
CALL(cuEventQuery, void*) { return 0; }
CALL(cuEventDestroy_v2, void*) { return 0; }

// ---- for tests

extern "C" __attribute__((visibility("default"))) long stub_launch_count() { return launches.load(); }

// Launch number i, of the last few thousand, as JSON.
CALL(stub_launch, long i, char* text, size_t size) {
    const Launch& l = kept[i % kKept];
    while (l.number.load(std::memory_order_acquire) < i + 1) {}
    const fp8gemm::GemmParams& p = l.params;
    char maps[3][256];
    const fp8gemm::TensorMap* all[] = {&p.a, &p.b, &p.d};
    for (int n = 0; n < 3; ++n) {
        Map m;
        memcpy(&m, all[n], sizeof m);
        char* to = maps[n];
        auto list = [&](const auto* values, int count) {
            for (int i = 0; i < count; ++i) to += sprintf(to, "%s%llu", i ? ", " : "", (Pointer)values[i]);
        };
        to += sprintf(to, "[%llu, [", (Pointer)m.address);
        list(m.dims, m.rank);
        to += sprintf(to, "], [");
        list(m.strides, m.rank ? m.rank - 1 : 0);
        to += sprintf(to, "], [");
        list(m.box, m.rank);
        sprintf(to, "], %d, %d, %d]", m.type, m.swizzle, m.promotion);
    }
    return snprintf(text, size,
                    "{\"grid\": [%u, %u, %u], \"block\": %u, \"shared\": %u, \"cluster\": %u, \"stream\": %llu,"
                    " \"kernel\": \"%s\", \"function\": %llu, \"device\": %d, \"context\": %llu,"
                    " \"a\": %s, \"b\": %s, \"d\": %s,"
                    " \"pointers\": [%llu, %llu, %llu, %llu, %llu, %llu], \"rows\": [%lld, %lld, %lld, %lld, %lld],"
                    " \"groups\": [%lld, %lld, %lld, %lld, %lld], \"scale_steps\": [%lld, %lld],"
                    " \"sizes\": [%d, %d, %d, %d], \"raster\": %d, \"d_staged\": %d, \"sa_by_bulk\": %d, \"in_pieces\": [%d, %d],"
                    " \"policy\": %llu, \"pace\": %d}",
                    l.config.grid_x, l.config.grid_y, l.config.grid_z, l.config.block_x, l.config.shared_bytes,
                    l.cluster, (Pointer)l.config.stream, l.function->name, (Pointer)l.function, l.function->device,
                    (Pointer)l.context, maps[0], maps[1], maps[2], (Pointer)p.a_data, (Pointer)p.sa, (Pointer)p.b_data, (Pointer)p.sb,
                    (Pointer)p.d_data, (Pointer)p.layout, p.a_row, p.sa_row, p.b_row, p.sb_row, p.d_row, p.a_group,
                    p.sa_group, p.b_group, p.sb_group, p.d_group, p.sa_k, p.sb_k, p.m, p.n, p.k, p.groups, p.raster,
                    p.d_staged, p.sa_by_bulk, p.sa_in_pieces, p.sb_in_pieces, p.b_policy, p.pace);
}
