"""What a Hopper machine must show, with PyTorch: every plan, shape, layout and kind against float32 products of the
dequantised operands; CUDA graphs, streams, lifetimes."""

import concurrent.futures
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references import SEED, WEIGHTS, Rng, ceil_div, judge, m_indices_of, segments

import fp8gemm
from fp8gemm import (
    LayoutError,
    NotPrepared,
    OperandError,
    backends,
    cache,
    compiler,
    cost,
    device,
    gemm_fp8_fp8_bf16_nt,
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
    native,
    plan,
    planner,
)
from fp8gemm.plan import Plan
from fp8gemm.problem import KINDS, Problem

pytestmark = pytest.mark.gpu
TOUCHED_BY_NOBODY = 7.0  # what d's neighbours hold
Tensor = Any


@pytest.fixture(scope="module")
def torch(hopper: int) -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    torch.cuda.set_device(hopper)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(SEED)
    yield torch
    torch.cuda.synchronize()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Plan], None]]:
    """Makes every call take the given plan, where it takes any."""

    def force(forced: Plan) -> None:
        def default_plan(p: Problem, device: device.Device, num_sms: int, batch_invariant: bool) -> Plan:
            return forced._replace(raster=cost.raster(p, forced))

        planner.forget()
        monkeypatch.setattr(planner, "default_plan", default_plan)

    yield force
    planner.forget()


