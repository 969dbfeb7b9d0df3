"""The store: matching, legality, files in every state, many processes that are killed at random."""

import json
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import H100, H800

from fp8gemm import StoreError, backends, native, store
from fp8gemm.backends import CpuPlan
from fp8gemm.device import Device
from fp8gemm.plan import SPACE_VERSION, Plan
from fp8gemm.problem import KINDS, Problem
from fp8gemm.store import Task
from fp8gemm.tuner.writer import Measurement, Stamp, Winner, Writer, exported

ROOT = Path(__file__).parent.parent
CPU = Device("a CPU", (0, 0), 8, 0, 0, 0.0, 0.0)
PROBLEM = Problem(native.DENSE, 64, 2112, 7168)
GOOD = Plan(128, 128, 5, 1, 2, num_sms=132, raster=4)
STAMP = Stamp("nvrtc 13.0", "13000", "abc")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "_warned", set())
    return tmp_path


def task_of(problem: Problem = PROBLEM, device: Device = H100, num_sms: int | None = None) -> Task:
    return Task(problem, device.name, device.sms, num_sms or device.sms)


def publish(plan: store.AnyPlan = GOOD, task: Task | None = None, device: Device = H100) -> None:
    with Writer() as writer:
        winner = Winner(plan, 1e-5, 1e-8, plan, 2e-5)
        writer.publish(task or task_of(device=device), store.space(device), winner, STAMP)


def looked_up(problem: Problem = PROBLEM, device: Device = H100, num_sms: int | None = None) -> Any:
    return store.Mirror(store.path()).plan(problem, device, num_sms or device.sms)


def alter(statement: str, *values: object) -> None:
    with sqlite3.connect(store.path()) as connection:
        connection.execute(statement, values)
    connection.close()


# ---- what is found --------------------------------------------------------------------------------------------------


def test_a_published_plan_is_found() -> None:
    assert looked_up() is None
    publish()
    assert looked_up() == GOOD
    publish(CpuPlan(3, 48), device=CPU)
    assert looked_up(device=CPU) == CpuPlan(3, 48)
    assert looked_up() == GOOD


@pytest.mark.parametrize(
    "other",
    [
        {"problem": PROBLEM._replace(**{name: getattr(PROBLEM, name) + step})}
        for name, step in (("kind", 2), ("m", 16), ("n", 8), ("k", 16), ("groups", 1), ("expected_m", 16))
    ]
    + [{"device": H800}, {"device": H100._replace(sms=114), "num_sms": 132}, {"num_sms": 131}],
    ids=repr,
)
def test_only_the_same_problem_on_the_same_device_matches(other: dict[str, Any]) -> None:
    publish()
    assert looked_up(**other) is None


def test_the_other_layout_of_scales_serves_where_its_own_is_not_tuned() -> None:
    rows = PROBLEM._replace(row_scales=True)
    publish()
    assert looked_up(rows) == GOOD
    publish(GOOD._replace(raster=7), task_of(rows))
    assert (looked_up(rows), looked_up()) == (GOOD._replace(raster=7), GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "1",
        json.dumps(GOOD._asdict() | {"tile_m": 96}),
        json.dumps(GOOD._asdict() | {"stages": 11}),
        json.dumps(GOOD._asdict() | {"tile_m": 128.0}),
        json.dumps(GOOD._asdict() | {"tile_m": True}),
        json.dumps(GOOD._asdict() | {"num_sms": "132"}),
        json.dumps(
            GOOD._asdict() | {"tile_m": 32, "tile_n": 16, "cluster_n": 1, "split": 2}
        ),  # too many tiles for that
        json.dumps(GOOD._asdict() | {"num_sms": 133}),
        json.dumps(GOOD._asdict() | {"b_policy": ["evict_first"]}),
        json.dumps(GOOD._asdict() | {"a_field_to_come": 1}),
        json.dumps({"tile_m": 128}),
    ],
)
def test_an_illegal_or_unknown_plan_is_a_miss(text: str) -> None:
    publish()
    alter("UPDATE winners SET plan = ?", text)
    assert looked_up() is None


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4), st.data()
)
def test_no_plan_text_breaks_a_call(value: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([*Plan._fields, "other"]))
    text = json.dumps(GOOD._asdict() | {field: value})
    plan = store.parse_plan(text, PROBLEM, H100, 132)
    assert plan is None or not list(plan.violations(native.DENSE, H100))
    plan = store.parse_plan(data.draw(st.text()), PROBLEM, H100, 132)
    assert plan is None


