"""Tensors in and out: capsules as their producers make them, or should not; our own tensors; streams."""

import ctypes
import gc
from collections.abc import Callable
from ctypes import c_int64
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from dlpack_structs import DELETER, LEGACY, USED, VERSIONED, DLTensor, Legacy, Versioned
from hypothesis import given, settings
from hypothesis import strategies as st
from references import Array, Rng, check_accuracy, in_child, random_operands

import fp8gemm
from fp8gemm import (
    BackendUnavailable,
    DeviceError,
    DTypeError,
    LayoutError,
    OperandError,
    ShapeError,
    dlpack,
    native,
    problem,
)

CODES = {"u": 1, "i": 0, "f": 2}


class Producer:
    """Exports an array by capsules of its own making, and counts how often they are deleted."""

    def __init__(self, array: Array, versioned: bool = True, **fields: Any) -> None:
        """`fields` override those of the DLTensor, or `version`, `flags`, `name`, `pointer`."""
        self.array, self.versioned, self.fields = array, versioned, fields
        self.exports: list[Any] = []  # what the capsules point at
        self.deleted = 0
        self.deleter = DELETER(self._delete)

    def _delete(self, managed: int) -> None:
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.fields.get("device_type", 1), self.fields.get("device_id", 0)

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, stream: Any = None) -> object:
        fields = dict(self.fields)
        shape, strides = fields.pop("shape", self.array.shape), [s // self.array.itemsize for s in self.array.strides]
        strides = fields.pop("strides", strides)
        name = fields.pop("name", VERSIONED if self.versioned else LEGACY)
        version, flags = fields.pop("version", (1, 0)), fields.pop("flags", 0)
        tensor = DLTensor(data=self.array.ctypes.data, device_type=1, ndim=len(shape or ()), lanes=1)
        tensor.code, tensor.bits = CODES[self.array.dtype.kind], self.array.itemsize * 8
        tensor.shape = (c_int64 * len(shape))(*shape) if shape is not None else None
        tensor.strides = (c_int64 * len(strides))(*strides) if strides is not None else None
        for field, value in fields.items():
            setattr(tensor, field, value)
        if self.versioned:
            export: Any = Versioned(*version, None, self.deleter, flags, tensor)
        else:
            export = Legacy(tensor, None, self.deleter)
        self.exports.append(export)
        destroy = native.library().capsule_delete_address
        return dlpack._api.PyCapsule_New(ctypes.addressof(export), name, destroy)

    def check_all_deleted(self) -> None:
        gc.collect()
        assert self.exports
        assert self.deleted == len(self.exports)


class OldProducer(Producer):
    """From before DLPack 1.0: knows no `max_version`."""

    def __dlpack__(self, stream: Any = None) -> object:  # type: ignore[override]
        return super().__dlpack__()


def read(x: object) -> native.Tensor:
    return dlpack.read(x, "x").tensor


def described(tensor: native.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tensor.shape[: tensor.ndim]), tuple(tensor.stride[: tensor.ndim])


# ---- in


@pytest.mark.parametrize("kind", [Producer, OldProducer])
@pytest.mark.parametrize("versioned", [False, True])
def test_gemm_from_capsules(rng: Rng, versioned: bool, kind: type[Producer]) -> None:
    """Every operand by capsule; each capsule is deleted exactly once, however often the call is made."""
    operands = random_operands(rng, 9, 70, 144)
    d = np.zeros((9, 70), np.uint16)
    producers = [kind(array, versioned) for array in (*operands, d)]
    a, sa, b, sb, out = producers
    for _ in range(50):
        d[...] = 0x7FDE
        assert fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb), out) is out
        check_accuracy(d, operands)
    for producer in producers:
        assert len(producer.exports) == 50
        producer.check_all_deleted()


