"""The table of plans (native/host/table.cpp): keys, look-ups, replacement, listings."""

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8gemm
from fp8gemm import OperandError, native, planner
from fp8gemm.backends import CpuPlan
from fp8gemm.problem import Problem

CPU, CUDA = native.CPU, native.CUDA


@pytest.fixture(autouse=True)
def _empty_table() -> Iterator[None]:
    planner.forget()
    planner.listing()
    yield
    planner.forget()


def found(
    kind: int = native.DENSE, device_type: int = CUDA, m: int = 100, groups: int = 1, **more: int
) -> native.Problem:
    problem = native.Problem(kind, device_type, 0, m, 512, 1024, groups, 1, 1, 1)
    for name, value in more.items():
        setattr(problem, name, value)
    return problem


def fields(struct: ctypes.Structure) -> dict[str, int]:
    return {field[0]: getattr(struct, field[0]) for field in struct._fields_}


def key(kind: int = native.DENSE, *, expected_m: int = 0, batch_invariant: bool = False, **more: int) -> dict[str, int]:
    return fields(planner.make_key(found(kind, **more), expected_m, batch_invariant))


# ---- keys


@given(st.integers(0, 2**31 - 1))
def test_bucket(m: int) -> None:
    step = 8 if m <= 8 else 16 if m <= 128 else 64 if m <= 1024 else 256
    assert planner.bucket(m) == min(-(-m // step) * step, 2**31 - 1)


def test_key_of_a_dense_call() -> None:
    assert key(m=100, expected_m=70) == {
        "kind": native.DENSE,
        "device_type": CUDA,
        "device_id": 0,
        "reference": 0,
        "m": 112,
        "n": 512,
        "k": 1024,
        "groups": 1,
        "expected_m": 0,
        "row_scales": 0,
        "num_sms": 0,
        "batch_invariant": 0,
    }


def test_what_a_key_tells_apart() -> None:
    plain = key()
    assert key(m=97) == plain
    assert key(output_by_tma=0) == plain
    different = [
        key(m=96),
        key(n=513),
        key(k=1040),
        key(device_id=1),
        key(scales_by_bulk=0),
        key(batch_invariant=True),
        key(device_type=CPU),
        key(native.RAGGED, groups=1),
        key(native.RAGGED, groups=1, scales_by_bulk=0),
        key(native.RAGGED, groups=2),
        key(native.RAGGED, groups=2, expected_m=17),
        key(k=0),
    ]
    assert len({tuple(k.items()) for k in (plain, *different)}) == 1 + len(different)


def test_calls_that_do_not_say_are_batch_invariant_as_set() -> None:
    said = [
        fields(planner.make_key(found(native.DENSE), 0, invariant))["batch_invariant"] for invariant in (False, True)
    ]
    assert said == [0, 1]
    assert not fp8gemm.get_batch_invariant()
    try:
        for enabled in (True, False):
            fp8gemm.set_batch_invariant(enabled)
            assert fp8gemm.get_batch_invariant() is enabled
            assert fields(planner.make_key(found(native.DENSE), 0, None))["batch_invariant"] == enabled
            assert fields(planner.make_key(found(native.DENSE), 0, not enabled))["batch_invariant"] == (not enabled)
    finally:
        fp8gemm.set_batch_invariant(False)
    with pytest.raises(OperandError, match="enabled: 1; must be a bool"):
        fp8gemm.set_batch_invariant(1)  # type: ignore[arg-type]


def test_sm_limits_are_part_of_the_key() -> None:
    native.library().limit_sms(1, 100)
    assert (key()["num_sms"], key(device_id=1)["num_sms"], key(device_id=1, device_type=CPU)["num_sms"]) == (0, 100, 0)
    native.library().limit_sms(1, 0)
    assert key(device_id=1)["num_sms"] == 0
    for device_id in (-1, 64, 2**31 - 1):
        assert native.library().sm_limit(device_id) == 0


@pytest.mark.parametrize(("kind", "factor"), [(native.CONTIGUOUS, 1.0), (native.RAGGED, 1.0), (native.MASKED, 1.2)])
def test_expected_m(kind: int, factor: float) -> None:
    """Callers of the masked form put 1.2 on top of a group's mean rows; nobody can mean more rows than there are."""
    for rows in (0, 16, 80, 112, 1024):
        assert key(kind, m=4096, groups=4, expected_m=round(rows * factor + 0.49))["expected_m"] == rows
    for expected_m in (4096 * 2, 2**31 - 1, 2**31, 10**30):
        assert key(kind, m=4096, groups=4, expected_m=expected_m)["expected_m"] == 4096


def test_the_reference_kernel_has_one_key_a_kind_and_device() -> None:
    keys = [key(native.MASKED, m=1, inputs_by_tma=0), key(native.MASKED, m=300, groups=7, expected_m=300, k=0)]
    assert keys[0] == keys[1]
    assert {name for name, value in keys[0].items() if value} == {"kind", "device_type", "reference"}


# ---- look-ups


def entry(n: int, tile_n: int, from_store: bool = False) -> native.Entry:
    made = native.Entry(key=planner.make_key(found(n=n, device_type=CPU)), from_store=from_store)
    made.cpu_plan.tile_n = tile_n
    return made


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "find", "find", "list", "forget"]), st.integers(1, 40), st.integers(0, 10**6)
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(OPERATIONS)
def test_the_table_is_a_dictionary_that_counts(operations: list[tuple[str, int, int]]) -> None:
    library, model, calls = native.library(), dict[int, int](), dict[int, int]()
    planner.forget()
    planner.listing()
    for i in range(1, 41):  # counts of the example before: only entries are listed
        library.put(ctypes.byref(entry(i, 0)))
    planner.listing()
    planner.forget()
    for operation, i, value in operations:
        if operation == "put":
            library.put(ctypes.byref(entry(i, value)))
            model[i] = value
        elif operation == "find":
            at = library.find(ctypes.byref(entry(i, 0).key))
            assert (at.contents.cpu_plan.tile_n if at else None) == model.get(i)
            if at:
                calls[i] = calls.get(i, 0) + 1
        elif operation == "list":
            assert {e.key.n: e.calls for e in planner.listing()} == {n: calls.get(n, 0) for n in model}
            calls = {n: count for n, count in calls.items() if n not in model}
        else:
            planner.forget()
            model.clear()