class Tools:
    """Operands on the GPU and their products."""

    def __init__(self, torch: Any) -> None:
        self.torch, self.e4m3, self.bf16 = torch, torch.float8_e4m3fn, torch.bfloat16

    def matrix(self, rows: int, k: int, groups: Sequence[int] = (), height: int = 1) -> tuple[Tensor, Tensor]:
        """Normal numbers as e4m3, and scales of blocks of height x 128."""
        torch = self.torch
        values = torch.randn(*groups, rows, k, device="cuda").mul_(32).clamp_(-448, 448).to(self.e4m3)
        scales = torch.rand(*groups, ceil_div(rows, height), ceil_div(k, 128), device="cuda") + 0.5
        return values, scales

    def dequantise(self, matrix: tuple[Tensor, Tensor], height: int = 1) -> Tensor:
        q, s = matrix
        wide = s.repeat_interleave(128, -1)[..., : q.shape[-1]]
        return q.float() * wide.repeat_interleave(height, -2)[..., : q.shape[-2], :]

    def product(self, lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor]) -> Tensor:
        return self.dequantise(lhs) @ self.dequantise(rhs, 128).transpose(-1, -2)

    def column_major(self, s: Tensor) -> Tensor:
        *groups, rows, columns = s.shape
        t = self.torch.full((*groups, columns, ceil_div(rows, 4) * 4), float("nan"), device="cuda")
        t[..., :rows] = s.transpose(-1, -2)
        return t.transpose(-1, -2)[..., :rows, :]

    def check(self, d: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
        """The criterion of `references`; K = 0 and products of zeros are exact.

        `terms`, the product of the operands' absolute values, is what the tensor core's 14 bits are of: where D has few
        elements, they may cancel to almost nothing.
        """
        if not exact.numel():
            return
        error = (d.float() - exact).norm(dim=-1).double().cpu().numpy()
        rounding = (exact.to(self.bf16).float() - exact).norm(dim=-1).double().cpu().numpy()
        if exact.shape[-1] < 64:  # a few elements may need no rounding; the tensor core's 14 bits still do
            size = (exact if terms is None else terms).norm(dim=-1).double().cpu().numpy()
            assert (error <= 2 * rounding + 2.0 ** (-8 if terms is None else -12) * size.max()).all()
            return
        judge(error, rounding, exact.shape[-1])

    def dense(
        self, m: int, n: int, k: int, column: bool = True, pad_a: int = 0, pad_d: int = 0, offset: int = 0
    ) -> None:
        """One call, with padding between the rows of a and d and d off its alignment; d's neighbours stay."""
        torch = self.torch
        (a, sa), rhs = self.matrix(m, k), self.matrix(n, k, height=128)
        exact = self.product((a, sa), rhs)
        terms = self.dequantise((a, sa)).abs() @ self.dequantise(rhs, 128).abs().T
        if pad_a:
            wide = torch.full((m, k + pad_a), 448.0, device="cuda").to(self.e4m3)
            wide[:, :k] = a
            a = wide[:, :k]
        full = torch.full((m + 2, n + pad_d + offset), TOUCHED_BY_NOBODY, device="cuda", dtype=self.bf16)
        d = full[1 : m + 1, offset : offset + n]
        d.fill_(float("nan"))
        gemm_fp8_fp8_bf16_nt((a, self.column_major(sa) if column else sa), rhs, d)
        self.check(d, exact, terms)
        d.fill_(TOUCHED_BY_NOBODY)
        assert (full == TOUCHED_BY_NOBODY).all()

    def grouped(self, kind: int, sizes: Sequence[int], n: int, k: int, spare: int = 3, column: bool = True) -> None:
        call, d, expected, _ = self.grouped_call(kind, sizes, n, k, spare, column)
        call()
        self.check_groups(d, expected)

    def grouped_call(
        self, kind: int, sizes: Sequence[int], n: int, k: int, spare: int = 3, column: bool = True
    ) -> tuple[Callable[[], object], Tensor, Callable[[], list[tuple[Any, Tensor]]], Tensor]:
        """(the call, d, where each group's rows are and what they must be, the sizes on the device)."""
        torch, groups = self.torch, len(sizes)
        b, sb = self.matrix(n, k, (groups,), 128)
        if kind == native.MASKED:
            a, sa = self.matrix(max([1, *sizes]) + spare, k, (groups,))
            layout = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        else:
            rows = segments(sizes, 128 if kind == native.CONTIGUOUS else 1)[1]
            extra = 0 if kind == native.CONTIGUOUS else spare
            a, sa = self.matrix(rows + extra, k)
            values = m_indices_of(sizes) if kind == native.CONTIGUOUS else np.cumsum(sizes)
            layout = torch.tensor(values, dtype=torch.int32, device="cuda")
        d = torch.full((*a.shape[:-1], n), TOUCHED_BY_NOBODY, device="cuda", dtype=self.bf16)
        scales = self.column_major(sa) if column else sa

        def call() -> object:
            if kind == native.MASKED:
                hint = max(1, sum(sizes) // groups)
                return m_grouped_gemm_fp8_fp8_bf16_nt_masked((a, scales), (b, sb), d, layout, hint)
            name = "m_indices" if kind == native.CONTIGUOUS else "group_ends"
            return m_grouped_gemm_fp8_fp8_bf16_nt_contiguous((a, scales), (b, sb), d, **{name: layout}, validate=False)

        def expected() -> list[tuple[Any, Tensor]]:
            counts = layout.tolist()
            found: list[tuple[Any, Tensor]] = []
            for group in range(groups):
                if kind == native.MASKED:
                    where: Any = (group, slice(counts[group]))
                elif kind == native.RAGGED:
                    where = slice(counts[group - 1] if group else 0, counts[group])
                else:
                    first = segments(sizes)[0][group]
                    where = slice(first, first + sizes[group])
                found.append((where, self.product((a[where], sa[where]), (b[group], sb[group]))))
            return found

        return call, d, expected, layout

    def check_groups(self, d: Tensor, expected: Callable[[], list[tuple[Any, Tensor]]]) -> None:
        rest = d.clone()
        for where, exact in expected():
            self.check(d[where], exact)
            rest[where] = TOUCHED_BY_NOBODY
        assert (rest == TOUCHED_BY_NOBODY).all(), "rows that belong to no group were written"


@pytest.fixture(scope="module")
def tools(torch: Any) -> Tools:
    return Tools(torch)


GROUPED = [native.CONTIGUOUS, native.RAGGED, native.MASKED]
each_group_kind = pytest.mark.parametrize("kind", GROUPED, ids=[KINDS[kind] for kind in GROUPED])


# ---- accuracy


@pytest.mark.parametrize("column", [True, False], ids=["column-major", "row-major"])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_weights(tools: Tools, n: int, k: int, column: bool) -> None:
    for m in (1, 3, 16, 64, 65, 128, 1000, 4096):
        tools.dense(m, n, k, column)


@pytest.mark.parametrize("swap_ab", [0, 1])
@pytest.mark.parametrize("tile_m", sorted({*plan.TILE_MS, *plan.SWAPPED_TILE_MS}))
def test_compiled_plans(
    tools: Tools, rng: Rng, hopper: int, force: Callable[[Plan], None], tile_m: int, swap_ab: int
) -> None:
    """All tiles, clusters, depths and splits of dense problems; of groups, whose main loop is the same, a sample."""
    for kind in range(4):
        wanted = tile_m, swap_ab
        every = [p for p in plan.compiled_space(kind, device.read_device(hopper)) if (p.tile_m, p.swap_ab) == wanted]
        every = [every[i] for i in rng.permutation(len(every))]
        space = list({p._replace(stages=0): p for p in every}.values())[: None if kind == native.DENSE else 20]
        with ThreadPoolExecutor() as pool:
            list(pool.map(compiler.cubin, [p.kernel(kind) for p in space]))
        for forced in space:
            force(forced)
            n, k = int(rng.integers(1, 2000)), int(rng.choice([16, 128])) * int(rng.integers(1, 30))
            if forced.depth > 1:
                k = -(-k // 128) * 128  # cost.suits
            if kind == native.DENSE:
                tools.dense(int(rng.integers(1, 1500)), n, k, bool(rng.integers(2)))
            else:
                tools.grouped(kind, [3, 0, int(rng.integers(1, 400)), 128, 1], n, k, column=bool(rng.integers(2)))


BRIEF = [
    Plan(64, 32, 8, depth=2, split=4, slices=2),
    Plan(64, 32, 8, depth=2, split=4),
    Plan(64, 32, 4, depth=4, split=4),
    Plan(32, 64, 4, depth=2, split=4),
]


@pytest.mark.parametrize("forced", BRIEF, ids=str)
def test_brief_work(tools: Tools, hopper: int, force: Callable[[Plan], None], forced: Plan) -> None:
    """Plans whose CTAs rehearse: shares of K of no turn, of one and of more, tiles that end with D and beyond it."""
    force(forced._replace(num_sms=device.read_device(hopper).sms))
    for m, n, k in itertools.product((1, 64, 100), (8, 31, 576), (128, 384, 512, 1152, 7168)):
        for column in (True, False):
            tools.dense(m, n, k, column)


@pytest.mark.parametrize("part", range(6))
def test_any_shape(tools: Tools, rng: Rng, part: int) -> None:
    """50 of each part: strides and addresses on and off what TMA takes, odd N, padded rows whose neighbours stay."""
    for _ in range(50):
        m = (0, int(rng.integers(0, 5000)), int(rng.integers(1, 200)))[rng.integers(3)]
        n, k = int(rng.integers(1, 9000)), 16 * int(rng.integers(0, 562))
        pad_a, pad_d, offset = (int(rng.choice(x)) for x in ([0, 0, 16, 5], [0, 0, 8, 3], [0, 0, 8, 1]))
        print(m, n, k, pad_a, pad_d, offset)
        tools.dense(m, n, k, bool(rng.integers(2)), pad_a, pad_d, offset)


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 129, 577])
def test_odd_columns(tools: Tools, n: int) -> None:
    for m, pad_d, offset in itertools.product((1, 70, 300), (0, 1, 8), (0, 1)):
        tools.dense(m, n, 272, pad_d=pad_d, offset=offset)


@each_group_kind
def test_any_groups(tools: Tools, rng: Rng, kind: int) -> None:
    """70 layouts: empty groups, groups of one row, a huge one, up to 256 of them, the last one at the tensor's end."""
    for i in range(70):
        groups = int(rng.choice([1, 2, 5, 33, 64, int(rng.integers(1, 257))]))
        sizes = [int(rng.integers(0, rng.choice([1, 2, 50, 300]))) for _ in range(groups)]
        if i % 10 == 0:
            sizes[-1] = 2000
        n, k = int(rng.choice([512, int(rng.integers(1, 600))])), 16 * int(rng.integers(0, 60))
        print(sizes, n, k)
        tools.grouped(kind, sizes, n, k, int(rng.choice([0, int(rng.integers(0, 60))])), bool(rng.integers(2)))


def test_same_bits_each_time(tools: Tools, rng: Rng, hopper: int, force: Callable[[Plan], None]) -> None:
    """100 calls with each of some plans, of some that split or slice K, and of those whose CTAs rehearse."""
    gpu = device.read_device(hopper)
    space = plan.compiled_space(native.DENSE, gpu)
    split, sliced = [p for p in space if p.split > 1], [p for p in space if p.slices > 1]
    brief = [p._replace(num_sms=gpu.sms) for p in BRIEF]
    samples = [(space, 8), (split, 6), (sliced, 4), (brief, len(brief))]
    for forced in [plans[i] for plans, count in samples for i in rng.permutation(len(plans))[:count]]:
        force(forced)
        (a, sa), rhs = tools.matrix(130, 3072), tools.matrix(700, 3072, height=128)
        d = tools.torch.empty(130, 700, device="cuda", dtype=tools.bf16)
        first = gemm_fp8_fp8_bf16_nt((a, sa), rhs, d).clone()
        for _ in range(100):
            assert tools.torch.equal(gemm_fp8_fp8_bf16_nt((a, sa), rhs, d), first), forced


@pytest.mark.parametrize(("n", "k"), [(576, 7168), (2112, 7168), (4096, 512)])
def test_batch_invariant(tools: Tools, n: int, k: int) -> None:
    """A row's bits depend neither on the rows beside it nor on how many there are."""
    (a, sa), rhs = tools.matrix(300, k), tools.matrix(n, k, height=128)
    d, row = (tools.torch.empty(m, n, device="cuda", dtype=tools.bf16) for m in (300, 1))
    for m in (300, 65, 17):
        gemm_fp8_fp8_bf16_nt((a[:m], sa[:m]), rhs, d[:m], batch_invariant=True)
        for i in (0, 3, m - 1):
            gemm_fp8_fp8_bf16_nt((a[i : i + 1], sa[i : i + 1]), rhs, row, batch_invariant=True)
            assert tools.torch.equal(row[0], d[i]), (m, i)


@pytest.mark.parametrize("rows", [1, 8, 30])
def test_swapping_operands_changes_no_bit(tools: Tools, force: Callable[[Plan], None], rows: int) -> None:
    """So swapped plans are of the same reduction as others, and batch-invariant."""
    (a, sa), rhs = tools.matrix(rows, 1664), tools.matrix(600, 1664, height=128)
    found = []
    for forced in (Plan(64, 64, 4, depth=2), Plan(8, 56, 4, depth=2, swap_ab=1), Plan(32, 96, 3, depth=2, swap_ab=1)):
        force(forced._replace(num_sms=132))
        d = tools.torch.full((rows, 600), float("nan"), device="cuda", dtype=tools.bf16)
        found.append(gemm_fp8_fp8_bf16_nt((a, sa), rhs, d))
    assert all(tools.torch.equal(d, found[0]) for d in found)


@pytest.mark.parametrize("num_sms", [1, 2, 7, 77, 131])
def test_num_sms(tools: Tools, hopper: int, num_sms: int) -> None:
    fp8gemm.set_num_sms(num_sms, hopper)
    tools.dense(300, 576, 1024)
    tools.grouped(native.RAGGED, [100, 0, 3], 576, 1024)


def test_nan_and_inf(torch: Any, tools: Tools) -> None:
    (a, sa), (b, sb) = tools.matrix(300, 512), tools.matrix(400, 512, height=128)
    clean = torch.from_dlpack(gemm_fp8_fp8_bf16_nt((a, sa), (b, sb)))
    a.view(torch.uint8)[7, 300], sb[2, 1] = 0x7F, float("inf")
    d = torch.from_dlpack(gemm_fp8_fp8_bf16_nt((a, sa), (b, sb)))
    assert d[7].isnan().all()
    spoilt = torch.zeros(300, 400, dtype=torch.bool, device="cuda")
    spoilt[7], spoilt[:, 256:384] = True, True
    assert not d[spoilt].isfinite().any()
    assert torch.equal(d[~spoilt], clean[~spoilt])


# ---- checks


@each_group_kind
def test_validate(torch: Any, tools: Tools, kind: int) -> None:
    _, d, _, layout = tools.grouped_call(kind, [100, 28], 64, 128)
    groups = (2,) if kind == native.MASKED else ()
    lhs, rhs = tools.matrix(d.shape[-2], 128, groups), tools.matrix(64, 128, (2,), 128)
    layout[-1] = 10**6
    names = {native.CONTIGUOUS: "m_indices", native.RAGGED: "group_ends", native.MASKED: "masked_m"}
    masked = kind == native.MASKED
    function = m_grouped_gemm_fp8_fp8_bf16_nt_masked if masked else m_grouped_gemm_fp8_fp8_bf16_nt_contiguous
    arguments: dict[str, Any] = {names[kind]: layout}
    with pytest.raises(OperandError, match="1000000 at"):
        function(lhs, rhs, d, **arguments, validate=True)
    assert (d == TOUCHED_BY_NOBODY).all()


@each_group_kind
def test_nonsense_stays_inside(torch: Any, tools: Tools, rng: Rng, kind: int) -> None:
    """d in the middle of an allocation of its own, which stays as it was around it."""
    groups, m, n = 5, 512, 136
    stack = (groups,) if kind == native.MASKED else ()
    lhs, rhs = tools.matrix(m, 256, stack), tools.matrix(n, 256, (groups,), 128)
    rows = m * (groups if stack else 1)
    full = torch.full((rows + 2 * m, n), TOUCHED_BY_NOBODY, device="cuda", dtype=tools.bf16)
    d = full[m:-m].view(*stack, m, n)
    count, limit = (m, groups) if kind == native.CONTIGUOUS else (groups, m)
    for _ in range(20):
        values = rng.choice([-(2**31), -1, 0, 1, limit - 1, limit, limit + 1, 2**31 - 1], count)
        layout = torch.tensor(values, dtype=torch.int32, device="cuda")
        if kind == native.MASKED:
            m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, d, layout)
        elif kind == native.RAGGED:
            m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, d, group_ends=layout)
        else:
            m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, d, layout)
        torch.cuda.synchronize()
        assert (full[:m] == TOUCHED_BY_NOBODY).all()
        assert (full[-m:] == TOUCHED_BY_NOBODY).all()