def test_capsules_are_deleted_when_the_call_fails(rng: Rng) -> None:
    operands = random_operands(rng, 9, 70, 144)
    producers = [Producer(array, versioned) for array, versioned in zip(operands, (True, False) * 2, strict=True)]
    a, sa, b, sb = producers
    wrong = Producer(np.zeros((9, 71), np.uint16))
    with pytest.raises(ShapeError):
        fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb), wrong)
    for producer in (*producers, wrong):
        producer.check_all_deleted()


@pytest.mark.parametrize("versioned", [False, True])
def test_no_strides_mean_compact(versioned: bool) -> None:
    tensor = read(Producer(np.zeros((3, 5, 7), np.float32), versioned, strides=None))
    assert described(tensor) == ((3, 5, 7), (35, 7, 1))
    tensor = read(Producer(np.zeros((3, 0, 7), np.float32), versioned, strides=None))
    assert described(tensor)[0] == (3, 0, 7)


@pytest.mark.parametrize("versioned", [False, True])
def test_byte_offset(rng: Rng, versioned: bool) -> None:
    operands = random_operands(rng, 9, 70, 144)
    buffer = np.concatenate([np.full(48, 0x7F, np.uint8), operands.a.ravel()])
    a = Producer(buffer, versioned, shape=(9, 144), strides=None, byte_offset=48)
    assert read(a).data == buffer.ctypes.data + 48
    check_accuracy(fp8gemm.gemm_fp8_fp8_bf16_nt((a, operands.sa), operands.rhs).numpy(), operands)


def test_strides_of_capsules(rng: Rng) -> None:
    array = np.zeros((6, 8, 10), np.int32)[::2, 1:, ::5]
    assert described(read(Producer(array))) == ((3, 7, 2), (160, 10, 5))


def test_read_only_capsule(rng: Rng) -> None:
    operands = random_operands(rng, 9, 70, 144)
    d = np.zeros((9, 70), np.uint16)
    assert read(Producer(d, flags=1)).read_only
    assert not read(Producer(d, flags=2)).read_only  # "is a copy"
    assert not read(Producer(d, versioned=False)).read_only
    with pytest.raises(LayoutError, match="d: read-only"):
        fp8gemm.gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, Producer(d, flags=1))
    assert (d == 0).all()
    inputs = [Producer(array, flags=1) for array in operands]
    fp8gemm.gemm_fp8_fp8_bf16_nt((inputs[0], inputs[1]), (inputs[2], inputs[3]), d)
    check_accuracy(d, operands)


def test_device_kinds() -> None:
    array = np.zeros((2, 2), np.float32)
    for given_type, device_id, expected in ((1, 0, (1, 0)), (3, 5, (1, 0)), (2, 5, (2, 5)), (13, 1, (2, 1))):
        tensor = read(Producer(array, device_type=given_type, device_id=device_id))
        assert (tensor.device_type, tensor.device_id) == expected


