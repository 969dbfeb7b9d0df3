// Reads other libraries' tensors, and exports memory of ours.
#include "dlpack.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "driver.h"
#include "error.h"

using namespace fp8gemm;

namespace {

int read(const dlpack::Tensor& from, bool read_only, const char* argument, fp8gemm_tensor* to) {
    if (from.ndim < 0 || from.ndim > 3)
        return fail(FP8GEMM_SHAPE, argument, "rank %d; at most 3 dimensions are supported", from.ndim);
    *to = {};
    const bool host = from.device.type == dlpack::kCPU || from.device.type == dlpack::kCUDAHost;
    const bool cuda = from.device.type == dlpack::kCUDA || from.device.type == dlpack::kCUDAManaged;
    if (!host && !cuda)
        return fail(FP8GEMM_DEVICE, argument, "DLPack device type %d; only CPU (1) and CUDA (2) are supported",
                    from.device.type);
    to->device_type = host ? dlpack::kCPU : dlpack::kCUDA;
    to->device_id = host ? 0 : from.device.id;
    to->dtype_code = from.dtype.code, to->dtype_bits = from.dtype.bits, to->dtype_lanes = from.dtype.lanes;
    to->ndim = from.ndim;
    to->read_only = read_only;
    if (from.ndim && !from.shape) return fail(FP8GEMM_SHAPE, argument, "the DLPack tensor has no shape");
    int64_t compact = 1;
    bool empty = false;
    for (int i = from.ndim - 1; i >= 0; --i) {
        to->shape[i] = from.shape[i];
        if (from.shape[i] < 0 || from.shape[i] > INT32_MAX)
            return fail(FP8GEMM_SHAPE, argument, "dimension %d is %lld; the limit is %d", i,
                        static_cast<long long>(from.shape[i]), INT32_MAX);
        to->stride[i] = from.strides ? from.strides[i] : compact;
        if (from.shape[i] == 0) empty = true;
        if (__builtin_mul_overflow(compact, from.shape[i] ? from.shape[i] : 1, &compact))
            return fail(FP8GEMM_SHAPE, argument, "more elements than 64 bits can count");
    }
    if (!from.data && !empty) return fail(FP8GEMM_LAYOUT, argument, "a null pointer with %lld elements",
                                          static_cast<long long>(compact));
    to->data = static_cast<char*>(from.data) + (from.data ? from.byte_offset : 0);
    return FP8GEMM_OK;
}

}  // namespace

int fp8gemm_read_dlpack(const void* managed, int versioned, const char* argument, fp8gemm_tensor* tensor) {
    if (!managed) return fail(FP8GEMM_ARGUMENT, argument, "an empty DLPack capsule");
    if (!versioned) return read(static_cast<const dlpack::ManagedTensor*>(managed)->tensor, false, argument, tensor);
    const auto* m = static_cast<const dlpack::ManagedTensorVersioned*>(managed);
    if (m->version.major != dlpack::kMajor)
        return fail(FP8GEMM_ARGUMENT, argument, "DLPack version %u.%u; only %u.x is understood", m->version.major,
                    m->version.minor, dlpack::kMajor);
    return read(m->tensor, m->flags & dlpack::kReadOnly, argument, tensor);
}

int fp8gemm_read_exchange(const void* api, void* py_object, const char* argument, fp8gemm_tensor* tensor) {
    const auto* exchange = static_cast<const dlpack::ExchangeApi*>(api);
    if (exchange->version.major != dlpack::kMajor || !exchange->tensor_from_object)
        return fail(FP8GEMM_ARGUMENT, argument, "an exchange API of version %u.%u without borrowed tensors",
                    exchange->version.major, exchange->version.minor);
    dlpack::Tensor borrowed{};
    if (exchange->tensor_from_object(py_object, &borrowed))      // with a Python error set
        return fail(FP8GEMM_ARGUMENT, argument, "its framework could not export it");
    return read(borrowed, false, argument, tensor);
}

int fp8gemm_exchange_stream(const void* api, int device_type, int device_id, void** stream) {
    const auto* exchange = static_cast<const dlpack::ExchangeApi*>(api);
    if (exchange->version.major != dlpack::kMajor || !exchange->current_work_stream ||
        exchange->current_work_stream(device_type, device_id, stream))
        return fail(FP8GEMM_ARGUMENT, "stream", "the framework's exchange API names no current stream");
    return FP8GEMM_OK;
}