def test_operands_on_cpu_and_gpu(torch: Any, tools: Tools) -> None:
    (a, sa), rhs = tools.matrix(5, 128), tools.matrix(8, 128, height=128)
    with pytest.raises(fp8gemm.DeviceError, match="sa: on cpu:0"):
        gemm_fp8_fp8_bf16_nt((a, sa.cpu()), rhs)
    with pytest.raises(LayoutError, match="d: overlaps a"):
        gemm_fp8_fp8_bf16_nt((a, sa), rhs, a.view(torch.uint8).flatten()[:80].view(tools.bf16).view(5, 8))


# ---- our own tensors, streams, lifetimes


def test_allocated_result(torch: Any, tools: Tools) -> None:
    lhs, rhs = tools.matrix(100, 1024), tools.matrix(576, 1024, height=128)
    ours = gemm_fp8_fp8_bf16_nt(lhs, rhs)
    assert isinstance(ours, fp8gemm.Tensor)
    d = torch.from_dlpack(ours)
    assert (d.dtype, tuple(d.shape), d.device.type) == (tools.bf16, (100, 576), "cuda")
    del ours
    tools.check(d, tools.product(lhs, rhs))
    with pytest.raises(OperandError, match="only CPU tensors have a NumPy view"):
        gemm_fp8_fp8_bf16_nt(lhs, rhs).numpy()


