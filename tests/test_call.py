"""The call's fast path (native/host/call.cpp) and what is promised of calls, on the stub GPUs of tests/stub.py.

The long way through Python is the measure: both must launch the same, and fail in the same words.
"""

import concurrent.futures
import contextlib
import ctypes
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import stub
from hypothesis import given, settings
from hypothesis import strategies as st
from stub import BF16, E4M3, F32, I32, Managed, Tensor, launches, on_stub_gpus, set_stream

import fp8gemm
from fp8gemm import BackendUnavailable, Fp8GemmError, NotPrepared, OperandError, Shapes, gemm, native, planner
from fp8gemm.device import read_device
from fp8gemm.errors import DriverError, ShapeError
from fp8gemm.plan import L2_POLICIES, Plan
from fp8gemm.problem import KINDS, Problem

LEGACY_STREAM, CAPTURING = 1, 0xCA


class Call(NamedTuple):
    """The arguments of one call, as `gemm._call` takes them."""

    kind: int
    lhs: Any
    rhs: Any
    d: Any
    layout: Any = None
    stream: Any = None
    batch_invariant: Any = None
    expected_m: Any = 0
    validate: bool = False

    def public(self) -> Any:
        kind, lhs, rhs, d, layout, stream, invariant, expected_m, validate = self
        more: dict[str, Any] = {"stream": stream, "batch_invariant": invariant}
        if kind == native.DENSE:
            return fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d, **more)
        more |= {"expected_m": expected_m, "validate": validate}
        if kind == native.MASKED:
            return fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, d, layout, **more)
        name = "m_indices" if kind == native.CONTIGUOUS else "group_ends"
        return fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, d, **{name: layout}, **more)

    def the_long_way(self) -> Any:
        return gemm._call(*self)

    def without_python(self) -> Any:
        return FAST(*self)


def refuse(*call: Any) -> None:
    raise AssertionError("the builtin did not make this call itself")


FAST: Callable[..., Any] = native.library().python_call(refuse)