def test_a_plan_may_not_use_more_sms_than_the_call() -> None:
    publish(GOOD, task_of(num_sms=100))
    assert looked_up(num_sms=100) is None
    publish(GOOD._replace(num_sms=96), task_of(num_sms=100))
    assert looked_up(num_sms=100) == GOOD._replace(num_sms=96)


def test_another_version_of_the_plan_space_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    monkeypatch.setattr("fp8gemm.store.SPACE_VERSION", SPACE_VERSION + 1)
    assert looked_up() is None
    publish()
    assert looked_up() == GOOD
    monkeypatch.undo()


def test_batch_invariant_calls_take_no_other_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8gemm import planner

    cpu = backends.cpu_device()
    found = native.Problem(native.DENSE, native.CPU, 0, 64, 256, 512, 1, 1, 1, 1)
    publish(CpuPlan(1, 48), task_of(Problem(native.DENSE, 64, 256, 512), cpu), cpu)
    plain, invariant = (planner.make_key(found, 0, flag) for flag in (False, True))
    assert planner.choose(plain) == planner.choose(invariant) == (CpuPlan(1, 48), True)
    monkeypatch.setattr(CpuPlan, "reduction", "two halves")
    assert planner.choose(plain) == (CpuPlan(1, 48), True)
    assert planner.choose(invariant)[1] is False


def test_tasks_and_rows() -> None:
    for kind in range(len(KINDS)):
        task = task_of(Problem(kind, 16, 24, 32, 4, 16, kind % 2 == 0), num_sms=7)
        assert Task.from_row(task.row()) == task
        assert set(task.row()) == set(store.TASK_COLUMNS)
    assert task_of().name == "64x2112x7168"
    assert task_of(Problem(3, 64, 256, 512, 4, 16), num_sms=100).name == "64x256x512 masked 4 groups of 16 on 100"


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_mirror_sees_what_changes() -> None:
    mirror = store.Mirror(store.path())
    assert not mirror.refresh()
    publish()
    assert mirror.refresh()
    assert mirror.plan(PROBLEM, H100, 132) == GOOD
    before = store.path().stat()
    publish(GOOD._replace(raster=9))
    os.utime(store.path(), ns=(before.st_atime_ns, before.st_mtime_ns))  # within one tick of the file system's clock
    assert store.path().stat().st_size == before.st_size
    assert mirror.refresh()
    assert mirror.plan(PROBLEM, H100, 132) == GOOD._replace(raster=9)
    store.path().unlink()
    assert mirror.refresh()
    assert mirror.plan(PROBLEM, H100, 132) is None


def test_an_unchanged_file_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    os.utime(store.path(), ns=(0, 10**18))
    mirror = store.Mirror(store.path())
    monkeypatch.setattr(store, "open_reader", lambda _: pytest.fail("read again"))
    assert not mirror.refresh()
    assert mirror.plan(PROBLEM, H100, 132) == GOOD


def test_the_schema_says_whose_it_is() -> None:
    publish()
    connection = sqlite3.connect(store.path())
    assert connection.execute("PRAGMA application_id").fetchone() == (store.APPLICATION_ID,)
    assert connection.execute("PRAGMA user_version").fetchone() == (store.VERSION,)
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"winners", "measurements", "misses", "leases"}
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # WAL does not work on network drives
    connection.close()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:70])


def garble(file: Path) -> None:
    file.write_bytes(secrets.token_bytes(30_000))


def garble_pages(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + secrets.token_bytes(len(whole) - 4096))


def replace_by_another_programs(file: Path) -> None:
    file.unlink()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE cookies (name)")
    connection.commit()
    connection.close()


def drop_a_table(file: Path) -> None:
    alter("DROP TABLE winners")


CORRUPTIONS = [truncate, shorten, garble, garble_pages, replace_by_another_programs, drop_a_table]
each_corruption = pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)


@each_corruption
def test_a_corrupt_file_is_set_aside_with_one_warning(corrupt: Callable[[Path], None], cache_dir: Path) -> None:
    publish()
    corrupt(store.path())
    spoilt = store.path().read_bytes()
    with pytest.warns(RuntimeWarning, match=r"corrupt.*cost model") as caught:
        found = [looked_up() for _ in range(2)]
    assert (found, len(caught)) == ([None, None], 1)
    (aside,) = cache_dir.glob("plans.db.corrupt-*")
    assert aside.read_bytes() == spoilt
    publish()
    assert looked_up() == GOOD