HUGE = 2**31
BAD: list[tuple[dict[str, Any], type[OperandError], str]] = [
    ({"version": (2, 0)}, OperandError, "x: DLPack version 2.0; only 1.x is understood"),
    ({"version": (0, 8)}, OperandError, "x: DLPack version 0.8; only 1.x is understood"),
    ({"data": None}, LayoutError, "x: a null pointer with 12 elements"),
    ({"shape": (HUGE, 1)}, ShapeError, "x: dimension 0 is 2147483648; the limit is 2147483647"),
    ({"shape": (1, -1)}, ShapeError, "x: dimension 1 is -1; the limit"),
    ({"shape": (HUGE - 1,) * 3}, ShapeError, "x: more elements than 64 bits can count"),
    ({"shape": None, "ndim": 2}, ShapeError, "x: the DLPack tensor has no shape"),
    ({"shape": (1, 1, 1, 1)}, ShapeError, "x: rank 4; at most 3"),
    ({"ndim": 2**31 - 1}, ShapeError, "x: rank 2147483647; at most 3"),
    ({"ndim": -1}, ShapeError, "x: rank -1; at most 3"),
    ({"device_type": 10}, DeviceError, "x: DLPack device type 10; only CPU (1) and CUDA (2)"),
    ({"device_type": -1}, DeviceError, "x: DLPack device type -1; only"),
    ({"name": USED}, OperandError, "x: its __dlpack__ gave no DLPack capsule, or one that was consumed"),
]


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(("fields", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_capsule(fields: dict[str, Any], error: type[OperandError], message: str, versioned: bool) -> None:
    if "version" in fields and not versioned:
        assert read(Producer(np.zeros((3, 4), np.float32), False)).ndim == 2
        return
    producer = Producer(np.zeros((3, 4), np.float32), versioned, **fields)
    with pytest.raises(OperandError) as caught:
        dlpack.read(producer, "x")
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)
    assert caught.value.argument == "x"
    del caught
    gc.collect()
    # a capsule whose name says that it was consumed is no longer ours, nor its maker's, to delete
    assert producer.deleted == (0 if "name" in fields else 1)


def test_null_data_of_an_empty_tensor_is_fine() -> None:
    assert described(read(Producer(np.zeros((0, 4), np.float32), data=None)))[0] == (0, 4)


@pytest.mark.parametrize("what", [None, 3, "dltensor", object()], ids=repr)
def test_dlpack_gives_no_capsule(what: object) -> None:
    class Strange:
        def __dlpack__(self, **_: Any) -> object:
            return what

    with pytest.raises(OperandError, match="gave no DLPack capsule") as caught:
        dlpack.read(Strange(), "x")
    assert caught.value.argument == "x"


def test_errors_of_the_producer_pass() -> None:
    class Broken:
        def __dlpack__(self, **_: Any) -> object:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        dlpack.read(Broken(), "x")


EDGES = st.sampled_from([0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)])
INT64 = st.one_of(st.integers(0, 300), EDGES, st.integers(-(2**63), 2**63 - 1))
INT32 = st.one_of(st.integers(-2, 5), st.integers(-(2**31), 2**31 - 1))


@st.composite
def any_tensor(draw: st.DrawFn, data: int) -> DLTensor:
    """A DLTensor of any content, but for its pointers: they are null, or point where there is something."""
    tensor = DLTensor(data=draw(st.sampled_from([0, data, data + 1])), ndim=draw(st.one_of(st.integers(1, 3), INT32)))
    tensor.device_type = draw(st.one_of(st.sampled_from([1, 1, 2, 3, 13]), INT32))
    tensor.device_id = draw(INT32)
    tensor.code, tensor.bits = draw(
        st.one_of(
            st.sampled_from([(10, 8), (1, 8), (2, 32), (0, 32), (1, 16), (4, 16)]),
            st.tuples(st.integers(0, 255), st.integers(0, 255)),
        )
    )
    tensor.lanes = draw(st.one_of(st.just(1), st.integers(0, 2**16 - 1)))
    tensor.byte_offset = draw(st.one_of(st.just(0), st.integers(0, 64)))
    shape, strides = (draw(st.one_of(st.none(), st.lists(INT64, min_size=3, max_size=3))) for _ in range(2))
    tensor.shape = (c_int64 * 3)(*shape) if shape else None
    tensor.strides = (c_int64 * 3)(*strides) if strides else None
    return tensor


OPERANDS = {"a", "sa", "b", "sb", "d", "m_indices", "group_ends", "masked_m"}


def argument_of(body: Callable[[], object]) -> str | None:
    """The argument that an OperandError names, or None if there is no error."""
    try:
        body()
    except OperandError as error:
        return error.argument
    return None


def read_any(managed: Any, versioned: bool) -> native.Tensor | None:
    """The tensor of a managed struct, or None after a typed error; either is right, so long as what is said is so."""
    tensor = native.Tensor()
    capsule = dlpack._api.PyCapsule_New(ctypes.addressof(managed), VERSIONED if versioned else LEGACY, None)
    failed = argument_of(lambda: native.library().read_capsule(capsule, b"x", ctypes.byref(tensor)))
    if failed is not None:
        assert failed == "x"
        return None
    assert 0 <= tensor.ndim <= 3
    assert all(0 <= size < 2**31 for size in tensor.shape[: tensor.ndim])
    assert tensor.data or 0 in tensor.shape[: tensor.ndim]
    assert tensor.device_type in (native.CPU, native.CUDA)
    return tensor