def test_current_stream_and_given_stream(torch: Any, tools: Tools) -> None:
    """A call comes after what its stream was given before, and before what it is given after."""
    lhs, rhs = tools.matrix(256, 2048), tools.matrix(7168, 2048, height=128)
    exact = tools.product(lhs, rhs)
    source = lhs[0].clone()
    for how in ("current", "int", "object"):
        stream = torch.cuda.Stream()
        a = torch.zeros_like(source.view(torch.uint8)).view(tools.e4m3)
        d = torch.full((256, 7168), float("nan"), device="cuda", dtype=tools.bf16)
        torch.cuda.synchronize()
        given: dict[str, Any] = {"int": {"stream": stream.cuda_stream}, "object": {"stream": CudaStream(stream)}}.get(
            how, {}
        )
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            a.copy_(source)
            if not given:
                gemm_fp8_fp8_bf16_nt((a, lhs[1]), rhs, d)
        if given:
            gemm_fp8_fp8_bf16_nt((a, lhs[1]), rhs, d, **given)
        with torch.cuda.stream(stream):
            copy = d.clone()
            d.zero_()
        torch.cuda.synchronize()
        tools.check(copy, exact)


class CudaStream:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


def test_consumer_on_another_stream(torch: Any, tools: Tools) -> None:
    """from_dlpack on another stream waits for our work."""
    lhs, rhs = tools.matrix(256, 2048), tools.matrix(7168, 2048, height=128)
    exact = tools.product(lhs, rhs)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        torch.cuda._sleep(20_000_000)
        ours = gemm_fp8_fp8_bf16_nt(lhs, rhs)
    with torch.cuda.stream(other):
        copy = torch.from_dlpack(ours).clone()
    torch.cuda.synchronize()
    tools.check(copy, exact)


