#include "driver.h"

#include <dlfcn.h>

#include <atomic>

#include "error.h"
#include "lock.h"

namespace fp8gemm {
namespace {

Driver driver_calls;
std::atomic<const Driver*> opened{nullptr};
int opened_after = 0;                            // forks; written before `opened`
std::atomic<CUcontext> contexts[kMaxDevices];
std::atomic<CUstream> own_streams[kMaxDevices];

int resolve(void* library) {
    struct { const char* name; void** slot; } const calls[] = {
#define FP8GEMM_SLOT(name, ...) {#name, reinterpret_cast<void**>(&driver_calls.name)},
        FP8GEMM_DRIVER_CALLS(FP8GEMM_SLOT)
#undef FP8GEMM_SLOT
    };
    for (const auto& call : calls) {
        *call.slot = dlsym(library, call.name);
        if (!*call.slot)
            return fail(FP8GEMM_UNAVAILABLE, "", "the CUDA driver lacks %s; CUDA 12.0 (driver 525) is the oldest supported",
                        call.name);
    }
    return FP8GEMM_OK;
}

}  // namespace

int driver_failure(const Driver& driver, CUresult result, const char* call) {
    const char *name = "unknown error", *text = "";
    driver.cuGetErrorName(result, &name);
    driver.cuGetErrorString(result, &text);
    return fail(FP8GEMM_DRIVER, "", "%s failed: %s (%d): %s", call, name, result, text);
}

int open_driver(const Driver** out) {
    *out = opened.load(std::memory_order_acquire);
    if (*out) return fp8gemm_check_fork();
    Lock lock;
    if (!opened.load(std::memory_order_relaxed)) {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) return fail(FP8GEMM_UNAVAILABLE, "", "no CUDA driver: %s", dlerror());
        FP8GEMM_TRY(resolve(library));
        if (CUresult result = driver_calls.cuInit(0)) {
            driver_failure(driver_calls, result, "cuInit");
            fp8gemm_error error = *fp8gemm_last_error();
            return fail(FP8GEMM_UNAVAILABLE, "", "%s", error.message);
        }
        opened_after = forks();
        opened.store(&driver_calls, std::memory_order_release);
    }
    *out = &driver_calls;
    return FP8GEMM_OK;
}

int ContextScope::enter(int device_id, const Driver** driver) {
    FP8GEMM_TRY(open_driver(driver));
    const Driver& cu = **driver;
    if (device_id < 0 || device_id >= kMaxDevices)
        return fail(FP8GEMM_DEVICE, "", "device %d; at most %d devices are supported", device_id, kMaxDevices);
    CUcontext wanted = contexts[device_id].load(std::memory_order_acquire), current = nullptr;
    if (!wanted) {
        Lock lock;
        wanted = contexts[device_id].load(std::memory_order_relaxed);
        if (!wanted) {                           // retained for the life of the process
            CUdevice device;
            FP8GEMM_CU(cu, cuDeviceGet, &device, device_id);
            FP8GEMM_CU(cu, cuDevicePrimaryCtxRetain, &wanted, device);
            contexts[device_id].store(wanted, std::memory_order_release);
        }
    }
    FP8GEMM_CU(cu, cuCtxGetCurrent, &current);
    if (current == wanted) return FP8GEMM_OK;
    FP8GEMM_CU(cu, cuCtxPushCurrent_v2, wanted);
    driver_ = &cu;
    return FP8GEMM_OK;
}

ContextScope::~ContextScope() {
    CUcontext popped;
    if (driver_) driver_->cuCtxPopCurrent_v2(&popped);
}

int own_stream(const Driver& cu, int device_id, CUstream* stream) {
    constexpr unsigned kNonBlocking = 1;
    *stream = own_streams[device_id].load(std::memory_order_acquire);
    if (*stream) return FP8GEMM_OK;
    Lock lock;
    *stream = own_streams[device_id].load(std::memory_order_relaxed);
    if (*stream) return FP8GEMM_OK;
    FP8GEMM_CU(cu, cuStreamCreate, stream, kNonBlocking);        // for the life of the process
    own_streams[device_id].store(*stream, std::memory_order_release);
    return FP8GEMM_OK;
}

}  // namespace fp8gemm