def test_an_entry_that_was_found_stays_as_it_is() -> None:
    library = native.library()
    library.put(ctypes.byref(entry(16, 1)))
    old = library.find(ctypes.byref(entry(16, 0).key))
    library.put(ctypes.byref(entry(16, 2, from_store=True)))
    new = library.find(ctypes.byref(entry(16, 0).key))
    planner.forget()
    assert (old.contents.cpu_plan.tile_n, old.contents.from_store) == (1, 0)
    assert (new.contents.cpu_plan.tile_n, new.contents.from_store) == (2, 1)


def test_a_late_default_does_not_replace_a_stored_plan() -> None:
    """Two threads: one misses and asks the cost model, while the other adopts what was tuned."""
    library = native.library()
    for tile_n, from_store in ((1, False), (2, True), (3, False), (4, True)):
        library.put(ctypes.byref(entry(16, tile_n, from_store)))
        found = library.find(ctypes.byref(entry(16, 0).key)).contents
        assert found.cpu_plan.tile_n == {1: 1, 2: 2, 3: 2, 4: 4}[tile_n]
    planner.forget()
    library.put(ctypes.byref(entry(16, 5)))
    assert library.find(ctypes.byref(entry(16, 0).key)).contents.cpu_plan.tile_n == 5


def test_many_problems() -> None:
    """More than there are chains."""
    for n in range(1, 5000):
        native.library().put(ctypes.byref(entry(n, n)))
    assert len(planner.listing()) == 4999
    for n in range(1, 5000):
        assert native.library().find(ctypes.byref(entry(n, 0).key)).contents.cpu_plan.tile_n == n


# ---- misses


def test_a_miss_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []

    def default_plan(problem: Problem, device: object, num_sms: int, batch_invariant: bool) -> CpuPlan:
        asked.append(problem)
        return CpuPlan(1, 32)

    monkeypatch.setattr(planner, "default_plan", default_plan)
    wanted = planner.make_key(found(native.RAGGED, CPU, 100, 3), 20)
    for _ in range(3):
        assert planner.planned(wanted, None).cpu_plan.tile_n == 32
    assert [tuple(problem) for problem in asked] == [(native.RAGGED, 112, 512, 1024, 3, 32, False)]
    (listed,) = planner.listing()
    assert (fields(listed.key), listed.from_store, listed.calls) == (fields(wanted), False, 3)
    planner.publish(wanted, CpuPlan(1, 64), True)
    assert planner.planned(wanted, None).cpu_plan.tile_n == 64