@settings(max_examples=200)
@given(st.data())
def fuzz(data: st.DataObject) -> None:
    buffer = ctypes.create_string_buffer(256)
    deleted: list[int] = []
    deleter = DELETER(lambda _: deleted.append(1))
    operands = native.Operands(kind=data.draw(st.sampled_from(range(4))))
    kept = []
    for name in ("a", "sa", "b", "sb", "d", "layout"):
        inner = data.draw(any_tensor(ctypes.addressof(buffer)))
        versioned = data.draw(st.booleans())
        managed: Any = Legacy(inner, None, deleter)
        if versioned:
            managed = Versioned(
                data.draw(st.sampled_from([1, 1, 1, 0, 2])), 0, None, deleter, data.draw(INT32) & 3, inner
            )
        kept.append(managed)
        tensor = read_any(managed, versioned)
        if tensor is not None:
            setattr(operands, name, tensor)
    assert argument_of(lambda: problem.describe(operands)) in OPERANDS | {None}
    assert not deleted


@settings(max_examples=200)
@given(st.data())
def fuzz_describe(data: st.DataObject) -> None:
    """The same past the first checks: right types and nearly right shapes, any strides and addresses."""
    kind = data.draw(st.sampled_from(range(4)))
    m, n, k = (data.draw(st.sampled_from([0, 1, 16, 128, 2**31 - 1024, 2**31 - 16])) for _ in range(3))
    blocks = -(-k // 128)
    ranks = {"a": 3 if kind == 3 else 2, "b": 3 if kind else 2}
    ranks |= {"sa": ranks["a"], "sb": ranks["b"], "d": ranks["a"], "layout": 1}
    shapes: dict[str, tuple[int, ...]] = {
        "a": (m, k),
        "sa": (m, blocks),
        "b": (n, k),
        "sb": (-(-n // 128), blocks),
        "d": (m, n),
    }
    shapes["layout"] = (m,) if kind == native.CONTIGUOUS else (2,)
    types = {"a": (10, 8), "b": (10, 8), "sa": (2, 32), "sb": (2, 32), "d": (4, 16), "layout": (0, 32)}
    operands = native.Operands(kind=kind)
    for name, rank in ranks.items():
        shape = (*([2] * (rank - len(shapes[name]))), *shapes[name])
        tensor = native.Tensor(
            device_type=native.CPU, ndim=rank, dtype_lanes=1, data=data.draw(st.integers(0, 2**64 - 1))
        )
        tensor.dtype_code, tensor.dtype_bits = types[name]
        tensor.shape[:rank] = shape
        tensor.stride[:rank] = [data.draw(INT64) for _ in shape]
        tensor.stride[rank - 1] = data.draw(st.sampled_from([1, 1, 1, 0, 2**40]))
        setattr(operands, name, tensor)
    assert argument_of(lambda: problem.describe(operands)) in OPERANDS | {None}


@pytest.mark.parametrize("body", [fuzz, fuzz_describe], ids=["read", "describe"])
def test_no_struct_crashes_the_interpreter(body: Callable[[], None]) -> None:
    in_child(body)


# ---- array interfaces


class Interface:
    def __init__(self, array: Array, attribute: str = "__array_interface__", **changes: Any) -> None:
        interface = {**array.__array_interface__, **changes}
        setattr(self, attribute, {name: value for name, value in interface.items() if value != "absent"})
        self.array = array


def test_gemm_from_array_interfaces(rng: Rng) -> None:
    operands = random_operands(rng, 9, 70, 144)
    d = np.zeros((9, 70), np.uint16)
    a, sa, b, sb, out = (Interface(array) for array in (*operands, d))
    fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb), out)
    check_accuracy(d, operands)


def test_what_an_interface_says() -> None:
    array = np.zeros((6, 8, 10), np.int32)
    assert described(read(Interface(array))) == ((6, 8, 10), (80, 10, 1))
    assert described(read(Interface(array, strides="absent")))[1] == (80, 10, 1)
    assert described(read(Interface(array[::2, 1:, ::5]))) == ((3, 7, 2), (160, 10, 5))
    assert described(read(Interface(np.zeros((), np.float32)))) == ((), ())
    assert read(Interface(array, data=(array.ctypes.data, True))).read_only
    tensor = read(Interface(array, "__cuda_array_interface__"))
    assert (tensor.device_type, tensor.dtype_code, tensor.dtype_bits) == (native.CUDA, 0, 32)
    array.flags.writeable = False
    assert read(array).read_only


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"typestr": ">f4"}, DTypeError, "dtype '>f4'"),
        ({"typestr": "<V2"}, DTypeError, "bf16 as uint16"),
        ({"typestr": "|b1"}, DTypeError, "dtype '|b1'"),
        ({"typestr": "|O8"}, DTypeError, "dtype '|O8'"),
        ({"strides": (16, 3)}, LayoutError, r"strides \(16, 3\) bytes; must be multiples of the 4-byte element"),
        ({"shape": (1, 1, 1, 1)}, ShapeError, "rank 4; at most 3"),
        ({"shape": (2**31, 4)}, ShapeError, "dimension 0 is 2147483648; the limit is 2147483647"),
        ({"shape": (3, -1)}, ShapeError, "dimension 1 is -1; the limit"),
        ({"data": (0, False)}, LayoutError, "a null pointer"),
    ],
)
@pytest.mark.parametrize("attribute", ["__array_interface__", "__cuda_array_interface__"])
def test_bad_interface(changes: dict[str, Any], error: type[OperandError], message: str, attribute: str) -> None:
    with pytest.raises(error, match=message) as caught:
        dlpack.read(Interface(np.zeros((3, 4), np.float32), attribute, **changes), "x")
    assert caught.value.argument == "x"