def test_two_streams(torch: Any, tools: Tools) -> None:
    """Calls side by side do not touch each other's results."""
    problems = [(tools.matrix(m, 2048), tools.matrix(2112, 2048, height=128)) for m in (100, 3000)]
    exact = [tools.product(*p) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[Any]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (lhs, rhs), found in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(torch.from_dlpack(gemm_fp8_fp8_bf16_nt(lhs, rhs)))
    torch.cuda.synchronize()
    for found, right in zip(results, exact, strict=True):
        for d in found:
            tools.check(d, right)
            assert torch.equal(d, found[0])


@pytest.mark.parametrize("capsules", [False, True], ids=["as torch is", "by capsules"])
def test_inputs_may_be_dropped_after_the_call(
    torch: Any, tools: Tools, capsules: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of an input that is deleted right after the call goes to nobody else before the call has read it."""
    if capsules:
        monkeypatch.setattr(fp8gemm.gemm, "_launch", fp8gemm.gemm._call)
        monkeypatch.setattr(fp8gemm.dlpack, "_exchange_api", lambda x: None)
    rhs = tools.matrix(7168, 2048, height=128)
    lhs = tools.matrix(256, 2048)
    exact = tools.product(lhs, rhs)
    for _ in range(10):
        a, sa = (x.clone() for x in lhs)
        d = torch.full((256, 7168), float("nan"), device="cuda", dtype=tools.bf16)
        torch.cuda.synchronize()
        torch.cuda._sleep(5_000_000)
        gemm_fp8_fp8_bf16_nt((a, sa), rhs, d)
        shapes = [(x.shape, x.dtype) for x in (a, sa)]
        del a, sa
        thieves = [torch.full(shape, 1.0, device="cuda").to(dtype) for shape, dtype in shapes]
        torch.cuda.synchronize()
        tools.check(d, exact)
        del thieves


# ---- the call itself (more of it, without a GPU, in test_call.py)


@pytest.mark.parametrize("kind", range(4))
def test_no_python_runs_in_a_common_call(torch: Any, tools: Tools, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """Torch's tensors, once the plan is in the table; on the current stream, whichever that is."""

    def refuse(*call: Any) -> None:
        raise AssertionError("the builtin did not make this call itself")

    if kind == native.DENSE:
        lhs, rhs = tools.matrix(64, 2048), tools.matrix(576, 2048, height=128)
        d, exact = torch.empty(64, 576, device="cuda", dtype=tools.bf16), tools.product(lhs, rhs)
        call: Callable[[], object] = lambda: gemm_fp8_fp8_bf16_nt(lhs, rhs, d)  # noqa: E731
        check: Callable[[], object] = lambda: tools.check(d, exact)  # noqa: E731
    else:
        call, d, expected, _ = tools.grouped_call(kind, [40, 0, 128, 7], 576, 1024, spare=130)
        check = lambda: tools.check_groups(d, expected)  # noqa: E731
    call()
    torch.cuda.synchronize()
    monkeypatch.setattr(fp8gemm.gemm, "_launch", native.library().python_call(refuse))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            d.fill_(TOUCHED_BY_NOBODY)  # on any other stream the call would come before this
            call()
        torch.cuda.synchronize()
        check()


def test_threads_call_at_once(torch: Any, tools: Tools) -> None:
    """Eight threads with streams of their own, while the plans of all their problems are replaced."""
    problems = [(tools.matrix(m, 1024), tools.matrix(576, 1024, height=128)) for m in (1, 64, 200, 1000)]
    exact = [tools.product(*problem) for problem in problems]
    planner.forget()
    torch.cuda.synchronize()

    def work(i: int) -> list[tuple[int, Any]]:
        results = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for j in range(100):
                which = (i + j) % len(problems)
                lhs, rhs = problems[which]
                d = torch.empty(len(lhs[0]), 576, device="cuda", dtype=tools.bf16)
                gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
                results.append((which, d))
            torch.cuda.current_stream().synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(work, i) for i in range(8)]
        while not all(worker.done() for worker in workers):
            for listed in planner.listing():
                if not listed.key.reference and listed.key.device_type == native.CUDA:
                    planner.publish(listed.key, Plan(64, 64, 4, num_sms=100), True)
                    planner.publish(listed.key, Plan(128, 128, 4, num_sms=100), True)
    for worker in workers:
        for which, d in worker.result():
            tools.check(d, exact[which])
    planner.forget()


# ---- CUDA graphs


def capture(torch: Any, call: Callable[[], object]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_graph_of_a_dense_call(torch: Any, tools: Tools) -> None:
    (a, sa), rhs = tools.matrix(64, 2048), tools.matrix(7168, 2048, height=128)
    d = torch.empty(64, 7168, device="cuda", dtype=tools.bf16)
    gemm_fp8_fp8_bf16_nt((a, sa), rhs, d)
    graph = capture(torch, lambda: gemm_fp8_fp8_bf16_nt((a, sa), rhs, d))
    for _ in range(3):
        new = tools.matrix(64, 2048)
        a.copy_(new[0]), sa.copy_(new[1]), d.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        tools.check(d, tools.product(new, rhs))


@each_group_kind
def test_graph_of_groups(torch: Any, tools: Tools, rng: Rng, kind: int) -> None:
    """Replayed with other counts than it was captured with: they are read on the device."""
    sizes = [40, 0, 128, 7]
    call, d, expected, layout = tools.grouped_call(kind, sizes, 576, 1024, spare=130)
    call()
    graph = capture(torch, call)
    for i in range(4):
        if i and kind == native.MASKED:
            layout.copy_(torch.tensor(rng.integers(0, d.shape[1] + 1, 4), dtype=torch.int32))
        elif i and kind == native.RAGGED:
            ends = np.sort(rng.integers(0, len(d) + 1, 4))
            layout.copy_(torch.tensor(ends, dtype=torch.int32))
        d.fill_(TOUCHED_BY_NOBODY)
        graph.replay()
        torch.cuda.synchronize()
        tools.check_groups(d, expected)


def test_capture_of_a_kernel_that_is_not_loaded(torch: Any, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """NotPrepared, and the same call works before and after; nor can a capture allocate d."""
    lhs, rhs = tools.matrix(64, 1024), tools.matrix(576, 1024, height=128)
    d = torch.empty(64, 576, device="cuda", dtype=tools.bf16)
    gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_kernels", {})
        planner.forget()
        caught = []

        def call() -> None:
            torch.zeros(1, device="cuda")
            try:
                gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
            except NotPrepared as error:
                caught.append(str(error))

        capture(torch, call)
        assert len(caught) == 1
        assert "before the capture" in caught[0]

    def allocate() -> None:
        torch.zeros(1, device="cuda")
        with pytest.raises(NotPrepared, match="pass d"):
            gemm_fp8_fp8_bf16_nt(lhs, rhs)

    capture(torch, allocate)
    d.fill_(float("nan"))
    gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
    tools.check(d, tools.product(lhs, rhs))


def test_prepare_and_capture(torch: Any, tools: Tools) -> None:
    """The first call of all may be captured, with kernels being compiled and loaded by another thread meanwhile."""
    lhs, rhs = tools.matrix(96, 1536), tools.matrix(1152, 1536, height=128)
    d, exact = torch.empty(96, 1152, device="cuda", dtype=tools.bf16), tools.product(lhs, rhs)
    device_id = d.device.index
    planner.forget()
    prepared = fp8gemm.prepare(fp8gemm.Shapes(n=1152, k=1536, m=range(1, 97)), device=device_id)
    assert prepared.plans == 2 * 7 + 1
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        others = [fp8gemm.Shapes(n=704, k=512, m=range(1, 3000), kind=kind, groups=4) for kind in KINDS[1:]]
        graphs: list[Any] = []
        loading = pool.submit(fp8gemm.prepare, others, device=device_id)
        while not graphs or not loading.done():
            graphs.append(capture(torch, lambda: gemm_fp8_fp8_bf16_nt(lhs, rhs, d)))
        loading.result()
    for graph in (graphs[0], graphs[-1]):
        d.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        tools.check(d, exact)


# ---- quantisers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("per_block", [False, True])
def test_quantisers(torch: Any, tools: Tools, dtype: str, per_block: bool) -> None:
    """Bit for bit what the CPU backend makes of the same numbers, which is held to NumPy and ml_dtypes."""
    cast = fp8gemm.per_block_cast_to_fp8 if per_block else fp8gemm.per_token_cast_to_fp8
    for rows, k in ((1, 1), (333, 1000), (128, 128), (700, 2048)):
        x = torch.randn(rows, k, device="cuda") * torch.exp2(torch.rand(rows, k, device="cuda") * 20 - 14)
        x = x.to(getattr(torch, dtype))
        if rows > 300:
            x[3, 9], x[5, 500] = float("nan"), float("inf")
        ours = [torch.from_dlpack(t).cpu() for t in cast(x)]
        expected = [torch.from_dlpack(t) for t in cast(x.cpu())]
        np.testing.assert_array_equal(ours[1].numpy(), expected[1].numpy())
        assert torch.equal(ours[0].view(torch.uint8), expected[0].view(torch.uint8))


def test_col_major_tma_aligned_tensor(torch: Any) -> None:
    for shape in ((1, 1), (333, 57), (4, 100, 16)):
        s = torch.rand(*shape, device="cuda")
        t = torch.from_dlpack(fp8gemm.get_col_major_tma_aligned_tensor(s))
        assert t.stride()[-2:] == (1, ceil_div(shape[-2], 4) * 4)
        assert torch.equal(t, s)


# ---- processes


def test_fork_after_cuda(torch: Any) -> None:
    """CUDA does not survive a fork: the child hears it, instead of hanging."""
    code = """
import os, torch, fp8gemm
a, s = torch.zeros(16, 128, device="cuda", dtype=torch.uint8), torch.ones(16, 1, device="cuda")
fp8gemm.gemm_fp8_fp8_bf16_nt((a, s), (a, s[:1]))
torch.cuda.synchronize()
child = os.fork()
if child == 0:
    try:
        fp8gemm.device.read_device.cache_clear()
        fp8gemm.get_num_sms()
    except fp8gemm.BackendUnavailable as error:
        os._exit(0 if "forked" in str(error) else 2)
    os._exit(1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(fp8gemm.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], timeout=120, cwd=root).returncode == 0


# ---- the tuner, which needs no framework ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_a_tune_is_right_and_no_slower(
    hopper: int, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Any, tools: Tools
) -> None:
    """The winner is stored, is used by the next call, and that call's result is right."""
    from fp8gemm import store
    from fp8gemm.tuner import presets, tune
    from fp8gemm.tuner.gpu import GpuTarget
    from fp8gemm.tuner.writer import Writer

    cubins = cache.directory() / "cubins"
    cubins.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cubins").symlink_to(cubins)  # what other tests compiled
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    target = GpuTarget(hopper)
    groups = 4 if kind else 1
    problem = presets.problem(kind, 512, 2112, 7168, groups, 128 if kind == native.MASKED else 0)
    (task,) = presets.tasks([problem], target.device)
    with Writer() as writer:
        (outcome,) = tune.run(target, writer, [task])
    target.close()
    winner = outcome.winner
    assert winner is not None, outcome.reason
    assert winner.default_seconds is not None
    assert winner.seconds <= winner.default_seconds + 2 * winner.spread
    rows = store.rows("measurements")
    assert len(rows) > 20
    assert {row["verdict"] for row in rows} == {"right"}, {row["verdict"] for row in rows}
    errors = [row["error"] for row in rows]
    assert all(0.99 < error < 1.02 for error in errors), errors
    assert store.plan(task.problem, target.device, target.device.sms) == winner.plan
    if kind == native.DENSE:
        planner.forget()
        found = native.Problem(kind, native.CUDA, hopper, 512, 2112, 7168, 1, 1, 1, 1)
        assert planner.choose(planner.make_key(found)) == (winner.plan, True)
        tools.dense(512, 2112, 7168)
        planner.forget()


def test_the_tuners_rig_sees_a_wrong_result(hopper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element, one element outside, half the precision."""
    from fp8gemm.tuner import presets, space
    from fp8gemm.tuner.gpu import GpuRig, GpuTarget

    target = GpuTarget(hopper)
    (task,) = presets.tasks([presets.problem(native.MASKED, 256, 576, 1024, 4, 64)], target.device)
    rig = GpuRig(target, task)
    plan = space.default(task, target.device)
    assert 0.99 < rig.error(plan) < 1.02
    original = rig._launch
    last = 255 * task.problem.n * 2  # of the first group, which has fewer rows

    def spoil(offset: int) -> None:
        def launch(entry: native.Entry, operands: native.Operands) -> None:
            original(entry, operands)
            target.gpu.fill(operands.d.data + offset, 0x4180, 1, 2)

        monkeypatch.setattr(rig, "_launch", launch)

    spoil(0)
    assert not rig.error(plan) <= 1.05
    spoil(last)
    assert not rig.error(plan) <= 1.05
    monkeypatch.setattr(rig, "_launch", lambda entry, operands: None)  # nothing is written
    assert not rig.error(plan) <= 1.05
    monkeypatch.undo()
    assert 0.99 < rig.error(plan) < 1.02
    rig.close()
    target.close()
