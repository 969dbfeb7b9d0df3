"""Tensors of PyTorch, JAX and CuPy, on the CPU: in by DLPack or the exchange API, out by from_dlpack, without a copy.

Each framework's tests are skipped where it is not installed.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from references import POISON, Array, Operands, Rng, check_accuracy, random_operands

import fp8gemm
from fp8gemm import LayoutError, OperandError, dlpack, native


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax() -> Any:
    pytest.importorskip("jax")
    import jax

    return jax


@pytest.fixture(scope="module")
def cupy() -> Any:
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception:
        pytest.skip("CuPy has no GPU here")
    return cupy


M, N, K = 37, 300, 272


@pytest.fixture
def operands(rng: Rng) -> Operands:
    return random_operands(rng, M, N, K)


def torch_operands(torch: Any, operands: Operands, fp8: bool = True) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The same memory as torch tensors, the matrices as float8_e4m3fn or as uint8."""
    a, sa, b, sb = (torch.from_numpy(array) for array in operands)
    if fp8:
        a, b = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn)
    return (a, sa), (b, sb)


def bits(torch: Any, d: Any) -> Array:
    array: Array = d.view(torch.int16).numpy().view(np.uint16)
    return array


@pytest.mark.parametrize("fp8", [True, False])
def test_torch_gemm(torch: Any, operands: Operands, fp8: bool) -> None:
    lhs, rhs = torch_operands(torch, operands, fp8)
    d = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    assert fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d) is d
    check_accuracy(bits(torch, d), operands)


def test_torch_padded_and_column_major(torch: Any, operands: Operands) -> None:
    lhs, rhs = torch_operands(torch, operands)
    whole = torch.full((M + 2, N + 5), float("nan"), dtype=torch.bfloat16)
    sa = lhs[1].t().contiguous().t()
    fp8gemm.gemm_fp8_fp8_bf16_nt((lhs[0], sa), rhs, whole[1:-1, :N])
    check_accuracy(bits(torch, whole)[1:-1, :N], operands)
    whole[1:-1, :N] = float("nan")
    assert whole.isnan().all()