def operands(
    kind: int = native.DENSE,
    m: int = 100,
    n: int = 2112,
    k: int = 1040,
    groups: int = 3,
    device: int = 0,
    column: bool = True,
    pad: int = 0,
) -> Call:
    """Operands of one call; `column`: A's scales have rows fastest; `pad`: elements between rows of a, b and d."""
    kb, nb = -(-k // 128), -(-n // 128)
    g = (groups,) if kind != native.DENSE else ()
    ga = (groups,) if kind == native.MASKED else ()
    rows = -(-m // 4) * 4

    def padded(lead: tuple[int, ...], height: int, width: int, dtype: tuple[int, int]) -> Tensor:
        step = width + pad
        strides = (*((height * step,) if lead else ()), step, 1)
        return Tensor((*lead, height, width), dtype, device, strides)

    sa_strides = (*((rows * kb,) if ga else ()), 1, rows) if column else None
    layouts = {native.CONTIGUOUS: (m,), native.RAGGED: (groups,), native.MASKED: (groups,)}
    return Call(
        kind,
        (padded(ga, m, k, E4M3), Tensor((*ga, m, kb), F32, device, sa_strides)),
        (padded(g, n, k, E4M3), Tensor((*g, nb, kb), F32, device)),
        padded(ga, m, n, BF16),
        Tensor(layouts[kind], I32, device) if kind in layouts else None,
    )


def launched(body: Callable[[], object]) -> list[dict[str, Any]]:
    before = stub.driver().stub_launch_count()
    body()
    return launches(before)


# ---- what is launched


@on_stub_gpus
def test_a_dense_launch() -> None:
    call = operands(m=4000, n=4224, k=1040)
    (a, sa), (b, sb), d = call.lhs, call.rhs, call.d
    assert call.public() is d  # a miss
    (found,) = launched(lambda: call.without_python())
    plan = planner.default_plan(Problem(native.DENSE, 4096, 4224, 1040), read_device(0), 132)
    assert isinstance(plan, Plan)
    assert found["kernel"] == "fp8gemm_gemm"
    assert found["grid"] == [132 // plan.cluster * plan.cluster, 1, 1]
    assert (plan.depth, plan.split, found["pace"]) == (1, 1, 0)
    assert (found["block"], found["shared"], found["cluster"]) == (plan.threads, plan.shared_bytes, plan.cluster)
    assert found["stream"] == LEGACY_STREAM
    assert found["pointers"] == [x.address if x else 0 for x in (a, sa, b, sb, d, None)]
    assert found["rows"] == [1040, 1, 1040, 9, 4224]
    assert found["scale_steps"] == [4000, 1]
    assert found["groups"] == [0] * 5
    assert found["sizes"] == [4000, 4224, 1040, 1]
    assert (found["raster"], found["policy"]) == (plan.raster, L2_POLICIES[plan.b_policy])
    assert (found["d_staged"], found["sa_by_bulk"]) == (1, 1)
    swizzle_128, l2_asks_for_128 = 3, 2
    assert found["a"][:3] == [a.address, [1040, 4000, 1, 1], [1040] * 3]
    assert found["a"][3] == [128, plan.tile_m // plan.cluster_n, 1, 1]
    assert found["b"][:4] == [b.address, [1040, 4224, 1, 1], [1040] * 3, [128, plan.tile_n // plan.cluster_m, 1, 1]]
    assert found["a"][5:] == found["b"][5:] == [swizzle_128, l2_asks_for_128]
    rows, panels = 64 * plan.waves, plan.tile_n // 64
    assert found["d"][:4] == [d.address, [64, 4000, 66, 1], [8448, 128, 8448], [64, rows, panels, 1]]


@on_stub_gpus
def test_boxes_of_d() -> None:
    """One for a whole tile where N is whole panels of it; else one a panel, which TMA clips at N.

    Panels are 64 or 32 columns, swizzled, or all of a tile's.
    """
    none, swizzle_64, swizzle_128 = 0, 2, 3
    for tile_n, n, shape, strides, panel, panels, swizzle in (
        (192, 4224, [64, 1000, 66], [128], 64, 3, swizzle_128),
        (192, 4200, [4200, 1000, 1], [8400], 64, 1, swizzle_128),
        (160, 4224, [32, 1000, 132], [64], 32, 5, swizzle_64),
        (176, 4224, [176, 1000, 24], [352], 176, 1, none),
        (176, 4200, [4200, 1000, 1], [8400], 176, 1, none),
    ):
        call = operands(m=1000, n=n, k=1040)
        call.public()
        (listed,) = [x for x in planner.listing() if (x.key.m, x.key.n, x.key.row_scales) == (1024, n, 0)]
        planner.publish(listed.key, Plan(128, tile_n, 4, num_sms=132), True)
        (found,) = launched(call.without_python)
        assert found["d"][1:4] == [[*shape, 1], [2 * n, *strides, 2 * n], [panel, 64, panels, 1]]
        assert found["d"][5] == swizzle


def publish_deep(k: int) -> Call:
    """A call that a plan of four blocks a stage serves, in clusters that share B."""
    call = operands(m=100, n=2112, k=k)
    call.public()
    (listed,) = [x for x in planner.listing() if (x.key.m, x.key.n, x.key.k, x.key.row_scales) == (112, 2112, k, 0)]
    planner.publish(listed.key, Plan(64, 64, 3, cluster_m=2, depth=4, num_sms=132), True)
    return call


@on_stub_gpus
def test_a_deep_launch() -> None:
    """One box for all blocks of K that a CTA loads of a stage."""
    (found,) = launched(publish_deep(1024).without_python)
    assert found["grid"] == [66, 1, 1], "more clusters than tiles"
    stage_of_b, a_of_one = 4 * 128 * 64 // 2 * 66, 4 * 128 * 64
    assert found["pace"] == int((a_of_one + 4 * 128 * 64) / 70) > int(0.5 * stage_of_b / 2400 + a_of_one / 128 + 100)
    assert (found["d_staged"], found["sa_by_bulk"]) == (1, 1)
    a, b = ([[128, rows, 8, 1], [1024, 128, 1024], [128, 64, blocks, 1]] for rows, blocks in ((100, 4), (2112, 2)))
    assert found["a"][1:4] == a
    assert found["b"][1:4] == b


@on_stub_gpus
def test_deep_stages_are_of_whole_blocks() -> None:
    """The last block of another K would be left out."""
    call = publish_deep(1040)
    with pytest.raises(Fp8GemmError, match="a plan of depth 4, K = 1040; its boxes hold whole blocks of 128"):
        call.public()


@on_stub_gpus
def test_scales_in_pieces() -> None:
    """A stage's scales of a row come by one copy if in every stage they lie together, aligned to their size."""
    plan = Plan(64, 32, 3, depth=4, num_sms=132)
    whole, other = 1024, 1280  # of K: 8 and 10 blocks
    for k, sa_strides, offset, pieces in (
        (whole, (8, 1), 0, [1, 1]),
        (whole, (12, 1), 0, [1, 1]),
        (whole, (10, 1), 0, [0, 1]),
        (whole, (16, 2), 0, [0, 1]),
        (whole, (1, 100), 0, [0, 1]),
        (whole, (8, 1), 8, [0, 1]),
        (other, (12, 1), 0, [0, 0]),
    ):
        call = operands(m=100, n=576, k=k)
        aligned = Tensor((100, k // 128), F32, strides=sa_strides)
        sa = Tensor((100, k // 128), F32, strides=sa_strides, data=aligned.address + offset)
        call = call._replace(lhs=(call.lhs[0], sa))
        call.public()
        for listed in [x for x in planner.listing() if (x.key.m, x.key.n, x.key.k) == (112, 576, k)]:
            planner.publish(listed.key, plan, True)
        (found,) = launched(call.without_python)
        assert found["in_pieces"] == pieces, (k, sa_strides, offset)


@on_stub_gpus
def test_the_pace_of_first_stages() -> None:
    """What memory takes to bring a stage of B to all CTAs counts, and A's bytes; at least what an SM takes in."""
    for m, bucket, ctas in ((8, 8, 18), (48, 48, 18), (300, 320, 90)):
        call = operands(m=m, n=576, k=2048)
        call.public()
        (listed,) = [x for x in planner.listing() if (x.key.m, x.key.n, x.key.k) == (bucket, 576, 2048)]
        planner.publish(listed.key, Plan(64, 32, 4, depth=2, num_sms=132), True)
        (found,) = launched(call.without_python)
        assert found["grid"] == [ctas, 1, 1]
        stage_of_b, a_of_one = 2 * 128 * 32 * ctas, 2 * 128 * min(m, 64)
        by_memory, all_of_one = 0.5 * stage_of_b / 2400 + a_of_one / 128 + 100, (a_of_one + 2 * 128 * 32) / 70
        assert found["pace"] == int(max(by_memory, all_of_one)), "the stub's memory: 2400 bytes a cycle"
        assert (by_memory > all_of_one) == (m != 48)


@on_stub_gpus
def test_a_launch_of_a_split_k() -> None:
    """A cluster for each tile: along the grid's x those of a column, along y the columns."""
    for m, bucket, split, ctas in ((16, 16, 4, 4), (40, 48, 2, 4)):
        call = operands(m=m, n=4000, k=1024)
        call.public()
        (listed,) = [x for x in planner.listing() if (x.key.m, x.key.n) == (bucket, 4000)]
        planner.publish(listed.key, Plan(32, 128, 4, split=split, num_sms=132), True)
        (found,) = launched(call.without_python)
        assert (found["grid"], found["cluster"]) == ([ctas, 32, 1], split)
        assert found["d_staged"] == 0, "straight from registers"


@on_stub_gpus
def test_both_ways_launch_the_same() -> None:
    set_stream(0, 0x50)
    set_stream(1, 0x51)
    kinds = range(4)
    for kind in kinds:
        for m, n, k in ((1, 128, 128), (100, 2112, 1040), (700, 77, 256), (4096, 576, 7168)):
            for more in ({}, {"column": False}, {"pad": 16}, {"pad": 3}, {"device": 1}, {"groups": 1}):
                call = operands(kind, m, n, k, **more)
                for changes in ({}, {"stream": 0x99}, {"stream": 0, "batch_invariant": True}, {"expected_m": 37}):
                    call = call._replace(**changes)  # type: ignore[arg-type]
                    (expected,) = launched(call.the_long_way)
                    assert launched(call.without_python) == [expected]
                    assert launched(call.public) == [expected]
    assert {found["kernel"] for found in launches()} == {"fp8gemm_gemm", "fp8gemm_reference"}


@on_stub_gpus
def test_batch_invariant_as_set() -> None:
    """A call that does not say takes the setting, both ways; one that says does not."""
    call = operands(m=16, n=576, k=7168)  # few tiles: the default plan splits K
    split, whole = (launched(call._replace(batch_invariant=invariant).public) for invariant in (False, True))
    assert split != whole
    fp8gemm.set_batch_invariant(True)
    assert launched(call.the_long_way) == launched(call.without_python) == whole
    assert launched(call._replace(batch_invariant=False).without_python) == split
    fp8gemm.set_batch_invariant(False)
    assert launched(call.without_python) == launched(call.the_long_way) == split


@on_stub_gpus
def test_offsets_and_no_strides() -> None:
    call = operands(column=False)
    (a, sa), (b, sb), d = call.lhs, call.rhs, call.d
    call.public()
    (plain,) = launched(call.without_python)
    moved = [
        Tensor(shape, dtype, data=x.address - 64, byte_offset=64, no_strides=1)
        for x, shape, dtype in (
            (a, (100, 1040), E4M3),
            (sa, (100, 9), F32),
            (b, (2112, 1040), E4M3),
            (sb, (17, 9), F32),
            (d, (100, 2112), BF16),
        )
    ]
    same = Call(native.DENSE, (moved[0], moved[1]), (moved[2], moved[3]), moved[4])
    assert launched(same.without_python) == [plain]


@on_stub_gpus
def test_integers_for_fp8_and_bf16() -> None:
    call = operands()
    call.public()
    a, b = (Tensor(shape, (1, 8)) for shape in ((100, 1040), (2112, 1040)))
    bits = call._replace(lhs=(a, call.lhs[1]), rhs=(b, call.rhs[1]), d=Tensor((100, 2112), (1, 16)))
    assert bits.without_python() is bits.d


@on_stub_gpus
def test_no_rows_launch_nothing() -> None:
    for kind in range(4):
        assert launched(operands(kind, m=0).public) == []


# ---- streams and devices


@on_stub_gpus
def test_streams() -> None:
    calls = [operands(device=device) for device in (0, 1)]
    for call in calls:
        call.public()
    for current, expected in ((0, LEGACY_STREAM), (2, 2), (0x7F0000001230, 0x7F0000001230)):
        set_stream(0, current)
        set_stream(1, current + 16)
        assert [launched(call.without_python)[0]["stream"] for call in calls] == [expected, current + 16]
    for given_stream, expected in ((0, LEGACY_STREAM), (7, 7), (2**64 - 1, 2**64 - 1)):
        (found,) = launched(calls[0]._replace(stream=given_stream).without_python)
        assert found["stream"] == expected


@on_stub_gpus
def test_each_device_has_its_kernels_limits_and_context() -> None:
    """And the caller's context is current again afterwards."""
    calls = [operands(m=2000, n=8448, device=device) for device in (0, 1)]
    current, context = stub.driver().cuCtxGetCurrent, ctypes.c_void_p()
    for way in ("public", "without_python"):
        for device, sms in ((0, 132), (1, 78)):
            for mine in (None, 8, 9):
                if mine:
                    stub.driver().cuCtxPushCurrent_v2(ctypes.c_void_p(mine))
                (found,) = launched(getattr(calls[device], way))
                current(ctypes.byref(context))
                assert context.value == mine
                if mine:
                    stub.driver().cuCtxPopCurrent_v2(ctypes.byref(context))
                assert (found["device"], found["context"]) == (device, 8 + device)
                assert found["grid"][0] in (sms, sms - 1)
    fp8gemm.set_num_sms(40, device=1)
    for device, sms in ((0, 132), (1, 40)):
        (found,) = launched(calls[device].public)
        assert found["grid"][0] in (sms, sms - 1)
        assert launched(calls[device].without_python) == [found]
    fp8gemm.set_num_sms(78, device=1)  # all of them: no limit
    assert launched(calls[1].without_python)[0]["grid"][0] in (78, 77)


# ---- what the builtin leaves to Python


class Pair(NamedTuple):
    values: Any
    scales: Any


@on_stub_gpus
def test_pairs() -> None:
    call = operands()
    call.public()
    named = call._replace(lhs=Pair(*call.lhs), rhs=Pair(*call.rhs))
    assert named.without_python() is call.d
    lists = call._replace(lhs=list(call.lhs), rhs=list(call.rhs))
    assert launched(lists.public) == launched(call.without_python)


def outcome(body: Callable[[], object]) -> str:
    try:
        return f"returned {body()!r:.40}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def wrong_calls() -> list[Call]:
    wrong = []
    for kind in range(4):
        call = operands(kind)
        (a, sa), (b, sb), d, layout = call.lhs, call.rhs, call.d, call.layout
        ga, g = ((3,) if kind == native.MASKED else ()), ((3,) if kind else ())
        spoilt: list[tuple[str, Tensor]] = [
            ("a", Tensor((*ga, 100, 1040), F32)),
            ("a", Tensor((*ga, 100, 1041), E4M3)),
            ("a", Tensor((100,), E4M3)),
            ("a", Tensor((*ga, 100, 1040), E4M3, strides=(*([10**6] if ga else []), 2080, 2))),
            ("a", Tensor((*ga, 100, 1040), E4M3, device=1)),
            ("a", Tensor((*ga, 100, 1040), E4M3, device_type=1)),
            ("a", Tensor((*ga, 100, 1040), E4M3, device_type=7)),
            ("a", Tensor((*ga, 100, 1040), E4M3, fails=1)),
            ("a", Tensor((*ga, 100, 1040), E4M3, lanes=2)),
            ("a", Tensor((*ga, 100, 1040), E4M3, ndim=4)),
            ("a", Tensor((*ga, 2**31, 1040), E4M3)),
            ("sa", Tensor((*ga, 100, 8), F32)),
            ("sa", Tensor((*ga, 100, 9), F32, data=0x1002)),
            ("sa", Tensor((*ga, 100, 9), F32, device=1)),
            ("b", Tensor((*g, 2112, 1024), E4M3)),
            ("b", Tensor((2, 2, 1040), E4M3)),
            ("sb", Tensor((*g, 17, 9), BF16)),
            ("d", Tensor((*ga, 100, 2112), F32)),
            ("d", Tensor((*ga, 100, 2111), BF16)),
            ("d", Tensor((*ga, 100, 2112), BF16, data=a.address)),
            ("d", Tensor((*ga, 100, 2112), BF16, strides=(*([0] if ga else []), 0, 1))),
            ("d", Tensor((*ga, 100, 2112), BF16, device_type=1)),
            ("layout", Tensor((99,), I32)),
            ("layout", Tensor((3,), F32)),
            ("layout", Tensor((100 if kind == native.CONTIGUOUS else 3,), I32, fails=1)),
        ]
        for name, tensor in spoilt:
            if name == "layout" and not kind:
                continue
            x = {"a": a, "sa": sa, "b": b, "sb": sb, "d": d, "layout": layout, name: tensor}
            wrong.append(call._replace(lhs=(x["a"], x["sa"]), rhs=(x["b"], x["sb"]), d=x["d"], layout=x["layout"]))
        changes: list[dict[str, Any]] = [
            {"lhs": a},
            {"lhs": (a, sa, sa)},
            {"rhs": None},
            {"lhs": (None, sa)},
            {"rhs": (b, 3)},
            {"d": 3},
            {"d": "d"},
            {"stream": -1},
            {"stream": True},
            {"stream": "5"},
            {"stream": 1.0},
        ]
        if kind:
            changes += [{"expected_m": x} for x in (-1, True, 2.0, None, "3")]
            changes += [{"layout": 3}]
        wrong += [call._replace(**change) for change in changes]
    return wrong


@on_stub_gpus
def test_errors_are_the_long_ways() -> None:
    """Every way of being wrong, with a plan in the table that would fit: nothing is launched."""
    for kind in range(4):
        operands(kind).public()
    before, seen = stub.driver().stub_launch_count(), set()
    calls = wrong_calls()
    for call in calls:
        expected = outcome(call.the_long_way)
        assert not expected.startswith("returned"), (call, expected)
        assert outcome(call.public) == expected
        with pytest.raises(AssertionError, match="did not make"):
            call.without_python()
        seen.add(expected)
    assert len(seen) > 50
    assert stub.driver().stub_launch_count() == before


@on_stub_gpus
def test_what_is_not_common_goes_the_long_way() -> None:
    stub.quiet()
    call = operands(native.MASKED)
    call.public()

    class Stream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 0x33

    for changes, stream in (
        ({"stream": Stream()}, 0x33),
        ({"validate": True}, 1),
        ({"expected_m": 10**30}, 1),
        ({"d": None}, 1),
    ):
        uncommon = call._replace(**changes)
        with pytest.raises(AssertionError, match="did not make"):
            uncommon.without_python()
        (found,) = launched(uncommon.public)
        assert found["stream"] == stream
    ours = call.public().__class__ and call._replace(d=None).public()
    assert isinstance(ours, fp8gemm.Tensor)
    assert ours.shape == (3, 100, 2112)


@on_stub_gpus
def test_tensors_by_capsule() -> None:
    """Each capsule is made for the call's stream and deleted once the stream has passed."""
    stub.quiet()
    set_stream(0, 0x50)
    for versioned in (False, True):
        call = operands(native.RAGGED)
        tensors = [*call.lhs, *call.rhs, call.d, call.layout]
        managed = [Managed(x, versioned=versioned) for x in tensors]
        a, sa, b, sb, d, layout = managed
        (expected,) = launched(call._replace(stream=5).public)
        by_capsule = Call(native.RAGGED, (a, sa), (b, sb), d, layout, 5)
        for _ in range(10):
            assert launched(by_capsule.public) == [expected]
        mixed = call._replace(lhs=(a, call.lhs[1]))  # d decides the stream
        assert launched(mixed.public) == [expected | {"stream": 0x50}]
        fp8gemm.dlpack._held.release_finished()
        assert [(x.made, x.deleted) for x in managed] == [(11, 11), *[(10, 10)] * 5]
        assert set(a.streams) == {5, 0x50}
        assert set(d.streams) == {5}


@on_stub_gpus
def test_types_of_tensors() -> None:
    """More than the builtin remembers; subclasses; one that gets its exchange API later."""
    call = operands()
    call.public()
    (expected,) = launched(call.without_python)
    types = [type(f"Tensor{i}", (Tensor,), {}) for i in range(40)]
    for kind in types:
        d = kind((100, 2112), BF16, data=call.d.address)
        for _ in range(2):
            assert launched(call._replace(d=d).without_python) == [expected]

    class Late(bytes):
        pass

    late = Late(call.d)
    assert "Late is no tensor" in outcome(call._replace(d=late).public)
    Late.__dlpack_c_exchange_api__ = Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    assert launched(call._replace(d=late).without_python) == [expected]

    class Wrong(bytes):
        __dlpack_c_exchange_api__ = "no capsule"

    assert "Wrong is no tensor" in outcome(call._replace(d=Wrong(call.d)).public)


@on_stub_gpus
def test_sizes_that_no_kernel_counts() -> None:
    """Rows and columns in whole tiles are 32 bits wide, a grid's second and third extent 16."""
    for call, argument, text in (
        (operands(m=2**31 - 64, n=16, k=16), "a", r"M = 2147483584, G = 1; .* at most 2147483136"),
        (operands(native.RAGGED, m=16, n=16, k=16, groups=2**23), "a", r"M = 16, G = 8388608; "),
        (operands(native.MASKED, m=2**23, n=16, k=16, groups=300), "a", r"M = 8388608, G = 300; "),
        (operands(m=16, n=2**31 - 64, k=16), "b", "N = 2147483584, must be at most 2147483136"),
        (operands(m=16, n=64 * 65536, k=16, pad=1), "b", "N = 4194304; this kernel takes at most 4194240"),
        (operands(native.RAGGED, m=16, n=16, k=16, groups=65536, pad=1), "b", "G = 65536; this kernel takes at most"),
    ):
        with pytest.raises(ShapeError, match=text) as caught:
            call.public()
        assert caught.value.argument == argument


@on_stub_gpus
def test_references_are_balanced() -> None:
    """A leak of one a call would show; so would the opposite, by a crash."""
    call = operands(native.MASKED)
    objects = [*call, *call.lhs, *call.rhs, *map(type, call), None, True, NotImplemented, tuple, int, refuse]
    wrong = [call._replace(d=Tensor((1,), BF16)), call._replace(expected_m=10**30), call._replace(lhs=())]
    call.public()
    for _ in range(10):
        call.without_python()

    def count() -> list[int]:
        gc.collect()
        return [sys.getrefcount(x) for x in objects]

    before = count()
    for _ in range(500):
        call.without_python()
        for x in wrong:
            outcome(x.without_python)
    after = count()
    assert all(abs(x - y) < 100 for x, y in zip(before, after, strict=True)), (before, after)


# ---- captures, strictness, preparation


@on_stub_gpus
def test_a_capture() -> None:
    """It takes calls that are prepared; others hear of it before anything is compiled."""
    stub.quiet()
    call = operands(n=512)._replace(stream=CAPTURING)
    with pytest.raises(
        NotPrepared, match=r"dense, m = 112, n = 512, k = 1040 on cuda:0: .*prepare\(\).*before the cap"
    ):
        call.public()
    assert stub.modules() == 0
    fp8gemm.prepare(Shapes(n=512, k=1040, m=100))
    (found,) = launched(call.without_python)
    assert found["stream"] == CAPTURING
    with pytest.raises(NotPrepared, match="pass d"):
        call._replace(d=None).public()


@on_stub_gpus
def test_strict() -> None:
    os.environ["FP8GEMM_CACHE_DIR"] += "-strict"
    os.environ["FP8GEMM_STRICT"] = "1"
    call = operands(native.MASKED)._replace(expected_m=60)
    text = "masked, m = 112, n = 2112, k = 1040, groups = 3, expected_m = 64 on cuda:0: "
    with pytest.raises(NotPrepared, match=rf"{text}.*never compiled.*FP8GEMM_STRICT=1.*fp8gemm\.prepare\(\)"):
        call.public()
    unaligned = operands(native.MASKED, pad=3)
    with pytest.raises(NotPrepared, match=r"masked, strides that TMA cannot take or K = 0 on cuda:0: .*prepare"):
        unaligned.public()
    x = Tensor((5, 128), BF16), (Tensor((5, 128), E4M3), Tensor((5, 1), F32))
    with pytest.raises(NotPrepared, match="prepare"):
        fp8gemm.per_token_cast_to_fp8(*x)
    fp8gemm.prepare(Shapes(n=2112, k=1040, m=100, kind="masked", groups=3, expected_m=60))
    for prepared in (call, unaligned):
        assert prepared.without_python() is prepared.d
    fp8gemm.per_token_cast_to_fp8(*x)
    with pytest.raises(NotPrepared, match="k = 2048"):
        operands(m=4096, k=2048).public()
    del os.environ["FP8GEMM_STRICT"]
    operands(m=4096, k=2048).public()
    planner.forget()
    fp8gemm.backends._kernels.clear()
    os.environ["FP8GEMM_STRICT"] = "1"
    operands(m=4096, k=2048).public()  # loading what this machine has compiled is no compilation


@on_stub_gpus
def test_prepare() -> None:
    """After it no call of those shapes misses, whatever its strides and scales; each kernel is loaded once."""
    shapes = [Shapes(n=576, k=1024, m=range(1, 700))]
    shapes += [Shapes(n=512, k=512, m=[64, 4096], kind=kind, groups=4, expected_m=[0, 80]) for kind in KINDS[1:]]
    prepared = fp8gemm.prepare(shapes, device=1, batch_invariant=True)
    listed = planner.listing()
    assert prepared.plans == len(listed)
    assert prepared.kernels == stub.modules() < prepared.plans
    assert not sum(entry.calls for entry in listed)
    for m in (1, 16, 17, 128, 129, 640, 699):
        for more in ({}, {"column": False}, {"pad": 16}, {"pad": 1}):
            operands(m=m, n=576, k=1024, device=1, **more)._replace(batch_invariant=True).without_python()
    for kind in range(1, 4):
        for expected_m in (0, 80):
            call = operands(kind, 4096, 512, 512, groups=4, device=1)
            call._replace(batch_invariant=True, expected_m=expected_m).without_python()
    assert stub.modules() == prepared.kernels
    assert fp8gemm.prepare(shapes, device=1, batch_invariant=True) == prepared
    assert stub.modules() == prepared.kernels
    with pytest.raises(AssertionError, match="did not make"):
        operands(m=100, n=576, k=1024).without_python()  # another device


@on_stub_gpus
def test_a_full_table() -> None:
    """A process with more problems than it takes goes on, one look at the cost model a call."""
    call = operands(n=70000)
    key = planner.make_key(native.Problem(0, native.CPU, 0, 16, 1, 128, 1))
    for key.n in range(1, 70000):
        native.library().put(ctypes.byref(native.Entry(key=key)))
    assert len(planner.listing()) == 65536
    for _ in range(2):
        assert len(launched(call.public)) == 1
        with pytest.raises(AssertionError, match="did not make"):
            call.without_python()


@on_stub_gpus
def test_prepare_says_what_is_impossible() -> None:
    right = Shapes(n=512, k=512, m=64)
    for changes, argument, text in (
        ({"n": 0}, "n", "0; must be an int from 1"),
        ({"k": 72}, "k", "72; must be a multiple of 16"),
        ({"m": [5, -1]}, "m", "-1; must be an int from 0"),
        ({"m": 2**31}, "m", "2147483648; must be"),
        ({"m": 1.5}, "m", "1.5"),
        ({"kind": "sparse"}, "kind", "'sparse', known are dense"),
        ({"groups": 2}, "groups", "2; a dense problem has 1"),
        ({"expected_m": -3}, "expected_m", "-3"),
    ):
        with pytest.raises(OperandError) as caught:
            fp8gemm.prepare(right._replace(**changes))
        assert caught.value.argument == argument
        assert text in str(caught.value)
    with pytest.raises(DriverError):
        fp8gemm.prepare(right, device=5)


# ---- threads, processes, the end


@on_stub_gpus
def test_a_launch_that_waits_lets_other_threads_run() -> None:
    """A full queue blocks the launch; what drains it may need the interpreter."""
    call = operands()
    call.public()
    flag, waiting = stub.flag("stub_launches_wait"), stub.flag("stub_waiting")
    flag.value = 1
    thread = threading.Thread(target=call.without_python)
    thread.start()
    while not waiting.value:
        time.sleep(0.001)
    flag.value = 0
    thread.join()
    assert len(launches()) == 2


@on_stub_gpus
def test_a_launch_that_fails() -> None:
    call = operands()
    call.public()
    stub.flag("stub_launch_result").value = 719
    with pytest.raises(DriverError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_STUB \(719\)"):
        call.public()
    stub.flag("stub_launch_result").value = 0
    assert call.without_python() is call.d


@on_stub_gpus
def test_plans_are_replaced_while_threads_call() -> None:
    """A new plan is every call's from then on; every launch is by one plan and that plan's own kernel."""
    sys.setswitchinterval(1e-4)
    threads, call = 6, operands(m=4096)
    call.public()
    key = planner.listing()[0].key
    plans = [Plan(128, tile_n, 5, num_sms=tile_n) for tile_n in (80, 96, 112, 128)]
    seen = set[tuple[int, int, int]]()  # grid, shared memory and function of launches
    count, stop = stub.driver().stub_launch_count, threading.Event()

    def work() -> None:
        while not stop.is_set():
            call.public()
            time.sleep(1e-4)  # the stub knows the latest few thousand launches only

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        for i in range(60):
            if i % 10 == 9:
                planner.forget()  # misses, of which each asks the cost model
            plan = plans[i % 4]
            planner.publish(key, plan, True)
            before = count()
            while count() < before + threads + 20:
                time.sleep(0.0002)
            latest = [(x["grid"][0], x["shared"], x["function"]) for x in launches(before, before + threads + 20)]
            seen.update(latest)
            # a thread may be under way with what it found before
            assert sum(x[:2] != (plan.num_sms, plan.shared_bytes) for x in latest) <= threads
        stop.set()
        for worker in workers:
            worker.result()
    assert {(plan.num_sms, plan.shared_bytes) for plan in plans} <= {x[:2] for x in seen}
    assert len(seen) == len({x[:2] for x in seen}) == len({x[2] for x in seen})


@on_stub_gpus
def test_fork() -> None:
    """A child of a process that used CUDA hears it from every call that would, at once; the CPU backend works."""
    stub.quiet()
    call = operands()
    call.public()
    call.without_python()
    ours = call._replace(d=None).public()
    x = Tensor((5, 128), BF16), (Tensor((5, 128), E4M3), Tensor((5, 1), F32))
    fp8gemm.backends._lock.acquire()  # as if another thread were loading a kernel
    bodies: list[Callable[[], object]] = [
        call.public,
        call._replace(d=None).public,
        operands(m=4096).public,
        operands(pad=3).public,
        operands(native.RAGGED)._replace(stream=5).public,
        operands(native.RAGGED)._replace(validate=True, stream=5).public,
        lambda: fp8gemm.per_token_cast_to_fp8(*x),
        lambda: fp8gemm.per_block_cast_to_fp8(x[0]),
        lambda: fp8gemm.get_col_major_tma_aligned_tensor(Tensor((5, 4), F32)),
        lambda: fp8gemm.prepare(Shapes(n=512, k=512, m=64)),
        lambda: ours.__dlpack__(stream=1),
    ]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for body in bodies:
                with pytest.raises(BackendUnavailable, match="forked after CUDA was used"):
                    body()
            del ours
            import numpy as np

            a, s = np.zeros((16, 128), np.uint8), np.ones((16, 1), np.float32)
            result = fp8gemm.gemm_fp8_fp8_bf16_nt((a, s), (a, s[:1]))
            assert not result.numpy().any()
            status = 0
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(status)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == (child, 0)
    fp8gemm.backends._lock.release()
    assert call.without_python() is call.d  # the parent goes on


@on_stub_gpus
def test_a_fork_before_cuda_is_used_is_fine() -> None:
    native.library().entries(None, None, 0)
    child = os.fork()
    if child == 0:
        operands().public()
        os._exit(0 if len(launches()) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0


@on_stub_gpus
def test_the_end_of_the_interpreter() -> None:
    """While threads still call, and with tensors of ours about."""
    stub.quiet()
    call = operands()
    kept.extend([call._replace(d=None).public(), call])
    for _ in range(4):
        threading.Thread(target=_call_for_ever, args=(call,), daemon=True).start()
    time.sleep(0.1)


kept: list[Any] = []


def _call_for_ever(call: Call) -> None:
    while True:
        call.public()


def test_8_threads_under_the_thread_sanitizer(stub: Path, tmp_path: Path) -> None:
    """tests/threads.cpp: look-ups, launches on both devices, replaced plans, limits and listings at once."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread"]
    for command in (["g++", *flags, str(probe), "-o", str(tmp_path / "probe")], [str(tmp_path / "probe")]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("g++ has no thread sanitizer here")
    here, host = Path(__file__).parent, Path(__file__).parents[1] / "native" / "host"
    names = ("dlpack", "driver", "error", "launch", "lock", "problem", "python", "table")
    sources = [str(host / f"{name}.cpp") for name in names]
    driver = ["g++", *flags, "-shared", "-fPIC", str(here / "stub_driver.cpp"), "-o", str(tmp_path / "libcuda.so.1")]
    program = ["g++", *flags, "-pthread", *sources, str(here / "threads.cpp"), "-ldl", "-o", str(tmp_path / "threads")]
    compilers = [subprocess.Popen(command) for command in (driver, program)]
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    settings = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(tmp_path / "threads")], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_look_ups_make_no_system_call(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/look_ups.cpp forbids them to itself, and counts allocations; the time is told, not judged."""
    here, host = Path(__file__).parent, Path(__file__).parents[1] / "native" / "host"
    names = ("error", "lock", "table")
    program = tmp_path / "look_ups"
    sources = [str(host / f"{name}.cpp") for name in names]
    subprocess.run(
        ["g++", "-std=c++17", "-O3", "-pthread", *sources, str(here / "look_ups.cpp"), "-o", str(program)], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    with capsys.disabled():
        print(f"\n{done.stdout.strip()} ", end="")


# ---- structs of any content, by both doors

EDGES = st.sampled_from([0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)])
INT64 = st.one_of(st.integers(0, 300), EDGES, st.integers(-(2**63), 2**63 - 1))
INT32 = st.one_of(st.integers(-2, 5), st.integers(-(2**31), 2**31 - 1))
FIELDS: dict[str, st.SearchStrategy[int]] = {
    "ndim": INT32,
    "device_type": st.one_of(st.sampled_from([1, 3, 13]), INT32),
    "device_id": st.one_of(st.just(1), INT32),
    "code": st.integers(0, 255),
    "bits": st.integers(0, 255),
    "lanes": st.integers(0, 2**16 - 1),
    "byte_offset": st.one_of(st.sampled_from([16, 1]), st.integers(0, 2**64 - 1)),
    "no_strides": st.just(1),
    "fails": st.just(1),
}


@st.composite
def nearly(draw: st.DrawFn, tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor with a few of its fields spoilt, and whether any is."""
    record = stub.record(tensor)
    spoilt = (
        draw(st.sets(st.sampled_from([*FIELDS, "shape", "strides", "data"]), max_size=2))
        if draw(st.integers(0, 3)) == 0
        else set()
    )
    for name in spoilt:
        if name in ("shape", "strides"):
            getattr(record, name)[draw(st.integers(0, 3))] = draw(INT64)
        else:
            setattr(record, name, draw(FIELDS.get(name, st.sampled_from([None, 1, 2**48, 2**64 - 1]))))
    return stub.of_record(record), bool(spoilt)


@on_stub_gpus
def test_no_struct_crashes_or_leaks() -> None:
    """Typed errors or the right launch, the same by both ways; capsules are deleted once, whatever is in them."""
    stub.quiet()
    outcomes: dict[str, int] = {}

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.data())
    def body(data: st.DataObject) -> None:
        call = operands(data.draw(st.sampled_from(range(4))), m=data.draw(st.sampled_from([1, 100])), k=256, n=128)
        tensors = [*call.lhs, *call.rhs, call.d, *([call.layout] if call.kind else [])]
        drawn = [data.draw(nearly(tensor)) for tensor in tensors]
        given_tensors: list[Any] = [tensor for tensor, _ in drawn]
        a, sa, b, sb, d = given_tensors[:5]
        changed = call._replace(lhs=(a, sa), rhs=(b, sb), d=d, layout=given_tensors[5] if call.kind else None)
        before = stub.driver().stub_launch_count()
        expected = outcome(changed.the_long_way)
        by_python = launches(before)
        before = stub.driver().stub_launch_count()
        assert outcome(changed.public) == expected
        assert launches(before) == by_python
        if not any(spoilt for _, spoilt in drawn):
            assert len(by_python) == 1
        outcomes[expected.split(":")[0][:12]] = outcomes.get(expected.split(":")[0][:12], 0) + 1

        managed = [
            Managed(
                tensor,
                versioned=data.draw(st.booleans()),
                version=data.draw(st.sampled_from([(1, 0), (1, 0), (1, 0), (1, 99), (2, 0), (0, 8)])),
                flags=data.draw(st.sampled_from([0, 0, 0, 1, 2, 2**64 - 1])),
                name=data.draw(st.sampled_from([None] * 20 + [b"used_dltensor", b"dltensor2", b""])),
            )
            for tensor in given_tensors
        ]
        a, sa, b, sb, d = managed[:5]
        by_capsule = call._replace(lhs=(a, sa), rhs=(b, sb), d=d, layout=managed[5] if call.kind else None)
        with contextlib.suppress(Fp8GemmError, BufferError):
            by_capsule.public()
        gc.collect()
        fp8gemm.dlpack._held.release_finished()
        assert all(x.made == x.deleted for x in managed), [(x.made, x.deleted) for x in managed]

    body()
    assert outcomes["returned b'\\"[:12]] > 30
    assert sum(outcomes.values()) - outcomes["returned b'\\"[:12]] > 30, outcomes


# ---- what the public functions look like


def test_signatures_and_help_are_those_of_python_functions() -> None:
    for function, names in (
        (fp8gemm.gemm_fp8_fp8_bf16_nt, ["lhs", "rhs", "d", "stream", "batch_invariant"]),
        (
            fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked,
            ["lhs", "rhs", "d", "masked_m", "expected_m", "validate", "stream", "batch_invariant"],
        ),
    ):
        assert list(inspect.signature(function).parameters) == names
        assert "float8_e4m3fn" in (inspect.getdoc(function) or "")