// ---- our own memory --------------------------------------------------------------------------------------------
struct fp8gemm_buffer {
    std::atomic<int> references{1};
    int device_type, device_id;
    void *data, *stream;
};

int fp8gemm_buffer_new(int device_type, int device_id, size_t bytes, void* stream, fp8gemm_buffer** out) {
    void* data = nullptr;
    if (device_type == dlpack::kCPU) {
        data = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
        if (!data) return fail(FP8GEMM_ARGUMENT, "d", "no memory for %zu bytes", bytes);
    } else {
        FP8GEMM_TRY(allocate(device_id, bytes ? bytes : 1, stream, &data));
    }
    auto* buffer = new (std::nothrow) fp8gemm_buffer;
    if (!buffer) return fail(FP8GEMM_ARGUMENT, "d", "no host memory");
    buffer->device_type = device_type, buffer->device_id = device_id, buffer->data = data, buffer->stream = stream;
    *out = buffer;
    return FP8GEMM_OK;
}

void* fp8gemm_buffer_data(const fp8gemm_buffer* buffer) { return buffer->data; }

void fp8gemm_buffer_release(fp8gemm_buffer* buffer) {
    if (buffer->references.fetch_sub(1) != 1) return;
    if (buffer->device_type == dlpack::kCPU) free(buffer->data);
    else deallocate(buffer->device_id, buffer->data, buffer->stream);
    delete buffer;
}

namespace {

// One allocation holds the DLPack struct and what it points at.
template <class Managed> struct Export {
    Managed managed{};
    int64_t shape[3], stride[3];
    fp8gemm_buffer* buffer;

    static void remove(Managed* m) {
        auto* self = reinterpret_cast<Export*>(m);               // managed is the first member
        fp8gemm_buffer_release(self->buffer);
        delete self;
    }
    static Managed* make(fp8gemm_buffer* buffer, const fp8gemm_tensor& t) {
        auto* self = new (std::nothrow) Export;
        if (!self) return nullptr;
        for (int i = 0; i < 3; ++i) self->shape[i] = t.shape[i], self->stride[i] = t.stride[i];
        self->buffer = buffer;
        buffer->references.fetch_add(1);
        self->managed.deleter = remove;
        self->managed.tensor = {t.data, {t.device_type, t.device_id}, t.ndim,
                                {static_cast<uint8_t>(t.dtype_code), static_cast<uint8_t>(t.dtype_bits), 1},
                                self->shape, self->stride, 0};
        return &self->managed;
    }
};

}  // namespace

void* fp8gemm_buffer_export(fp8gemm_buffer* buffer, const fp8gemm_tensor* tensor, int versioned) {
    if (!versioned) return Export<dlpack::ManagedTensor>::make(buffer, *tensor);
    auto* managed = Export<dlpack::ManagedTensorVersioned>::make(buffer, *tensor);
    if (managed) managed->version = {dlpack::kMajor, dlpack::kMinor};
    return managed;
}

void fp8gemm_dlpack_delete(void* managed, int versioned) {
    if (versioned) {
        auto* m = static_cast<dlpack::ManagedTensorVersioned*>(managed);
        if (m->deleter) m->deleter(m);
    } else {
        auto* m = static_cast<dlpack::ManagedTensor*>(managed);
        if (m->deleter) m->deleter(m);
    }
}

// Destructor of a capsule that nobody consumed: a consumer renames what it takes over. Python's functions are looked up
// in the running interpreter, so that the library itself links to none.
void fp8gemm_capsule_delete(void* capsule) {
    using IsValid = int (*)(void*, const char*);
    using GetPointer = void* (*)(void*, const char*);
    static const auto is_valid = reinterpret_cast<IsValid>(dlsym(RTLD_DEFAULT, "PyCapsule_IsValid"));
    static const auto get_pointer = reinterpret_cast<GetPointer>(dlsym(RTLD_DEFAULT, "PyCapsule_GetPointer"));
    if (!is_valid || !get_pointer) return;
    const char* const names[] = {"dltensor", "dltensor_versioned"};
    for (int versioned = 0; versioned < 2; ++versioned)
        if (is_valid(capsule, names[versioned])) fp8gemm_dlpack_delete(get_pointer(capsule, names[versioned]), versioned);
}
