// A CUDA driver that does nothing but write each call that touches a stream to stderr: what a call does, without a GPU.
#include <cstdio>
#include <cstdlib>

#define CALL(name, ...) extern "C" int name(__VA_ARGS__)
using Pointer = unsigned long long;

CALL(cuInit, unsigned) { return 0; }
CALL(cuDriverGetVersion, int* version) { *version = 13000; return 0; }
CALL(cuGetErrorName, int, const char** text) { *text = "CUDA_ERROR_STUB"; return 0; }
CALL(cuGetErrorString, int, const char** text) { *text = "stub"; return 0; }
CALL(cuDeviceGetCount, int* count) { *count = 1; return 0; }
CALL(cuDeviceGet, int* device, int id) { *device = id; return 0; }
CALL(cuDeviceGetName, char* name, int size, int) { snprintf(name, size, "stub"); return 0; }
CALL(cuDeviceGetAttribute, int* value, int, int) { *value = 1; return 0; }
CALL(cuDevicePrimaryCtxRetain, void** context, int) { *context = reinterpret_cast<void*>(8); return 0; }
CALL(cuCtxGetCurrent, void** context) { *context = nullptr; return 0; }
CALL(cuCtxPushCurrent_v2, void*) { return 0; }
CALL(cuCtxPopCurrent_v2, void**) { return 0; }
CALL(cuModuleLoadData, void**, const void*) { return 0; }
CALL(cuModuleUnload, void*) { return 0; }
CALL(cuModuleGetFunction, void**, void*, const char*) { return 0; }
CALL(cuFuncSetAttribute, void*, int, int) { return 0; }
CALL(cuLaunchKernelEx, const void*, void*, void**, void**) { return 0; }
CALL(cuTensorMapEncodeTiled, void*) { return 0; }
CALL(cuMemAllocAsync, Pointer* data, size_t bytes, void* stream) {
    fprintf(stderr, "allocate %zu on %p\n", bytes, stream);
    *data = reinterpret_cast<Pointer>(malloc(bytes));
    return 0;
}
CALL(cuMemFreeAsync, Pointer data, void* stream) {
    fprintf(stderr, "free on %p\n", stream);
    free(reinterpret_cast<void*>(data));
    return 0;
}
CALL(cuMemcpyDtoH_v2, void*, Pointer, size_t) { return 0; }
CALL(cuStreamSynchronize, void*) { return 0; }
CALL(cuStreamCreate, void** stream, unsigned) { *stream = reinterpret_cast<void*>(0x77); return 0; }
CALL(cuStreamIsCapturing, void* stream, int* status) { *status = stream == reinterpret_cast<void*>(0xca); return 0; }
CALL(cuStreamWaitEvent, void* stream, void*, unsigned) { fprintf(stderr, "wait on %p\n", stream); return 0; }
CALL(cuThreadExchangeStreamCaptureMode, int*) { return 0; }
CALL(cuEventCreate, void** event, unsigned) { *event = reinterpret_cast<void*>(8); return 0; }
CALL(cuEventRecord, void*, void* stream) { fprintf(stderr, "record on %p\n", stream); return 0; }
CALL(cuEventQuery, void*) { return 0; }
CALL(cuEventDestroy_v2, void*) { return 0; }
