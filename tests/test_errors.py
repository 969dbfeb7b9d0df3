"""Every bad input: the type of its error, the argument, value and limit that it names, and that d stays as it was."""

import ctypes
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from references import (
    A100,
    BF16,
    E4M3,
    H100,
    POISON,
    Array,
    Rng,
    native_tensor,
    random_operands,
)

import fp8gemm
from fp8gemm import (
    BackendUnavailable,
    CompileError,
    DeviceError,
    DTypeError,
    Fp8GemmError,
    LayoutError,
    OperandError,
    PlanError,
    ShapeError,
    backends,
    compiler,
    device,
    errors,
    native,
    problem,
)

M, N, K, G = 40, 300, 272, 3  # of every call below; masked: M rows of each group
Arguments = dict[str, Any]
KINDS = ["dense", "contiguous", "ragged", "masked"]
LAYOUTS = {"contiguous": "m_indices", "ragged": "group_ends", "masked": "masked_m"}


def make_arguments(rng: Rng, kind: str) -> Arguments:
    """A legal call's operands, by the names that errors give them."""
    groups_a, groups_b = ((G,) if kind == "masked" else ()), (() if kind == "dense" else (G,))
    arguments: Arguments = random_operands(rng, M, N, K, groups_a, groups_b)._asdict()
    arguments["d"] = np.full((*groups_a, M, N), POISON, np.uint16)
    if kind == "contiguous":
        arguments["m_indices"] = np.full(M, 1, np.int32)
    elif kind != "dense":
        arguments[LAYOUTS[kind]] = np.array([1, 20, M], np.int32)
    return arguments


def call(kind: str, arguments: Arguments) -> Any:
    """The public function of that kind, on those arguments."""
    rest = dict(arguments)
    lhs, rhs = (rest.pop("a"), rest.pop("sa")), (rest.pop("b"), rest.pop("sb"))
    if kind == "dense":
        return fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, **rest)
    if kind == "masked":
        return fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, **rest)
    return fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, **rest)


def expect(error: type[Fp8GemmError], argument: str | None, texts: tuple[str, ...], body: Callable[[], object]) -> None:
    """`body` raises exactly that type, names that argument, and its message holds each of the texts."""
    with pytest.raises(Fp8GemmError) as caught:
        body()
    message = str(caught.value)
    assert type(caught.value) is error, message
    if isinstance(caught.value, OperandError):
        assert caught.value.argument == argument
        assert message.startswith(f"{argument}: ")
    for text in texts:
        assert text in message, message


