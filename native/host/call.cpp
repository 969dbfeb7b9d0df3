// The call itself: a builtin that takes the common call from its tensors to its launch without running any Python.
//
// That is: CUDA tensors whose type has DLPack's exchange API, with d given, and a plan in the table. Every other call,
// and every wrong one, it hands to the Python function that it was made with (gemm.py's `_call`), which goes the long
// way through the same checks and has the words for what is wrong. Nothing has been launched by then.
#include <atomic>

#include "dlpack.h"
#include "error.h"
#include "lock.h"
#include "python.h"

using namespace fp8gemm;

namespace {

constexpr char kAttribute[] = "__dlpack_c_exchange_api__", kCapsule[] = "dlpack_exchange_api";

// The exchange API of the few types that tensors have. A type that is in here is never freed, so its address stands for
// it; nor is the capsule. What doesn't fit, or has no API (yet), is looked up each time.
struct KnownType {
    std::atomic<PyObject*> type;                 // written last
    const void* api;
};
KnownType known_types[16];

const void* look_up(const Python& py, PyObject* type) {
    PyObject* capsule = py.PyObject_GetAttrString(type, kAttribute);
    const bool valid = capsule && py.PyCapsule_IsValid(capsule, kCapsule);
    const void* api = valid ? py.PyCapsule_GetPointer(capsule, kCapsule) : nullptr;
    if (!capsule) py.PyErr_Clear();
    if (api) {
        Lock lock;
        for (KnownType& known : known_types)
            if (!known.type.load(std::memory_order_relaxed)) {
                known.api = api;
                py.Py_IncRef(type);
                known.type.store(type, std::memory_order_release);
                return api;                      // and the capsule stays ours
            }
    }
    if (capsule) py.Py_DecRef(capsule);
    return api;
}

const void* exchange_api(const Python& py, PyObject* object) {
    PyObject* type = py.PyObject_Type(object);
    const void* api = nullptr;
    for (const KnownType& known : known_types) {
        PyObject* candidate = known.type.load(std::memory_order_acquire);
        if (candidate == type) api = known.api;
        if (!candidate || candidate == type) break;
    }
    if (!api) api = look_up(py, type);
    py.Py_DecRef(type);
    return api;
}

struct Arguments {                               // as gemm.py passes them
    PyObject *kind, *lhs, *rhs, *d, *layout, *stream, *batch_invariant, *expected_m, *validate;
};
constexpr intptr_t kArguments = sizeof(Arguments) / sizeof(PyObject*);

bool is_int(const Python& py, PyObject* object) {                // no bool
    PyObject* type = py.PyObject_Type(object);
    py.Py_DecRef(type);
    return type == py.PyLong_Type;
}

bool read_pair(const Python& py, PyObject* object, PyObject** values, PyObject** scales) {
    PyObject* type = py.PyObject_Type(object);
    const bool tuple = type == py.PyTuple_Type || py.PyType_IsSubtype(type, py.PyTuple_Type);
    py.Py_DecRef(type);
    if (!tuple || py.PyTuple_Size(object) != 2) return false;
    *values = py.PyTuple_GetItem(object, 0), *scales = py.PyTuple_GetItem(object, 1);
    return true;
}

bool read_tensor(const Python& py, PyObject* object, const char* name, fp8gemm_tensor* tensor, const void** api) {
    *api = exchange_api(py, object);
    return *api && !fp8gemm_read_exchange(*api, object, name, tensor);
}

bool read_stream(const Python& py, PyObject* given, const void* api, int device_id, void** stream) {
    *stream = nullptr;
    if (given == py._Py_NoneStruct) {
        if (fp8gemm_exchange_stream(api, dlpack::kCUDA, device_id, stream)) return false;
    } else {
        if (!is_int(py, given)) return false;
        *stream = reinterpret_cast<void*>(py.PyLong_AsUnsignedLongLong(given));
        if (py.PyErr_Occurred()) return false;
    }
    if (!*stream) *stream = dlpack::kLegacyStream;
    return true;
}

bool launched(const Python& py, const Arguments& given) {
    if (given.d == py._Py_NoneStruct || given.validate != py._Py_FalseStruct) return false;
    PyObject *a, *sa, *b, *sb;
    if (!read_pair(py, given.lhs, &a, &sa) || !read_pair(py, given.rhs, &b, &sb)) return false;
    if (!is_int(py, given.expected_m)) return false;
    const long long expected_m = py.PyLong_AsLongLong(given.expected_m);
    if (expected_m < 0) return false;            // also an error: too large
    const int invariant = given.batch_invariant == py._Py_TrueStruct    ? 1
                          : given.batch_invariant == py._Py_FalseStruct ? 0
                                                                        : -1;
    if (invariant < 0 && given.batch_invariant != py._Py_NoneStruct) return false;

    fp8gemm_operands operands;
    const void* api;                             // of the tensor read last: d
    operands.kind = static_cast<int32_t>(py.PyLong_AsLongLong(given.kind));
    operands.layout.ndim = -1;
    if (!read_tensor(py, a, "a", &operands.a, &api) || operands.a.device_type != dlpack::kCUDA) return false;
    if (!read_tensor(py, sa, "sa", &operands.sa, &api) || !read_tensor(py, b, "b", &operands.b, &api) ||
        !read_tensor(py, sb, "sb", &operands.sb, &api))
        return false;
    const bool grouped = operands.kind != FP8GEMM_DENSE;
    if (grouped && !read_tensor(py, given.layout, "layout", &operands.layout, &api)) return false;
    if (!read_tensor(py, given.d, "d", &operands.d, &api)) return false;

    fp8gemm_problem problem;
    fp8gemm_key key;
    void* stream;
    if (fp8gemm_describe(&operands, &problem) || !problem.m) return false;
    if (!read_stream(py, given.stream, api, problem.device_id, &stream)) return false;
    fp8gemm_make_key(&problem, expected_m, invariant, &key);
    const fp8gemm_entry* entry = fp8gemm_find(&key);
    if (!entry) return false;
    // A launch waits while the stream's queue is full, and what drains it may be a callback that needs the interpreter.
    PyThreadState* state = py.PyEval_SaveThread();
    const int status = fp8gemm_run(entry, &operands, &problem, stream);
    py.PyEval_RestoreThread(state);
    return !status;
}

PyObject* call(PyObject* otherwise, PyObject* const* arguments, intptr_t count) {
    const Python& py = *python();
    if (count == kArguments) {
        const auto& given = *reinterpret_cast<const Arguments*>(arguments);
        if (launched(py, given)) {
            py.Py_IncRef(given.d);
            return given.d;
        }
        py.PyErr_Clear();                        // what made it give up is found again, and said
    }
    return py.PyObject_Vectorcall(otherwise, arguments, count, nullptr);
}

PyMethodDef definition = {"call", call, kFastCall,
                          "call(kind, lhs, rhs, d, layout, stream, batch_invariant, expected_m, validate)"};

}  // namespace

void* fp8gemm_python_call(void* otherwise) {
    const Python* py = python();
    return py ? py->PyCFunction_NewEx(&definition, static_cast<PyObject*>(otherwise), nullptr) : nullptr;
}

const void* fp8gemm_exchange_api(void* object) {
    const Python* py = python();
    return py ? exchange_api(*py, static_cast<PyObject*>(object)) : nullptr;
}
