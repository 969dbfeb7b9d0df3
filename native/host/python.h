// CPython, found in the running interpreter: only the calls used here, all of its stable ABI, so that one library fits
// every version from 3.11 on and programs without Python can use it too.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fp8gemm {

using PyObject = struct PyObject_;
using PyThreadState = struct PyThreadState_;

struct PyMethodDef {
    const char* name;
    PyObject* (*function)(PyObject* self, PyObject* const* arguments, intptr_t count);
    int flags;
    const char* doc;
};
constexpr int kFastCall = 0x80;                  // METH_FASTCALL

// result, name, arguments
#define FP8GEMM_PYTHON_CALLS(X)                                     \
    X(void, Py_IncRef, PyObject*)                                   \
    X(void, Py_DecRef, PyObject*)                                   \
    X(PyObject*, PyObject_Type, PyObject*)                          \
    X(PyObject*, PyObject_GetAttrString, PyObject*, const char*)    \
    X(int, PyType_IsSubtype, PyObject*, PyObject*)                  \
    X(intptr_t, PyTuple_Size, PyObject*)                            \
    X(PyObject*, PyTuple_GetItem, PyObject*, intptr_t)              \
    X(long long, PyLong_AsLongLong, PyObject*)                      \
    X(unsigned long long, PyLong_AsUnsignedLongLong, PyObject*)     \
    X(int, PyCapsule_IsValid, PyObject*, const char*)               \
    X(void*, PyCapsule_GetPointer, PyObject*, const char*)          \
    X(PyObject*, PyCFunction_NewEx, PyMethodDef*, PyObject*, PyObject*) \
    X(PyObject*, PyObject_Vectorcall, PyObject*, PyObject* const*, size_t, PyObject*) \
    X(PyObject*, PyErr_Occurred)                                    \
    X(void, PyErr_Clear)                                            \
    X(PyThreadState*, PyEval_SaveThread)                            \
    X(void, PyEval_RestoreThread, PyThreadState*)
#define FP8GEMM_PYTHON_OBJECTS(X)                                   \
    X(_Py_NoneStruct) X(_Py_TrueStruct) X(_Py_FalseStruct) X(PyTuple_Type) X(PyLong_Type)

struct Python {
#define FP8GEMM_DECLARE(result, name, ...) result (*name)(__VA_ARGS__);
    FP8GEMM_PYTHON_CALLS(FP8GEMM_DECLARE)
#undef FP8GEMM_DECLARE
#define FP8GEMM_DECLARE(name) PyObject* name;
    FP8GEMM_PYTHON_OBJECTS(FP8GEMM_DECLARE)
#undef FP8GEMM_DECLARE
};

const Python* python();                          // null if this process runs no CPython

}  // namespace fp8gemm