@pytest.mark.parametrize("without", [False, True], ids=["exchange", "capsules"])
def test_torch_by_both_ways(torch: Any, operands: Operands, without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange API where torch has it; __dlpack__ for older ones."""
    (a, _), _ = torch_operands(torch, operands)
    if without:
        monkeypatch.setattr(dlpack, "_exchange_api", lambda x: None)
    elif not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return
    found = dlpack.read(a, "a")
    assert found.by_exchange is not without
    tensor = found.tensor
    assert (tensor.data, tensor.device_type, tensor.dtype_code, tensor.dtype_bits) == (a.data_ptr(), 1, 10, 8)
    assert (list(tensor.shape[:2]), list(tensor.stride[:2])) == ([M, K], [K, 1])
    lhs, rhs = torch_operands(torch, operands)
    d = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
    check_accuracy(bits(torch, d), operands)


def test_torch_tensors_are_not_leaked(torch: Any, operands: Operands) -> None:
    lhs, rhs = torch_operands(torch, operands)
    d = torch.empty((M, N), dtype=torch.bfloat16)
    every = [*lhs, *rhs, d]
    before = [sys.getrefcount(tensor) for tensor in every]
    for _ in range(20):
        fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
    gc.collect()
    assert [sys.getrefcount(tensor) for tensor in every] == before


def test_torch_from_dlpack(torch: Any, operands: Operands) -> None:
    lhs, rhs = torch_operands(torch, operands)
    ours = fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs)
    d = torch.from_dlpack(ours)
    assert (d.dtype, tuple(d.shape), d.data_ptr()) == (torch.bfloat16, (M, N), ours.view.data)
    copy = ours.numpy().copy()
    del ours
    gc.collect()
    np.testing.assert_array_equal(bits(torch, d), copy)
    check_accuracy(bits(torch, d), operands)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_quantisers(torch: Any, rng: Rng, dtype: str) -> None:
    x = torch.from_numpy(rng.standard_normal((130, 300)).astype(np.float32)).to(getattr(torch, dtype))
    padded = torch.nn.functional.pad(x.float(), (0, 84)).view(130, 3, 128)
    s = padded.abs().amax(-1).clamp(1e-4) / torch.tensor(448.0)
    q = (padded / s[..., None]).to(torch.float8_e4m3fn).view(130, 384)[:, :300]
    ours = [torch.from_dlpack(t) for t in fp8gemm.per_token_cast_to_fp8(x)]
    assert ours[0].dtype == torch.float8_e4m3fn
    assert torch.equal(ours[1], s)
    assert torch.equal(ours[0].view(torch.uint8), q.view(torch.uint8))
    out = torch.empty((130, 300), dtype=torch.float8_e4m3fn), torch.empty((130, 3)).t().contiguous().t()
    assert fp8gemm.per_token_cast_to_fp8(x, out) is out
    assert torch.equal(out[1], s)
    assert torch.equal(out[0].view(torch.uint8), ours[0].view(torch.uint8))


def test_torch_groups(torch: Any, rng: Rng) -> None:
    operands = random_operands(rng, 60, 70, 144, (), (2,))
    lhs, rhs = torch_operands(torch, operands)
    d = torch.full((60, 70), float("nan"), dtype=torch.bfloat16)
    ends = torch.tensor([13, 55], dtype=torch.int32)
    fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, d, group_ends=ends, validate=True)
    for group, rows in enumerate((slice(13), slice(13, 55))):
        o = Operands(operands.a[rows], operands.sa[rows], operands.b[group], operands.sb[group])
        check_accuracy(bits(torch, d)[rows], o)
    assert d[55:].isnan().all()


def test_torch_errors(torch: Any, operands: Operands) -> None:
    """Typed errors for what torch cannot, or should not, hand over."""
    lhs, rhs = torch_operands(torch, operands)
    d = torch.zeros((M, N), dtype=torch.bfloat16)
    for wrong, text in (
        (d.half(), "float16"),
        (d.t().contiguous().t(), "last dimension"),
        (d[:-1], r"\(36, 300\)"),
        (d.to("meta"), "."),
        (d.to_sparse(), "."),
    ):
        with pytest.raises((OperandError, RuntimeError, NotImplementedError, BufferError), match=text):
            fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, wrong)
    with pytest.raises(LayoutError, match="overlaps a"):
        fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, overlapping(torch, lhs[0]))
    assert (d == 0).all()


def overlapping(torch: Any, a: Any) -> Any:
    """d in the memory of a."""
    flat = torch.zeros(M * N, dtype=torch.bfloat16)
    with torch.no_grad():
        a.set_(flat.untyped_storage(), 0, (M, K), (K, 1))
    return flat.view(M, N)


def test_torch_with_grad(torch: Any, operands: Operands) -> None:
    """Scales that require grad are read all the same, or refused by torch with an error: never silently wrong."""
    lhs, rhs = torch_operands(torch, operands)
    lhs[1].requires_grad_()
    try:
        d = fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs)
    except (OperandError, RuntimeError, BufferError):
        return
    check_accuracy(d.numpy(), operands)


def test_mixed_frameworks(torch: Any, operands: Operands) -> None:
    (a, sa), _ = torch_operands(torch, operands)
    d = np.full((M, N), POISON, np.uint16)
    fp8gemm.gemm_fp8_fp8_bf16_nt((a, operands.sa), operands.rhs, d)
    check_accuracy(d, operands)
    fp8gemm.gemm_fp8_fp8_bf16_nt((operands.a, sa), operands.rhs, d)
    check_accuracy(d, operands)


# ---- JAX


def jax_operands(jax: Any, operands: Operands) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    def fp8(array: Array) -> Any:
        return jax.lax.bitcast_convert_type(jax.numpy.asarray(array), jax.numpy.float8_e4m3fn)

    return (fp8(operands.a), jax.numpy.asarray(operands.sa)), (fp8(operands.b), jax.numpy.asarray(operands.sb))


def on_cpu(jax: Any) -> Any:
    return jax.default_device(jax.devices("cpu")[0])


@pytest.fixture
def jax_cpu(jax: Any) -> Iterator[Any]:
    with on_cpu(jax):
        yield jax


def test_jax_gemm(jax_cpu: Any, operands: Operands) -> None:
    """Immutable arrays in, a tensor of ours out, which JAX takes."""
    jax = jax_cpu
    lhs, rhs = jax_operands(jax, operands)
    try:
        dlpack.read(lhs[0], "a")
    except (OperandError, BufferError, RuntimeError):  # a JAX that does not export FP8: its bits
        lhs, rhs = ((jax.numpy.asarray(x), jax.numpy.asarray(s)) for x, s in (operands.lhs, operands.rhs))
    ours = fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs)
    check_accuracy(ours.numpy(), operands)
    d = jax.numpy.from_dlpack(ours)
    assert d.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(np.asarray(d).view(np.uint16), ours.numpy())


def test_jax_results_are_read_only(jax_cpu: Any, operands: Operands) -> None:
    """Where JAX says so; where it does not, the caller was told to pass d=None."""
    d = jax_cpu.numpy.zeros((M, N), jax_cpu.numpy.bfloat16)
    if not dlpack.read(d, "d").tensor.read_only:
        return
    with pytest.raises(LayoutError, match="d: read-only"):
        fp8gemm.gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d)


def test_jax_quantiser(jax_cpu: Any, rng: Rng) -> None:
    x = rng.standard_normal((5, 200)).astype(np.float32)
    ours = fp8gemm.per_token_cast_to_fp8(jax_cpu.numpy.asarray(x))
    for one, other in zip(ours, fp8gemm.per_token_cast_to_fp8(x), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    np.testing.assert_array_equal(np.asarray(jax_cpu.numpy.from_dlpack(ours[1])), ours[1].numpy())


# ---- CuPy: only on a GPU


@pytest.mark.gpu
def test_cupy_gemm(cupy: Any, hopper: int, operands: Operands) -> None:
    with cupy.cuda.Device(hopper):
        a, sa, b, sb = (cupy.asarray(array) for array in operands)
        d = cupy.full((M, N), POISON, cupy.uint16)
        fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb), d)
        check_accuracy(cupy.asnumpy(d), operands)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            assert dlpack.current_stream(a, hopper) == stream.ptr
            ours = fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb))
        result = cupy.from_dlpack(ours)
        del stream  # destroyed, as CuPy's streams are, before the tensor that was made on it
        check_accuracy(cupy.asnumpy(result.view(cupy.uint16)), operands)
        del result, ours


def test_streams_of_frameworks_that_are_not_there() -> None:
    """A tensor class that only looks like one of a framework by its module is asked for nothing else."""

    class Other:
        pass

    assert dlpack.current_stream(Other(), 0) == dlpack.LEGACY_STREAM
    reads: list[Callable[[], object]] = [lambda: dlpack.read(Other(), "x"), lambda: dlpack.read(object, "x")]
    for body in reads:
        with pytest.raises(OperandError, match="is no tensor"):
            body()
    assert dlpack.cuda_device(np.zeros(3)) is None
    assert native.CPU == 1
