// The CUDA driver, found at run time. Only the calls used here, with the types of the driver API's documentation.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fp8gemm.h"

namespace fp8gemm {

constexpr int kMaxDevices = 64;

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;

struct CUlaunchAttribute {
    int id;
    char pad[4];
    union { char bytes[64]; struct { unsigned x, y, z; } cluster; int programmatic; };
};
struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    CUstream stream;
    CUlaunchAttribute* attributes;
    unsigned attribute_count;
};

// name in the driver, arguments
#define FP8GEMM_DRIVER_CALLS(X)                                                                                        \
    X(cuInit, unsigned)                                                                                                \
    X(cuDriverGetVersion, int*)                                                                                        \
    X(cuGetErrorName, CUresult, const char**)                                                                          \
    X(cuGetErrorString, CUresult, const char**)                                                                        \
    X(cuDeviceGetCount, int*)                                                                                          \
    X(cuDeviceGet, CUdevice*, int)                                                                                     \
    X(cuDeviceGetName, char*, int, CUdevice)                                                                           \
    X(cuDeviceGetAttribute, int*, int, CUdevice)                                                                       \
    X(cuDevicePrimaryCtxRetain, CUcontext*, CUdevice)                                                                  \
    X(cuCtxGetCurrent, CUcontext*)                                                                                     \
    X(cuCtxPushCurrent_v2, CUcontext)                                                                                  \
    X(cuCtxPopCurrent_v2, CUcontext*)                                                                                  \
    X(cuModuleLoadData, CUmodule*, const void*)                                                                        \
    X(cuModuleUnload, CUmodule)                                                                                        \
    X(cuModuleGetFunction, CUfunction*, CUmodule, const char*)                                                         \
    X(cuFuncSetAttribute, CUfunction, int, int)                                                                        \
    X(cuLaunchKernelEx, const CUlaunchConfig*, CUfunction, void**, void**)                                             \
    X(cuTensorMapEncodeTiled, void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,          \
      const uint32_t*, int, int, int, int)                                                                             \
    X(cuMemAllocAsync, CUdeviceptr*, size_t, CUstream)                                                                 \
    X(cuMemFreeAsync, CUdeviceptr, CUstream)                                                                           \
    X(cuMemcpyDtoH_v2, void*, CUdeviceptr, size_t)                                                                     \
    X(cuStreamSynchronize, CUstream)                                                                                   \
    X(cuStreamCreate, CUstream*, unsigned)                                                                             \
    X(cuStreamIsCapturing, CUstream, int*)                                                                             \
    X(cuStreamWaitEvent, CUstream, CUevent, unsigned)                                                                  \
    X(cuThreadExchangeStreamCaptureMode, int*)                                                                         \
    X(cuEventCreate, CUevent*, unsigned)                                                                               \
    X(cuEventRecord, CUevent, CUstream)                                                                                \
    X(cuEventQuery, CUevent)                                                                                           \
    X(cuEventDestroy_v2, CUevent)

struct Driver {
#define FP8GEMM_DECLARE(name, ...) CUresult (*name)(__VA_ARGS__);
    FP8GEMM_DRIVER_CALLS(FP8GEMM_DECLARE)
#undef FP8GEMM_DECLARE
};

// Opens libcuda.so.1 and initialises it, once; afterwards a plain pointer read.
int open_driver(const Driver** driver);
int driver_failure(const Driver& driver, CUresult result, const char* call);     // fail() with the driver's own words

#define FP8GEMM_CU(driver, call, ...)                                                     \
    do {                                                                                  \
        if (CUresult result_ = (driver).call(__VA_ARGS__))                                \
            return driver_failure(driver, result_, #call);                                \
    } while (0)

// Makes a device's primary context (the one every framework uses) current for a scope.
class ContextScope {
public:
    ContextScope() = default;
    ~ContextScope();
    ContextScope(const ContextScope&) = delete;
    ContextScope& operator=(const ContextScope&) = delete;
    int enter(int device_id, const Driver** driver);

private:
    const Driver* driver_ = nullptr;             // set while a context is pushed
};

// Memory is allocated and freed on a stream of ours, ordered with others by events: a caller's stream may be destroyed
// before what was made on it, and the driver crashes on a stream that is gone.
int own_stream(const Driver& driver, int device_id, CUstream* stream);
constexpr unsigned kDisableTiming = 2;           // CUevent_flags
constexpr int kRelaxed = 2;                      // CUstreamCaptureMode

}  // namespace fp8gemm