@each_corruption
def test_the_tuner_begins_anew_after_a_corrupt_file(corrupt: Callable[[Path], None]) -> None:
    publish()
    corrupt(store.path())
    if corrupt in (drop_a_table, garble_pages, truncate):  # found on reading only
        with pytest.warns(RuntimeWarning, match="corrupt"):
            looked_up()
        publish()
    else:
        with pytest.warns(RuntimeWarning, match="corrupt"):
            publish()
    assert looked_up() == GOOD


def test_a_good_file_in_the_place_of_a_corrupt_one_stays() -> None:
    publish()
    seen = store.signature(store.path())
    publish(GOOD._replace(raster=9))
    os.utime(store.path(), ns=(0, 10**18))
    store.set_aside(store.path(), seen, "somebody saw it corrupt, and somebody else has replaced it")
    assert looked_up() == GOOD._replace(raster=9)


def test_a_corrupt_files_journal_goes_with_it(cache_dir: Path) -> None:
    publish()
    garble(store.path())
    (cache_dir / "plans.db-journal").write_bytes(b"of the corrupt file")
    with pytest.warns(RuntimeWarning, match="corrupt"):
        store.set_aside(store.path(), store.signature(store.path()), "it is garbled")
    assert not (cache_dir / "plans.db-journal").exists()
    assert len(list(cache_dir.glob("*.corrupt-*-journal"))) == 1


def test_a_newer_store_is_left_alone() -> None:
    publish()
    alter(f"PRAGMA user_version = {store.VERSION + 1}")
    before = store.path().read_bytes()
    with pytest.warns(RuntimeWarning, match="newer fp8gemm"):
        assert looked_up() is None
    with pytest.raises(StoreError, match="newer fp8gemm"):
        Writer()
    assert not store.add_misses(store.path(), {task_of(): 1})
    assert store.path().read_bytes() == before


def test_an_empty_file_is_an_empty_store() -> None:
    store.path().write_bytes(b"")
    assert looked_up() is None
    publish()
    assert looked_up() == GOOD


def test_a_directory_or_an_unreadable_path_gives_no_plans(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path().mkdir()
    assert looked_up() is None
    assert not store.add_misses(store.path(), {task_of(): 1})
    with pytest.raises(StoreError, match="cannot be written"):
        Writer()
    (cache_dir / "file").write_text("")
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(cache_dir / "file" / "x"))
    assert looked_up() is None
    assert not store.add_misses(store.path(), {task_of(): 1})
    with pytest.raises(StoreError, match="cannot be written"):
        Writer()


def test_a_read_only_store_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a user who may write neither it nor its directory: root may, so this becomes another one."""
    cache_dir = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(cache_dir))
    publish()
    code = f"""