def test_ml_dtypes_by_their_bits() -> None:
    """They export neither protocol in a type that others know; the message says what to pass."""
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        with pytest.raises(DTypeError, match="pass FP8 as uint8 and bf16 as uint16"):
            read(np.zeros(3, dtype))


# ---- out


def new(shape: tuple[int, ...], dtype: dlpack.DType = dlpack.F32, strides: Any = None) -> fp8gemm.Tensor:
    return fp8gemm.Tensor(shape, dtype, (native.CPU, 0), None, strides)


def from_dlpack(tensor: Any) -> Array:
    array: Array = np.from_dlpack(tensor)  # whose type stubs know DLPack 0.x only
    return array


def mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps]
    return any(int(first, 16) <= address < int(last, 16) for first, last in spans)


BIG = (64, 1 << 20)  # 256 MiB of address space: the allocator gives it back to the system at once


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 1), (9, 0)])
def test_exported_struct(version: tuple[int, int] | None) -> None:
    for dtype in (dlpack.E4M3, dlpack.BF16, dlpack.F32):
        tensor = new((3, 5, 7), dtype)
        capsule = tensor.__dlpack__(max_version=version)
        versioned = version is not None and version >= (1, 0)
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = get_pointer(capsule, VERSIONED if versioned else LEGACY)
        managed: Any = (Versioned if versioned else Legacy).from_address(address)
        inner = managed.tensor
        assert inner.data == tensor.view.data
        assert inner.data % 64 == 0
        assert (inner.device_type, inner.device_id, inner.ndim, inner.byte_offset) == (1, 0, 3, 0)
        assert (inner.code, inner.bits, inner.lanes) == (dtype.code, dtype.bits, 1)
        assert (inner.shape[:3], inner.strides[:3]) == ([3, 5, 7], [35, 7, 1])
        if versioned:
            assert (managed.major, managed.flags) == (1, 0)
    assert tensor.__dlpack_device__() == (1, 0)
    assert repr(tensor) == "fp8gemm.Tensor(shape=(3, 5, 7), dtype=float32, device='cpu')"


