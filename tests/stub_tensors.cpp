// DLPack's exchange API for the tensors of tests/stub.py, each of which is a `bytes` that holds a Record.
#include <dlfcn.h>

#include <cstring>

#include "../native/host/dlpack.h"

using namespace fp8gemm::dlpack;

namespace {

struct Record {
    Tensor tensor;                               // whose shape and strides are the record's own
    int64_t shape[4], strides[4];
    int32_t fails, no_strides;
};

template <class Function> Function python(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

int tensor_from_object(void* object, Tensor* out) {
    static const auto bytes = python<char* (*)(void*)>("PyBytes_AsString");
    static const auto error = python<void (*)(void*, const char*)>("PyErr_SetString");
    auto* record = reinterpret_cast<Record*>(bytes(object));
    if (record->fails) {
        error(*python<void**>("PyExc_BufferError"), "this one can't be exported");
        return -1;
    }
    memcpy(out, &record->tensor, sizeof *out);
    out->shape = record->shape;
    out->strides = record->no_strides ? nullptr : record->strides;
    return 0;
}

void* streams[8];                                // current, by device

int current_work_stream(int32_t, int32_t device_id, void** stream) {
    *stream = streams[device_id & 7];
    return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void stub_set_stream(int device_id, void* stream) {
    streams[device_id & 7] = stream;
}
// Deleters, which count in the managed tensor's context. In Python they would run with an exception pending.
extern "C" __attribute__((visibility("default"))) void stub_delete(ManagedTensor* managed) {
    ++*static_cast<int64_t*>(managed->context);
}
extern "C" __attribute__((visibility("default"))) void stub_delete_versioned(ManagedTensorVersioned* managed) {
    ++*static_cast<int64_t*>(managed->context);
}

extern "C" {
__attribute__((visibility("default")))
ExchangeApi stub_exchange_api = {{1, 3}, nullptr, nullptr, nullptr, nullptr, tensor_from_object, current_work_stream};
}