using namespace fp8gemm;

int fp8gemm_check_fork(void) {
    if (!opened.load(std::memory_order_acquire) || opened_after == forks()) return FP8GEMM_OK;
    return fail(FP8GEMM_UNAVAILABLE, "",
                "this process was forked after CUDA was used; CUDA does not survive a fork (use spawn)");
}

int fp8gemm_driver_version(int* version) {
    const Driver* cu;
    FP8GEMM_TRY(open_driver(&cu));
    FP8GEMM_CU(*cu, cuDriverGetVersion, version);
    return FP8GEMM_OK;
}

int fp8gemm_device_count(int* count) {
    const Driver* cu;
    FP8GEMM_TRY(open_driver(&cu));
    FP8GEMM_CU(*cu, cuDeviceGetCount, count);
    return FP8GEMM_OK;
}

int fp8gemm_device_read(int device_id, fp8gemm_device* out) {
    const Driver* cu;
    FP8GEMM_TRY(open_driver(&cu));
    CUdevice device;
    FP8GEMM_CU(*cu, cuDeviceGet, &device, device_id);
    *out = {};
    FP8GEMM_CU(*cu, cuDeviceGetName, out->name, sizeof out->name, device);
    int32_t memory_clock_khz = 0, memory_bus_bits = 0;
    struct { int attribute; int32_t* to; } const wanted[] = {            // CUdevice_attribute
        {75, &out->major}, {76, &out->minor}, {16, &out->sms}, {38, &out->l2_bytes}, {97, &out->shared_bytes},
        {13, &out->clock_khz}, {36, &memory_clock_khz}, {37, &memory_bus_bits},
    };
    for (const auto& w : wanted) FP8GEMM_CU(*cu, cuDeviceGetAttribute, w.to, w.attribute, device);
    out->memory_bandwidth = 2e3 * memory_clock_khz * memory_bus_bits / 8;        // two transfers a clock
    return FP8GEMM_OK;
}

int fp8gemm_stream_wait(int device_id, void* stream, void* other) {
    if (stream == other) return FP8GEMM_OK;
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    CUevent event;
    FP8GEMM_CU(*cu, cuEventCreate, &event, kDisableTiming);
    CUresult result = cu->cuEventRecord(event, static_cast<CUstream>(other));
    if (!result) result = cu->cuStreamWaitEvent(static_cast<CUstream>(stream), event, 0);
    cu->cuEventDestroy_v2(event);                // takes effect once it has passed
    return result ? driver_failure(*cu, result, "ordering two streams") : FP8GEMM_OK;
}

int fp8gemm_stream_capturing(int device_id, void* stream, int* capturing) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    FP8GEMM_CU(*cu, cuStreamIsCapturing, static_cast<CUstream>(stream), capturing);
    return FP8GEMM_OK;
}

int fp8gemm_event_record(int device_id, void* stream, void** event) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    CUevent created;
    FP8GEMM_CU(*cu, cuEventCreate, &created, kDisableTiming);
    if (CUresult result = cu->cuEventRecord(created, static_cast<CUstream>(stream))) {
        cu->cuEventDestroy_v2(created);
        return driver_failure(*cu, result, "cuEventRecord");
    }
    *event = created;
    return FP8GEMM_OK;
}

int fp8gemm_event_done(int device_id, void* event, int* done) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(device_id, &cu));
    int mode = kRelaxed;                         // a query would break a capture that is open anywhere
    FP8GEMM_CU(*cu, cuThreadExchangeStreamCaptureMode, &mode);
    *done = cu->cuEventQuery(static_cast<CUevent>(event)) == 0;          // not ready and any doubt: later
    cu->cuThreadExchangeStreamCaptureMode(&mode);
    if (*done) cu->cuEventDestroy_v2(static_cast<CUevent>(event));
    return FP8GEMM_OK;
}