def test_numpy_from_dlpack(rng: Rng) -> None:
    tensor = new((3, 5))
    tensor.numpy()[...] = rng.standard_normal((3, 5))
    array = from_dlpack(tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    array[1, 2] = 7
    assert tensor.numpy()[1, 2] == 7


def test_numpy_views() -> None:
    assert new((2, 3), dlpack.BF16).numpy().dtype == np.uint16
    assert new((2, 3), dlpack.E4M3).numpy().dtype == np.uint8
    assert new((0, 3)).numpy().shape == (0, 3)
    view = new((5, 3), strides=(1, 8)).numpy()
    assert view.strides == (4, 32)
    view[...] = np.arange(15).reshape(5, 3)
    assert view[4, 2] == 14


def test_memory_lives_as_long_as_anything_imported() -> None:
    """By capsules of both kinds, consumed and not, by views and by from_dlpack; then it is freed."""
    tensor = new(BIG)
    address = tensor.view.data
    array, view = from_dlpack(tensor), tensor.numpy()[3]
    capsules = [tensor.__dlpack__(), tensor.__dlpack__(max_version=(1, 0))]
    array[5, 7], view[9] = 1, 2
    del tensor
    gc.collect()
    assert mapped(address)
    del view
    gc.collect()
    assert mapped(address)
    capsules.clear()
    assert mapped(address)
    assert array[5, 7] == 1
    del array
    gc.collect()
    assert not mapped(address)


@pytest.mark.parametrize("hold", ["tensor", "capsule", "view"])
def test_one_holder_is_enough(hold: str) -> None:
    tensor: Any = new(BIG)
    address = tensor.view.data
    holder = tensor if hold == "tensor" else tensor.__dlpack__() if hold == "capsule" else tensor.numpy()
    del tensor
    gc.collect()
    assert mapped(address)
    del holder
    gc.collect()
    assert not mapped(address)


def test_our_tensor_as_operand(rng: Rng) -> None:
    """Quantise, multiply, and multiply again into a tensor of ours, without a copy."""
    x, w = rng.standard_normal((20, 272)).astype(np.float32), rng.standard_normal((70, 272)).astype(np.float32)
    lhs, rhs = fp8gemm.per_token_cast_to_fp8(x), fp8gemm.per_block_cast_to_fp8(w)
    d = fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs)
    bits = d.numpy().copy()
    d.numpy()[...] = 0
    assert fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d) is d
    np.testing.assert_array_equal(d.numpy(), bits)


def test_what_an_export_cannot_do() -> None:
    tensor = new((2, 2))
    wishes: list[dict[str, Any]] = [{"copy": True}, {"dl_device": (2, 0)}]
    for options in wishes:
        with pytest.raises(BufferError, match="no copy, no other device"):
            tensor.__dlpack__(**options)
    assert tensor.__dlpack__(copy=False, dl_device=(1, 0), stream=None)


def test_too_much_memory() -> None:
    with pytest.raises(OperandError, match="no memory for 4611686018427387904 bytes"):
        new((2**30, 2**30))


# ---- streams


class Stream:
    def __init__(self, version: int, handle: int) -> None:
        self.answer = version, handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return self.answer


def test_stream_handles() -> None:
    assert dlpack.stream_handle(0) == dlpack.stream_handle(Stream(0, 0)) == dlpack.LEGACY_STREAM
    assert dlpack.stream_handle(12345) == dlpack.stream_handle(Stream(0, 12345)) == 12345
    assert dlpack.stream_handle(2) == 2  # the per-thread default stream


@pytest.mark.parametrize("stream", [-1, True, 1.0, "0", object(), Stream(1, 5)], ids=lambda x: type(x).__name__)
def test_no_stream(stream: object) -> None:
    with pytest.raises(OperandError) as caught:
        dlpack.stream_handle(stream)
    assert caught.value.argument == "stream"
    assert ("version 1; only 0" if isinstance(stream, Stream) else "must be an int") in str(caught.value)


