// DLPack's structs, as its specification lays them out (version 1.3): https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace fp8gemm::dlpack {

struct Device { int32_t type, id; };
struct DataType { uint8_t code, bits; uint16_t lanes; };
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;                            // in elements; null means compact (before version 1.2)
    uint64_t byte_offset;
};
struct ManagedTensor {                           // capsule "dltensor"
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};
struct Version { uint32_t major, minor; };
struct ManagedTensorVersioned {                  // capsule "dltensor_versioned"
    Version version;
    void* context;
    void (*deleter)(ManagedTensorVersioned*);
    uint64_t flags;
    Tensor tensor;
};
constexpr uint64_t kReadOnly = 1;
constexpr uint32_t kMajor = 1, kMinor = 0;       // what we read and write

struct ExchangeApi {                             // `type(x).__dlpack_c_exchange_api__`, capsule "dlpack_exchange_api"
    Version version;
    ExchangeApi* previous;
    int (*allocate)(Tensor*, ManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
    int (*managed_from_object)(void*, ManagedTensorVersioned**);
    int (*managed_to_object)(ManagedTensorVersioned*, void**);
    int (*tensor_from_object)(void*, Tensor*);   // borrowed, unsynchronised; may be null
    int (*current_work_stream)(int32_t, int32_t, void**);
};

inline void* const kLegacyStream = reinterpret_cast<void*>(1);          // the default stream: CU_STREAM_LEGACY
enum DeviceType { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kE4M3FN = 10 };

}  // namespace fp8gemm::dlpack
