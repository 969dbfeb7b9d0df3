// Reads other libraries' tensors, and exports memory of ours.
#include "dlpack.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "driver.h"
#include "error.h"
#include "python.h"

using namespace fp8gemm;

static const CUstream kDefaultStream = static_cast<CUstream>(dlpack::kLegacyStream);

const char* fp8gemm_type_name(const fp8gemm_tensor* tensor) {
    static const char* const codes[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool", "float8_e3m4",
        "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"};
    constexpr int kCodes = sizeof codes / sizeof *codes, kSized = 7;     // the first ones come in several sizes
    static thread_local char name[32];
    const int code = tensor->dtype_code;
    if (code < 0 || code >= kCodes) return "unknown type";
    if (code >= kSized) return codes[code];
    snprintf(name, sizeof name, "%s%d", codes[code], tensor->dtype_bits);
    return name;
}

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

const char* const kCapsules[] = {"dltensor", "dltensor_versioned"};

}  // namespace

int fp8gemm_read_capsule(void* object, const char* argument, fp8gemm_tensor* tensor) {
    const Python* py = python();
    auto* capsule = static_cast<PyObject*>(object);
    if (py && py->PyCapsule_IsValid(capsule, kCapsules[0])) {
        const void* managed = py->PyCapsule_GetPointer(capsule, kCapsules[0]);
        return read(static_cast<const dlpack::ManagedTensor*>(managed)->tensor, false, argument, tensor);
    }
    if (!py || !py->PyCapsule_IsValid(capsule, kCapsules[1]))
        return fail(FP8GEMM_ARGUMENT, argument, "its __dlpack__ gave no DLPack capsule, or one that was consumed");
    const void* managed = py->PyCapsule_GetPointer(capsule, kCapsules[1]);
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
    void* data = nullptr;
    CUevent written = nullptr;                   // passes once the work that fills the memory is done
    std::atomic<bool> read_by_default_stream{false};
};

namespace {

// CUDA memory, there for `stream` to write.
int allocate(fp8gemm_buffer& buffer, size_t bytes, CUstream stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(buffer.device_id, &cu));
    int capturing = 0;
    FP8GEMM_CU(*cu, cuStreamIsCapturing, stream, &capturing);
    if (capturing) return fail(FP8GEMM_NOT_PREPARED, "d", "d=None allocates, which a stream capture can't; pass d");
    CUstream own;
    FP8GEMM_TRY(own_stream(*cu, buffer.device_id, &own));
    FP8GEMM_CU(*cu, cuEventCreate, &buffer.written, kDisableTiming);
    CUdeviceptr pointer;
    FP8GEMM_CU(*cu, cuMemAllocAsync, &pointer, bytes ? bytes : 1, own);
    buffer.data = reinterpret_cast<void*>(pointer);
    FP8GEMM_CU(*cu, cuEventRecord, buffer.written, own);         // for now: the memory is there
    FP8GEMM_CU(*cu, cuStreamWaitEvent, stream, buffer.written, 0);
    return FP8GEMM_OK;
}

// After the work that filled it and, if that stream read it, what the default stream has been given so far. Readers on
// other streams keep the tensor until they are done. Where that order can't be had (a capture, the process' end), the
// memory stays allocated.
void deallocate(fp8gemm_buffer& buffer) {
    const Driver* cu;
    ContextScope scope;
    CUstream own;
    if (scope.enter(buffer.device_id, &cu) || own_stream(*cu, buffer.device_id, &own)) return;
    int mode = kRelaxed;                         // another thread may be capturing
    cu->cuThreadExchangeStreamCaptureMode(&mode);
    if (buffer.data) {
        CUresult result = cu->cuStreamWaitEvent(own, buffer.written, 0);
        if (!result && buffer.read_by_default_stream) {
            result = cu->cuEventRecord(buffer.written, kDefaultStream);
            if (!result) result = cu->cuStreamWaitEvent(own, buffer.written, 0);
        }
        if (!result) cu->cuMemFreeAsync(reinterpret_cast<CUdeviceptr>(buffer.data), own);
    }
    if (buffer.written) cu->cuEventDestroy_v2(buffer.written);
    cu->cuThreadExchangeStreamCaptureMode(&mode);
}

}  // namespace

int fp8gemm_buffer_new(int device_type, int device_id, size_t bytes, void* stream, fp8gemm_buffer** out) {
    auto* buffer = new (std::nothrow) fp8gemm_buffer;
    if (!buffer) return fail(FP8GEMM_ARGUMENT, "d", "no host memory");
    buffer->device_type = device_type, buffer->device_id = device_id;
    int status = FP8GEMM_OK;
    if (device_type == dlpack::kCUDA) {
        status = allocate(*buffer, bytes, static_cast<CUstream>(stream));
    } else {
        buffer->data = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
        if (!buffer->data) status = fail(FP8GEMM_ARGUMENT, "d", "no memory for %zu bytes", bytes);
    }
    if (status) fp8gemm_buffer_release(buffer);
    else *out = buffer;
    return status;
}

void* fp8gemm_buffer_data(const fp8gemm_buffer* buffer) { return buffer->data; }

// In a capture both say nothing: an event must not cross its border, and the graph's owner orders its replays.
int fp8gemm_buffer_written(fp8gemm_buffer* buffer, void* stream) {
    const Driver* cu;
    ContextScope scope;
    int capturing = 0;
    FP8GEMM_TRY(scope.enter(buffer->device_id, &cu));
    FP8GEMM_CU(*cu, cuStreamIsCapturing, static_cast<CUstream>(stream), &capturing);
    if (capturing) return FP8GEMM_OK;
    FP8GEMM_CU(*cu, cuEventRecord, buffer->written, static_cast<CUstream>(stream));
    return FP8GEMM_OK;
}

int fp8gemm_buffer_await(fp8gemm_buffer* buffer, void* stream) {
    const Driver* cu;
    ContextScope scope;
    FP8GEMM_TRY(scope.enter(buffer->device_id, &cu));
    int capturing = 0;
    FP8GEMM_CU(*cu, cuStreamIsCapturing, static_cast<CUstream>(stream), &capturing);
    if (capturing) return FP8GEMM_OK;
    if (static_cast<CUstream>(stream) == kDefaultStream) buffer->read_by_default_stream = true;
    FP8GEMM_CU(*cu, cuStreamWaitEvent, static_cast<CUstream>(stream), buffer->written, 0);
    return FP8GEMM_OK;
}

void fp8gemm_buffer_release(fp8gemm_buffer* buffer) {
    if (buffer->references.fetch_sub(1) != 1) return;
    if (buffer->device_type == dlpack::kCUDA) deallocate(*buffer);
    else free(buffer->data);
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

// Destructor of a capsule that nobody consumed: a consumer renames what it takes over.
void fp8gemm_capsule_delete(void* object) {
    const Python* py = python();
    auto* capsule = static_cast<PyObject*>(object);
    for (int versioned = 0; py && versioned < 2; ++versioned)
        if (py->PyCapsule_IsValid(capsule, kCapsules[versioned]))
            fp8gemm_dlpack_delete(py->PyCapsule_GetPointer(capsule, kCapsules[versioned]), versioned);
}