import os, ctypes, sqlite3
from fp8gemm import store
from fp8gemm.device import Device
from fp8gemm.problem import Problem
from fp8gemm.store import Task
if os.getuid() == 0: os.setuid(65534)
gpu = Device({H100.name!r}, (9, 0), 132, 0, 232448, 0.0, 0.0)
problem = Problem(0, 64, 2112, 7168)
print(store.plan(problem, gpu, 132))
print(store.add_misses(store.path(), {{Task(problem, gpu.name, 132, 132): 1}}))
"""
    store.path().chmod(0o444)
    cache_dir.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    cache_dir.chmod(0o755)
    shutil.rmtree(cache_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(GOOD), "False"]


def test_a_writer_keeps_misses_out_but_not_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller waits for a lock to count a miss; a reader reads beside an open transaction."""
    publish()
    writer = sqlite3.connect(store.path(), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM winners")
    timeouts: list[Any] = []
    connect = sqlite3.connect

    def note(*arguments: Any, **options: Any) -> sqlite3.Connection:
        timeouts.append(options["timeout"])
        found: sqlite3.Connection = connect(*arguments, **options)
        return found

    monkeypatch.setattr(sqlite3, "connect", note)
    assert not store.add_misses(store.path(), {task_of(): 1})
    assert timeouts == [0]
    assert looked_up() == GOOD
    writer.execute("ROLLBACK")
    writer.close()
    assert store.add_misses(store.path(), {task_of(): 1})


# ---- misses, leases, exports ----------------------------------------------------------------------------------------


def test_misses_make_the_store_and_add_up() -> None:
    assert store.add_misses(store.path(), {task_of(): 3})
    assert store.add_misses(store.path(), {task_of(): 4, task_of(num_sms=64): 1})
    assert [(row["num_sms"], row["calls"]) for row in store.rows("misses", "ORDER BY calls")] == [(64, 1), (132, 7)]
    publish()
    assert [row["num_sms"] for row in store.rows("misses")] == [64]


def test_the_most_called_miss_is_claimed_first_and_once() -> None:
    often, seldom = task_of(), task_of(num_sms=64)
    store.add_misses(store.path(), {seldom: 1, often: 9, task_of(device=H800): 100})
    with Writer() as first, Writer() as second:
        assert first.claim(H100) == often
        assert second.claim(H100) == seldom
        assert first.claim(H100) is None
        second.release(seldom)
        assert first.claim(H100) == seldom
        first.release(seldom, failure="it spills")
        assert first.claim(H100) is None
        assert store.rows("misses", "WHERE failure = 'it spills'")[0]["num_sms"] == 64


def test_an_expired_lease_is_taken_over() -> None:
    store.add_misses(store.path(), {task_of(): 1})
    with Writer() as dead, Writer() as living:
        assert dead.claim(H100, seconds=-1) == task_of()
        assert living.claim(H100) == task_of()
        assert dead.claim(H100) is None


def test_stale_winners_are_queued_after_misses() -> None:
    publish()
    with Writer() as writer:
        assert writer.claim(H100, STAMP) is None
        renewed = STAMP._replace(driver="13010")
        store.add_misses(store.path(), {task_of(num_sms=64): 1})
        assert writer.claim(H100, renewed) == task_of(num_sms=64)
        assert writer.claim(H100, renewed) == task_of()
        assert writer.claim(H100, renewed) is None
    assert looked_up() == GOOD  # stale, but used


def test_every_measurement_is_kept() -> None:
    with Writer() as writer:
        for sweep in ("a", "b"):
            found = [
                Measurement(GOOD, True, 123.0, 1e-5, 1e-8, 1.9e9, 30, 1.0, "right"),
                Measurement(GOOD._replace(raster=2), False, None, None, None, None, 0, None, "wrong"),
            ]
            writer.measured(task_of(), store.space(H100), sweep, found)
    rows = store.rows("measurements", "ORDER BY id")
    assert [(r["sweep"], r["verdict"], r["seconds"]) for r in rows] == [
        (sweep, verdict, seconds) for sweep in "ab" for verdict, seconds in (("right", 1e-5), ("wrong", None))
    ]
    assert json.loads(rows[0]["plan"]) == GOOD._asdict()


def test_an_export_is_portable(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    publish(CpuPlan(3, 48), device=CPU)
    whole = json.loads(json.dumps(exported()))
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(cache_dir / "elsewhere"))
    assert looked_up() is None
    with Writer() as writer:
        assert writer.load(whole) == (2, 0)
        assert (looked_up(), looked_up(device=CPU)) == (GOOD, CpuPlan(3, 48))
        spoilt: tuple[Any, ...] = whole["winners"][0] | {"kind": "sparse"}, whole["winners"][0] | {"plan": "?"}, {}, 3
        assert writer.load(whole | {"winners": [*spoilt, whole["winners"][1]]}) == (1, 4)
        nonsense: Any
        for nonsense in ({}, [], None, {"fp8gemm plans": 0, "winners": []}):
            with pytest.raises(ValueError, match="no export"):
                writer.load(nonsense)


# ---- many processes -------------------------------------------------------------------------------------------------


def test_nothing_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    """16 readers, 4 writers, one killed at random 100 times."""
    seed = secrets.randbits(32)
    script = ROOT / "tests" / "stress_store.py"
    command = [sys.executable, str(script), str(tmp_path), "100", str(seed)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == [], seed
    assert report["lost"] == [], seed
    assert (report["integrity"], report["set_aside"], report["winners"]) == ("ok", [], 8)
    assert report["written"] >= 40


def test_the_documented_schema_is_the_schema() -> None:
    text = (ROOT / "docs" / "store.md").read_text()
    publish()
    connection = sqlite3.connect(store.path())
    for table in ("winners", "measurements", "misses", "leases"):
        section = text.partition(f"## `{table}`")[2].partition("\n## ")[0]
        described = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
        columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        assert described == columns - set(store.TASK_COLUMNS), table
    connection.close()


def test_a_library_process_needs_no_sqlite_without_a_store() -> None:
    code = "import sys; from fp8gemm import store; store.mirror(); print('sqlite3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_warning_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publish()
        looked_up()