@pytest.mark.parametrize("stream", [0, 1, Stream(0, 5)])
def test_cpu_tensors_take_no_stream(rng: Rng, stream: Any) -> None:
    operands = random_operands(rng, 3, 5, 16)
    x = np.zeros((3, 5), np.float32)
    calls: list[Callable[[], object]] = [
        lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, stream=stream),
        lambda: fp8gemm.per_token_cast_to_fp8(x, stream=stream),
        lambda: fp8gemm.get_col_major_tma_aligned_tensor(x, stream=stream),
    ]
    for call in calls:
        with pytest.raises(OperandError, match="stream: given, but the tensors are on the CPU"):
            call()


def test_stream_of_a_framework() -> None:
    array = Interface(np.zeros(3), "__cuda_array_interface__", stream=77)
    assert dlpack.current_stream(array, 0) == 77
    assert dlpack.current_stream(Interface(np.zeros(3), "__cuda_array_interface__", stream=None), 0) == 1
    assert dlpack.call_stream(None, array, 0) == 77
    assert dlpack.call_stream(5, array, 0) == 5
    assert dlpack.call_stream(None, array, None) is None


def test_cuda_producers_get_the_stream() -> None:
    """And CPU producers that refuse one are asked without; what a CUDA producer raises is the caller's to see."""
    seen: list[Any] = []

    class Recorder(Producer):
        def __dlpack__(self, *, max_version: tuple[int, int] | None = None, stream: Any = "none given") -> object:
            seen.append(stream)
            if stream != "none given" and (self.array is refusing or not self.fields):
                raise RuntimeError("no stream here")
            return super().__dlpack__()

    refusing = np.zeros((2, 2), np.float32)
    array = np.zeros((2, 2), np.float32)
    dlpack.read(Recorder(array, device_type=2), "x", 77)
    dlpack.read(Recorder(array, device_type=2), "x")
    dlpack.read(Recorder(array), "x", 77)
    assert seen == [77, "none given", 77, "none given"]
    with pytest.raises(RuntimeError, match="no stream here"):
        dlpack.read(Recorder(refusing, device_type=2), "x", 77)


# ---- what a stream may still use


class Events:
    """Stands for the driver: events that pass when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.recorded, self.passed = False, 0, 0
        library = native.library()
        monkeypatch.setattr(library, "stream_capturing", self.stream_capturing)
        monkeypatch.setattr(library, "event_record", self.event_record)
        monkeypatch.setattr(library, "event_done", self.event_done)

    def stream_capturing(self, device_id: int, stream: int, capturing: Any) -> None:
        capturing._obj.value = self.capturing

    def event_record(self, device_id: int, stream: int, event: Any) -> None:
        self.recorded += 1
        event._obj.value = self.recorded

    def event_done(self, device_id: int, event: Any, done: Any) -> None:
        done._obj.value = event.value <= self.passed


def test_capsules_are_held_until_the_stream_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    events, held = Events(monkeypatch), dlpack.Held()
    producers = [Producer(np.zeros((2, 2), np.float32), device_type=2) for _ in range(3)]
    for producer in producers:
        held.keep(0, 1, [dlpack.read(producer, "x", 1).owner])
    for passed in (0, 1, 2, 3):
        events.passed = passed
        held.release_finished()
        gc.collect()
        assert [producer.deleted for producer in producers] == [int(i < passed) for i in range(3)]


def test_nothing_is_held_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event can be asked for there: whoever captures keeps the tensors, as for every kernel."""
    events, held = Events(monkeypatch), dlpack.Held()
    events.capturing = True
    held.keep(0, 1, [object()])
    assert events.recorded == 0


def test_a_cuda_tensor_without_a_driver() -> None:
    if fp8gemm.device.hopper_devices():
        return
    with pytest.raises(BackendUnavailable):
        fp8gemm.Tensor((3, 4), dlpack.F32, (native.CUDA, 0), 1)