def misaligned(array: Array, by: int) -> Array:
    """A copy whose address is `by` bytes past what its elements want."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64 + by
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def spread(array: Array) -> Array:
    """The same values with every second element of a row between them."""
    return array.repeat(2, -1)[..., ::2]


def overlapping_rows(array: Array) -> Array:
    steps = (*array.strides[:-2], array.strides[-2] - array.itemsize, array.itemsize)
    return np.lib.stride_tricks.as_strided(array.copy(), array.shape, steps)


def more(array: Array, axis: int, by: int = 1) -> Array:
    """One longer (or shorter) along an axis."""
    if by < 0:
        return np.ascontiguousarray(array.take(range(array.shape[axis] + by), axis))
    return np.concatenate([array, array.take(range(by), axis)], axis)


def change(name: str, how: Callable[[Any], Any]) -> Callable[[Arguments], None]:
    def apply(arguments: Arguments) -> None:
        arguments[name] = how(arguments[name])

    return apply


def to(name: str, dtype: Any) -> Callable[[Arguments], None]:
    return change(name, lambda array: array.astype(dtype))


def d_inside(name: str) -> Callable[[Arguments], None]:
    """d takes the memory of an input."""

    def apply(arguments: Arguments) -> None:
        source, d = arguments[name], arguments["d"]
        memory = np.zeros(max(source.nbytes, d.nbytes) + 8, np.uint8)
        memory[: d.nbytes].view(np.uint16)[...] = POISON
        arguments["d"] = memory[: d.nbytes].view(np.uint16).reshape(d.shape)
        arguments[name] = memory[: source.nbytes].view(source.dtype).reshape(source.shape)

    return apply


def both_columns(arguments: Arguments) -> None:
    """d and a side by side in one buffer, but a begins where the last element of d's row is."""
    buffer = np.full((M, N + K // 2 - 1), POISON, np.uint16)
    arguments["d"] = buffer[:, :N]
    arguments["a"] = buffer.view(np.uint8)[:, 2 * N - 2 :]


INDICES, ENDS, COUNTS = LAYOUTS.values()
CODE, SCALE = "float8_e4m3fn (or uint8 holding its bits)", "float32"
CONTIGUOUS = "must be contiguous (stride 1)"
Case = tuple[str, str, Callable[[Arguments], None], type[OperandError], str, tuple[str, ...]]
CASES: list[Case] = [
    # kind, what, how, error, argument, the message holds
    ("dense", "a of float32", to("a", np.float32), DTypeError, "a", ("float32", CODE)),
    ("dense", "a of int8", to("a", np.int8), DTypeError, "a", ("int8", CODE)),
    ("dense", "a of uint16", to("a", np.uint16), DTypeError, "a", ("uint16", CODE)),
    ("dense", "a of ml_dtypes", change("a", lambda a: a.view(E4M3)), DTypeError, "a", ("V1", "pass FP8 as uint8")),
    ("dense", "b of bool", to("b", np.bool_), DTypeError, "b", ("bool", CODE)),
    ("dense", "sa of float64", to("sa", np.float64), DTypeError, "sa", ("float64", SCALE)),
    ("dense", "sb of float16", to("sb", np.float16), DTypeError, "sb", ("float16", SCALE)),
    ("dense", "sb of int32", to("sb", np.int32), DTypeError, "sb", ("int32", SCALE)),
    ("dense", "sa of complex", to("sa", np.complex64), DTypeError, "sa", ("complex64", SCALE)),
    ("dense", "d of float16", to("d", np.float16), DTypeError, "d", ("float16", "bfloat16 (or uint16")),
    ("dense", "d of float32", to("d", np.float32), DTypeError, "d", ("float32", "bfloat16")),
    ("dense", "d of ml_dtypes", change("d", lambda d: d.view(BF16)), DTypeError, "d", ("V2", "bf16 as uint16")),
    ("dense", "a is a list", change("a", lambda a: a.tolist()), DTypeError, "a", ("list is no tensor",)),
    ("dense", "sa is None", change("sa", lambda a: None), DTypeError, "sa", ("NoneType is no tensor",)),
    ("dense", "d is a number", change("d", lambda d: 3), DTypeError, "d", ("int is no tensor",)),
    ("contiguous", "int64", to(INDICES, np.int64), DTypeError, INDICES, ("int64", "int32")),
    ("ragged", "int64", to(ENDS, np.int64), DTypeError, ENDS, ("int64", "int32")),
    ("masked", "int64", to(COUNTS, np.int64), DTypeError, COUNTS, ("int64", "int32")),
    ("masked", "uint32", to(COUNTS, np.uint32), DTypeError, COUNTS, ("uint32", "int32")),
    ("masked", "none", change(COUNTS, lambda x: None), DTypeError, COUNTS, ("NoneType is no tensor",)),
    # ranks
    ("dense", "a of rank 1", change("a", lambda a: a[0]), ShapeError, "a", ("(272,)", "rank 2 = (M, K)")),
    ("dense", "a of rank 3", change("a", lambda a: a[None]), ShapeError, "a", ("(1, 40, 272)", "rank 2")),
    ("dense", "a of rank 4", change("a", lambda a: a[None, None]), ShapeError, "a", ("rank 4", "at most 3")),
    ("dense", "b of rank 3", change("b", lambda b: b[None]), ShapeError, "b", ("(1, 300, 272)", "rank 2 = (N, K)")),
    ("dense", "sa of rank 1", change("sa", lambda s: s[:, 0]), ShapeError, "sa", ("(40,)", "(40, 3)")),
    ("dense", "sb of rank 3", change("sb", lambda s: s[None]), ShapeError, "sb", ("(1, 3, 3)", "(3, 3)")),
    ("dense", "d of rank 1", change("d", lambda d: d[0]), ShapeError, "d", ("(300,)", "(40, 300) = (M, N)")),
    ("contiguous", "b of rank 2", change("b", lambda b: b[0]), ShapeError, "b", ("(300, 272)", "rank 3 = (G, N, K)")),
    ("masked", "a of rank 2", change("a", lambda a: a[0]), ShapeError, "a", ("(40, 272)", "(G, Mmax, K)")),
    ("masked", "counts of rank 2", change(COUNTS, lambda x: x[None]), ShapeError, COUNTS, ("(1, 3)", "(3,)")),
    ("ragged", "ends of rank 0", change(ENDS, lambda x: x[0, ...]), ShapeError, ENDS, ("()", "(3,)")),
    # shapes
    ("dense", "K of b", change("b", lambda b: more(b, 1, -16)), ShapeError, "b", ("K = 256", "a has K = 272")),
    ("dense", "sa a row short", change("sa", lambda s: more(s, 0, -1)), ShapeError, "sa", ("(39, 3)", "(40, 3)")),
    ("dense", "sa a row long", change("sa", lambda s: more(s, 0)), ShapeError, "sa", ("(41, 3)", "(40, 3)")),
    ("dense", "sa a block short", change("sa", lambda s: more(s, 1, -1)), ShapeError, "sa", ("(40, 2)", "(40, 3)")),
    ("dense", "sa a block long", change("sa", lambda s: more(s, 1)), ShapeError, "sa", ("(40, 4)", "(40, 3)")),
    ("dense", "sa transposed", change("sa", lambda s: s.T), ShapeError, "sa", ("(3, 40)", "(40, 3)")),
    ("dense", "sb a block short", change("sb", lambda s: more(s, 0, -1)), ShapeError, "sb", ("(2, 3)", "(3, 3)")),
    ("dense", "sb a block long", change("sb", lambda s: more(s, 0)), ShapeError, "sb", ("(4, 3)", "(3, 3)")),
    ("dense", "sb short along K", change("sb", lambda s: more(s, 1, -1)), ShapeError, "sb", ("(3, 2)", "(3, 3)")),
    ("dense", "sb per row", change("sb", lambda s: s.repeat(100, 0)), ShapeError, "sb", ("(300, 3)", "(3, 3)")),
    ("dense", "d a row short", change("d", lambda d: more(d, 0, -1)), ShapeError, "d", ("(39, 300)", "(40, 300)")),
    ("dense", "d a column long", change("d", lambda d: more(d, 1)), ShapeError, "d", ("(40, 301)", "(40, 300)")),
    ("dense", "d transposed", change("d", lambda d: d.T), ShapeError, "d", ("(300, 40)", "(40, 300)")),
    ("dense", "K of 264", change("a", lambda a: more(a, 1, -8)), ShapeError, "a", ("K = 264", "multiple of 16")),
    ("dense", "N of 0", change("b", lambda b: b[:0]), ShapeError, "b", ("N = 0", "at least 1")),
    ("ragged", "no groups", change("b", lambda b: b[:0]), ShapeError, "b", ("G = 0", "at least 1")),
    ("ragged", "groups of sb", change("sb", lambda s: more(s, 0, -1)), ShapeError, "sb", ("(2, 3, 3)", "(3, 3, 3)")),
    ("ragged", "too few ends", change(ENDS, lambda x: x[:2]), ShapeError, ENDS, ("(2,)", "(3,) = (G,)")),
    ("contiguous", "too few indices", change(INDICES, lambda x: x[:-1]), ShapeError, INDICES, ("(39,)", "(40,)")),
    ("masked", "G of a", change("a", lambda a: more(a, 0)), ShapeError, "a", ("G = 4", "b has G = 3")),
    ("masked", "G of sa", change("sa", lambda s: more(s, 0)), ShapeError, "sa", ("(4, 40, 3)", "(3, 40, 3)")),
    ("masked", "G of d", change("d", lambda d: more(d, 0, -1)), ShapeError, "d", ("(2, 40, 300)", "(3, 40, 300)")),
    ("masked", "too many counts", change(COUNTS, lambda x: more(x, 0)), ShapeError, COUNTS, ("(4,)", "(3,)")),
    # strides, alignment, what may be written
    ("dense", "a spread", change("a", spread), LayoutError, "a", ("stride 2", CONTIGUOUS)),
    ("dense", "b column-major", change("b", np.asfortranarray), LayoutError, "b", ("stride 300", CONTIGUOUS)),
    ("dense", "d column-major", change("d", np.asfortranarray), LayoutError, "d", ("stride 40", CONTIGUOUS)),
    ("dense", "d spread", change("d", spread), LayoutError, "d", ("stride 2", CONTIGUOUS)),
    ("dense", "a upside down", change("a", lambda a: a[::-1]), LayoutError, "a", ("stride -272", "0 to 2^40")),
    ("dense", "a mirrored", change("a", lambda a: a[:, ::-1]), LayoutError, "a", ("stride -1",)),
    ("dense", "sa upside down", change("sa", lambda s: s[::-1]), LayoutError, "sa", ("stride -3", "0 to 2^40")),
    ("dense", "d upside down", change("d", lambda d: d[::-1]), LayoutError, "d", ("stride -300", "0 to 2^40")),
    ("dense", "d read-only", change("d", read_only), LayoutError, "d", ("read-only",)),
    ("dense", "rows of d overlap", change("d", overlapping_rows), LayoutError, "d", ("stride 299", "least is 300")),
    ("masked", "groups of d overlap", change("d", lambda d: np.lib.stride_tricks.as_strided(d, d.shape, (600, 600, 2))),
     LayoutError, "d", ("stride 300", "least is 12000")),
    ("dense", "sa at 2", change("sa", lambda s: misaligned(s, 2)), LayoutError, "sa", ("0x", "multiple of 4 bytes")),
    ("dense", "sb at 1", change("sb", lambda s: misaligned(s, 1)), LayoutError, "sb", ("0x", "multiple of 4 bytes")),
    ("dense", "d at 1", change("d", lambda d: misaligned(d, 1)), LayoutError, "d", ("0x", "multiple of 2 bytes")),
    ("contiguous", "at 2", change(INDICES, lambda x: misaligned(x, 2)), LayoutError, INDICES, ("multiple of 4",)),
    ("masked", "at 2", change(COUNTS, lambda x: misaligned(x, 2)), LayoutError, COUNTS, ("multiple of 4 bytes",)),
    ("ragged", "spread", change(ENDS, spread), LayoutError, ENDS, ("stride 2", CONTIGUOUS)),
    ("dense", "d in a", d_inside("a"), LayoutError, "d", ("overlaps a", "apart from every input")),
    ("dense", "d in sa", d_inside("sa"), LayoutError, "d", ("overlaps sa",)),
    ("dense", "d in b", d_inside("b"), LayoutError, "d", ("overlaps b",)),
    ("dense", "d in sb", d_inside("sb"), LayoutError, "d", ("overlaps sb",)),
    ("dense", "d beside a, an element too near", both_columns, LayoutError, "d", ("overlaps a",)),
    ("contiguous", "d in m_indices", d_inside(INDICES), LayoutError, "d", ("overlaps m_indices",)),
    ("ragged", "d in group_ends", d_inside(ENDS), LayoutError, "d", ("overlaps group_ends",)),
    ("masked", "d in masked_m", d_inside(COUNTS), LayoutError, "d", ("overlaps masked_m",)),
    ("masked", "d in a", d_inside("a"), LayoutError, "d", ("overlaps a",)),
    # what is no tensor
    ("dense", "stream", lambda x: x.update(stream=7), OperandError, "stream", ("tensors are on the CPU",)),
    ("contiguous", "both", lambda x: x.update(group_ends=x[INDICES]), OperandError, INDICES, ("both", "exactly one")),
    ("contiguous", "neither", lambda x: x.pop(INDICES), OperandError, INDICES, ("neither", "exactly one")),
    ("ragged", "expected_m", lambda x: x.update(expected_m=-1), OperandError, "expected_m", ("-1", "at least 0")),
    ("masked", "expected_m", lambda x: x.update(expected_m=1.5), OperandError, "expected_m", ("1.5", "an int")),
    ("masked", "true", lambda x: x.update(expected_m=True), OperandError, "expected_m", ("True", "an int")),
    ("dense", "maybe", lambda x: x.update(batch_invariant="no"), OperandError, "batch_invariant", ("'no'", "a bool")),
    ("dense", "one", lambda x: x.update(batch_invariant=1), OperandError, "batch_invariant", ("1", "a bool")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "how", "error", "argument", "texts"),
    [(kind, how, error, argument, texts) for kind, _, how, error, argument, texts in CASES],
    ids=[f"{kind}-{what}" for kind, what, *_ in CASES],
)
def test_bad_argument(
    rng: Rng,
    kind: str,
    how: Callable[[Arguments], None],
    error: type[OperandError],
    argument: str,
    texts: tuple[str, ...],
) -> None:
    arguments = make_arguments(rng, kind)
    how(arguments)
    d = arguments["d"]
    before = d.tobytes() if isinstance(d, np.ndarray) else b""
    expect(error, argument, texts, lambda: call(kind, arguments))
    assert not isinstance(d, np.ndarray) or d.tobytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_before_they_are_spoilt_are_fine(rng: Rng, kind: str) -> None:
    arguments = make_arguments(rng, kind)
    assert call(kind, arguments) is arguments["d"]
    assert not (arguments["d"] == POISON).all()


@pytest.mark.parametrize("what", [None, (), (1,), (1, 2, 3), np.zeros((2, 2), np.uint8), "ab"], ids=repr)
def test_no_pair(rng: Rng, what: Any) -> None:
    x = make_arguments(rng, "dense")
    for name, lhs, rhs in (("lhs", what, (x["b"], x["sb"])), ("rhs", (x["a"], x["sa"]), what)):
        texts = (type(what).__name__, "a pair (values, scales)")
        expect(OperandError, name, texts, lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, x["d"]))  # noqa: B023
    assert (x["d"] == POISON).all()


def test_d_beside_an_input_in_one_buffer_is_fine(rng: Rng) -> None:
    """Rows that alternate in memory do not overlap."""
    x = make_arguments(rng, "dense")
    buffer = np.zeros((M, 2 * N + K), np.uint8)
    buffer[:, 2 * N :] = x["a"]
    x["a"], expected = buffer[:, 2 * N :], call("dense", x)
    x["d"] = buffer[:, : 2 * N].view(np.uint16)
    np.testing.assert_array_equal(call("dense", x), expected)


# ---- what only CUDA tensors can show: operands made by hand, memory that nobody reads


def cuda_operands(rng: Rng, kind: str = "dense", **changes: dict[str, int]) -> native.Operands:
    """Tensors that claim to be on cuda:0; `changes` are fields of one of them."""
    arguments = make_arguments(rng, kind)
    operands = native.Operands(kind=KINDS.index(kind))
    operands.layout.ndim = -1
    for name, array in arguments.items():
        field = "layout" if name in LAYOUTS.values() else name
        tensor = native_tensor(array, **{"device_type": native.CUDA, **changes.get(field, {})})
        tensor.data = 0x7F0000000000 + 0x1000000 * len(field) * ord(field[0]) + changes.get(field, {}).get("data", 0)
        setattr(operands, field, tensor)
    return operands


def test_cuda_operands_are_described(rng: Rng) -> None:
    found = problem.describe(cuda_operands(rng))
    described = (found.device_type, found.device_id, found.m, found.n, found.k, found.groups)
    assert described == (native.CUDA, 0, M, N, K, 1)
    assert found.inputs_by_tma
    assert not found.output_by_tma  # N = 300


@pytest.mark.parametrize("field", ["sa", "b", "sb", "d", "layout"])
def test_operands_on_different_devices(rng: Rng, field: str) -> None:
    name = "masked_m" if field == "layout" else field
    for change, where in (({"device_id": 1}, "cuda:1"), ({"device_type": native.CPU}, "cpu:0")):
        operands = cuda_operands(rng, "masked", **{field: change})
        texts = (f"on {where}", "a is on cuda:0", "one device")
        expect(DeviceError, name, texts, lambda: problem.describe(operands))  # noqa: B023


@pytest.mark.parametrize(
    ("field", "offset", "alignment"),
    [("sa", 2, 4), ("sb", 3, 4), ("d", 1, 2), ("layout", 1, 4), ("layout", 2, 4)],
)
def test_misaligned_pointers(rng: Rng, field: str, offset: int, alignment: int) -> None:
    operands = cuda_operands(rng, "contiguous", **{field: {"data": offset}})
    name = "m_indices" if field == "layout" else field
    address = f"{getattr(operands, field).data:#x}"
    texts = (address, f"multiple of {alignment} bytes")
    expect(LayoutError, name, texts, lambda: problem.describe(operands))


@pytest.mark.parametrize(
    ("changes", "inputs", "output"),
    [
        ({}, True, True),
        ({"a": {"data": 8}}, False, True),
        ({"b": {"data": 1}}, False, True),
        ({"d": {"data": 8}}, True, False),
    ],
    ids=repr,
)
def test_what_tma_can_take(rng: Rng, changes: dict[str, Any], inputs: bool, output: bool) -> None:
    operands = cuda_operands(rng, "dense", **changes)
    operands.d.shape[1] = operands.b.shape[0] = operands.d.stride[0] = 296
    found = problem.describe(operands)
    assert (bool(found.inputs_by_tma), bool(found.output_by_tma)) == (inputs, output)
    for tensor, stride in ((operands.a, K + 8), (operands.b, K + 1)):
        saved, tensor.stride[0] = tensor.stride[0], stride
        assert not problem.describe(operands).inputs_by_tma
        tensor.stride[0] = saved
    operands.d.stride[0] = 300
    assert not problem.describe(operands).output_by_tma


@pytest.mark.parametrize("field", ["a", "b", "d"])
def test_strides_beyond_any_memory(rng: Rng, field: str) -> None:
    operands = cuda_operands(rng)
    most = 2**31 - 512
    operands.a.shape[0] = operands.sa.shape[0] = operands.d.shape[0] = operands.b.shape[0] = operands.d.shape[1] = most
    operands.sb.shape[0] = most // 128
    for tensor in (operands.a, operands.b, operands.d, operands.sa, operands.sb):
        tensor.data = 0x1000
    getattr(operands, field).stride[0] = 2**40
    expect(LayoutError, field, ("2^48 elements",), lambda: problem.describe(operands))


class CudaLike:
    """An array of this process that claims, by the array interface, to be on a GPU. Nobody may read it."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, "stream": None}


def cuda_like(arguments: Arguments) -> Arguments:
    return {name: CudaLike(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


@pytest.fixture
def no_driver() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("this machine has a CUDA driver")


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("given", [True, False], ids=["d", "d=None"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_driver(rng: Rng, kind: str, given: bool) -> None:
    arguments = make_arguments(rng, kind)
    fakes = cuda_like(arguments)
    if not given:
        fakes["d"] = None
    expect(BackendUnavailable, None, ("no CUDA driver", "libcuda.so.1"), lambda: call(kind, fakes))
    assert (arguments["d"] == POISON).all()


@pytest.mark.usefixtures("no_driver")
def test_no_driver_for_the_rest(rng: Rng) -> None:
    arguments = cuda_like(make_arguments(rng, "masked"))
    bodies: list[Callable[[], object]] = [
        lambda: fp8gemm.per_token_cast_to_fp8(CudaLike(np.zeros((3, 5), np.float32))),
        lambda: fp8gemm.per_block_cast_to_fp8(CudaLike(np.zeros((3, 5), np.float32))),
        lambda: fp8gemm.get_col_major_tma_aligned_tensor(CudaLike(np.zeros((3, 5), np.float32))),
        lambda: call("masked", {**arguments, "validate": True}),
        lambda: fp8gemm.get_num_sms(),
        lambda: fp8gemm.set_num_sms(1),
    ]
    for body in bodies:
        expect(BackendUnavailable, None, ("no CUDA driver",), body)
    assert device.hopper_devices() == []


@pytest.mark.parametrize("spoilt", ["sa", "b", "sb", "d"])
def test_operands_of_both_kinds_of_device(rng: Rng, spoilt: str) -> None:
    arguments = make_arguments(rng, "dense")
    mixed = {**cuda_like(arguments), spoilt: arguments[spoilt]}
    expect(DeviceError, spoilt, ("on cpu:0", "a is on cuda:0"), lambda: call("dense", mixed))
    mixed = {**arguments, spoilt: CudaLike(arguments[spoilt])}
    expect(DeviceError, spoilt, ("on cuda:0", "a is on cpu:0"), lambda: call("dense", mixed))
    assert (arguments["d"] == POISON).all()


@pytest.fixture
def hopper_like(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every GPU is an H100, as far as the planner knows; no compiler is known yet, no kernel loaded."""
    monkeypatch.setattr(device, "read_device", lambda device_id: H100)
    monkeypatch.setattr(backends, "_kernels", {})
    monkeypatch.setattr(native.library(), "require_no_capture", lambda device_id, stream: None)
    forget = compiler.compiler.cache_clear
    forget()
    yield
    forget()


@pytest.mark.parametrize("kind", KINDS)
def test_no_hopper(rng: Rng, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_device", lambda device_id: A100)
    arguments = make_arguments(rng, kind)
    texts = ("cuda:0", A100.name, "8.0", "9.0 (Hopper)")
    expect(BackendUnavailable, None, texts, lambda: call(kind, cuda_like(arguments)))
    x = np.zeros((3, 5), np.float32)
    out = np.zeros((3, 5), np.uint8), np.zeros((3, 1), np.float32)
    fakes = CudaLike(out[0]), CudaLike(out[1])
    expect(BackendUnavailable, None, texts, lambda: fp8gemm.per_token_cast_to_fp8(CudaLike(x), fakes))
    assert (arguments["d"] == POISON).all()


@pytest.mark.usefixtures("hopper_like")
def test_no_nvrtc(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(rng, "dense")
    with monkeypatch.context() as patch:
        from cuda import pathfinder

        def missing(name: str) -> None:
            raise pathfinder.DynamicLibNotFoundError(f"no {name} on this machine")

        patch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
        texts = ("cuda:0", "no nvrtc on this machine", "pip install nvidia-cuda-nvrtc")
        expect(BackendUnavailable, None, texts, lambda: call("dense", cuda_like(arguments)))
    with monkeypatch.context() as patch:  # nor cuda-python
        patch.setitem(sys.modules, "cuda.bindings", None)
        texts = ("cuda:0", "NVRTC cannot be loaded", "cuda.bindings")
        expect(BackendUnavailable, None, texts, lambda: call("dense", cuda_like(arguments)))
    assert (arguments["d"] == POISON).all()


@pytest.mark.usefixtures("hopper_like")
@pytest.mark.parametrize("path", ["/nowhere/nvcc", "/bin/false"])
def test_no_nvcc(rng: Rng, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8GEMM_COMPILER", path)
    texts = ("FP8GEMM_COMPILER", path, "neither 'nvrtc' nor an nvcc")
    expect(BackendUnavailable, None, texts, lambda: call("dense", cuda_like(make_arguments(rng, "dense"))))


@pytest.mark.usefixtures("hopper_like")
def test_driver_older_than_the_cubin(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    def driver_12_8(version: Any) -> None:
        version._obj.value = 12080

    monkeypatch.setattr(native.library(), "driver_version", driver_12_8)
    monkeypatch.setattr(compiler, "compiler", lambda: compiler.Compiler("nvrtc", "13.0", ""))
    monkeypatch.setattr(compiler, "cubin", lambda kernel, may_build: b"a kernel")
    arguments = make_arguments(rng, "dense")
    texts = ("CUDA 12.8", "nvrtc 13.0", "fp8gemm[cu12]")
    expect(BackendUnavailable, None, texts, lambda: call("dense", cuda_like(arguments)))
    assert (arguments["d"] == POISON).all()


@pytest.mark.parametrize("num_sms", [0, -1, 133, True, 1.0, None, "12"], ids=repr)
def test_num_sms(num_sms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_device", lambda device_id: H100)
    texts = (repr(num_sms), "132 SMs", "from 1 to 132")
    expect(OperandError, "num_sms", texts, lambda: fp8gemm.set_num_sms(num_sms))
    assert fp8gemm.get_num_sms() == 132
    fp8gemm.set_num_sms(7)
    fp8gemm.set_num_sms(9, device=1)
    assert (fp8gemm.get_num_sms(), fp8gemm.get_num_sms(1), fp8gemm.get_num_sms(2)) == (7, 9, 132)


# ---- the classes


def test_hierarchy() -> None:
    """What users catch: Python's own classes too."""
    found = {name: x for name, x in vars(errors).items() if inspect.isclass(x) and issubclass(x, Exception)}
    assert all(issubclass(x, Fp8GemmError) for x in found.values())
    assert set(found) <= set(fp8gemm.__all__)
    for error, builtin in (
        (OperandError, ValueError),
        (DTypeError, TypeError),
        (ShapeError, ValueError),
        (LayoutError, ValueError),
        (DeviceError, ValueError),
        (BackendUnavailable, RuntimeError),
        (CompileError, RuntimeError),
        (fp8gemm.DriverError, RuntimeError),
        (fp8gemm.NotPrepared, RuntimeError),
        (PlanError, ValueError),
    ):
        assert issubclass(error, builtin), error
    assert str(CompileError("it failed", "line 1\n")) == "it failed\nline 1"
    assert CompileError("it failed", "line 1\n").log == "line 1\n"


@pytest.mark.parametrize("status", range(1, 10))
def test_each_status_of_the_library_has_a_class(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    text = native._Error(status=status, argument=b"x", message=b"3, limit 2")
    monkeypatch.setattr(library, "last_error", lambda: ctypes.pointer(text))
    expected = {
        1: DTypeError,
        2: ShapeError,
        3: LayoutError,
        4: DeviceError,
        5: BackendUnavailable,
        6: fp8gemm.DriverError,
        7: OperandError,
        8: fp8gemm.NotPrepared,
    }.get(status, Fp8GemmError)
    expect(expected, "x", ("3, limit 2",), lambda: library._raise_failure(status))
    library._raise_failure(0)
