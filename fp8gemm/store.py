"""The store: one SQLite file of measured plans. Here it is located, created and read; the tuner writes it.

A row counts if GPU name, SM count, SM limit and the version of the plan space are those of the call, and its plan is
legal; anything else is a miss. Compiler, driver and sources, noted in each row, only say whether the tuner should
measure again. A file that is missing, busy, unreadable or from a newer version gives no plans; a corrupt or foreign one
is moved aside, with one warning. Nothing here raises for the state of the file, and nothing waits for long.

docs/store.md describes the tables.
"""

import contextlib
import fcntl
import json
import os
import time
import typing
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cache, cost
from .backends import CPU_SPACE_VERSION, CpuPlan
from .device import Device
from .errors import StoreError
from .plan import SPACE_VERSION, Plan
from .problem import KINDS, Problem

if TYPE_CHECKING:
    import sqlite3

AnyPlan = Plan | CpuPlan

APPLICATION_ID = 0x66703867  # "fp8g": SQLite's mark of whose file it is
_TASK = """
    kind TEXT NOT NULL,             -- dense, contiguous, ragged or masked
    m INTEGER NOT NULL,             -- rows of A, rounded up to their bucket (masked: of one group)
    n INTEGER NOT NULL,
    k INTEGER NOT NULL,
    groups INTEGER NOT NULL,        -- weights; 1 if dense
    expected_m INTEGER NOT NULL,    -- bucket of a group's rows on average, as the caller guesses; 0: unknown
    row_scales INTEGER NOT NULL,    -- 1: A's scales do not suit bulk copies, as row-major ones
    device TEXT NOT NULL,           -- name of the GPU or CPU
    sms INTEGER NOT NULL,           -- its SMs (a CPU's cores)
    num_sms INTEGER NOT NULL,       -- how many of them the call may use
"""
_TASK_KEY = "kind, m, n, k, groups, expected_m, row_scales, device, sms, num_sms"
# Applied in order, each once; PRAGMA user_version counts them. Never change one that was released: add another.
MIGRATIONS = (
    f"""
CREATE TABLE winners ({_TASK}
    space TEXT NOT NULL,            -- plan space and its version: a plan of another one is not read
    plan TEXT NOT NULL,             -- JSON
    reduction TEXT NOT NULL,        -- plans of one reduction give the same bits
    seconds REAL NOT NULL,
    spread REAL NOT NULL,           -- standard error of `seconds`
    default_plan TEXT NOT NULL,     -- what the cost model picks
    default_seconds REAL,
    frugal_plan TEXT,               -- fewest SMs for at most 1% more time, where that is another plan
    frugal_seconds REAL,
    compiler TEXT NOT NULL,         -- compiler, driver, sources: where they differ from today's, the row is stale
    driver TEXT NOT NULL,
    sources TEXT NOT NULL,
    tuned TEXT NOT NULL,            -- UTC
    PRIMARY KEY ({_TASK_KEY}, space)
) WITHOUT ROWID;
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY,
    sweep TEXT NOT NULL,            -- measurements of one sweep took turns
    {_TASK}
    space TEXT NOT NULL,
    plan TEXT NOT NULL,
    is_default INTEGER NOT NULL,
    predicted REAL,                 -- by the cost model, in units of its own
    seconds REAL,                   -- mean of the middle half; NULL if it was not timed
    spread REAL,
    clock_hz REAL,                  -- of the SMs, after the last round; NULL where nobody tells
    rounds INTEGER NOT NULL,
    error REAL,                     -- ||D - ref|| over the error of rounding ref to bf16: 1 is perfect
    verdict TEXT NOT NULL,          -- right, wrong, or why it was not measured
    date TEXT NOT NULL
);
CREATE INDEX measurements_of_a_problem ON measurements ({_TASK_KEY});
CREATE TABLE misses ({_TASK}
    calls INTEGER NOT NULL,
    last_seen TEXT NOT NULL,
    failure TEXT,                   -- why the tuner could not serve it: it will not try again
    PRIMARY KEY ({_TASK_KEY})
) WITHOUT ROWID;
CREATE TABLE leases ({_TASK}
    holder TEXT NOT NULL,           -- who measures it now
    expires REAL NOT NULL,          -- seconds since 1970; after that anyone may take it
    PRIMARY KEY ({_TASK_KEY})
) WITHOUT ROWID;
""",
)
VERSION = len(MIGRATIONS)

_READ_TIMEOUT = 1.0  # seconds that a reader waits for a writer's commit, of milliseconds
_SETTLED_NS = 100_000_000  # a file changed more recently may change again under the same time stamp
_CORRUPT, _NOT_A_DATABASE, _NO_SUCH_TABLE = 11, 26, 1  # SQLite's result codes


class Task(NamedTuple):
    """What the store is asked for: a problem on a device, with at most `num_sms` of its `sms` SMs."""

    problem: Problem
    device: str
    sms: int
    num_sms: int

    def row(self) -> dict[str, Any]:
        """By column."""
        p = self.problem
        sizes = p._asdict() | {"kind": KINDS[p.kind], "row_scales": int(p.row_scales)}
        return sizes | {"device": self.device, "sms": self.sms, "num_sms": self.num_sms}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Task":
        """Raises ValueError or KeyError if it is none."""
        sizes = {name: row[name] for name in Problem._fields}
        sizes |= {"kind": KINDS.index(row["kind"]), "row_scales": bool(row["row_scales"])}
        return cls(Problem(**sizes), row["device"], row["sms"], row["num_sms"])

    def with_other_scales(self) -> "Task":
        """The same with A's scales in the other layout, whose plan serves where this one has none."""
        return self._replace(problem=self.problem._replace(row_scales=not self.problem.row_scales))

    @property
    def name(self) -> str:
        """For people: the sizes, and what is not as usual."""
        p = self.problem
        parts = [f"{p.m}x{p.n}x{p.k}"]
        if p.kind:
            parts += [KINDS[p.kind], f"{p.groups} groups"] + ([f"of {p.expected_m}"] if p.expected_m else [])
        if p.row_scales:
            parts.append("row-major scales")
        if self.num_sms != self.sms:
            parts.append(f"on {self.num_sms}")
        return " ".join(parts)


TASK_COLUMNS = tuple(_TASK_KEY.split(", "))


_FIELD_TYPES = {family.__name__: typing.get_type_hints(family) for family in (Plan, CpuPlan)}


def space(device: Device) -> str:
    """The plan space of a device and its version."""
    return f"cpu {CPU_SPACE_VERSION}" if device.is_cpu else f"hopper {SPACE_VERSION}"


def plan_json(plan: AnyPlan) -> str:
    return json.dumps(plan._asdict(), separators=(",", ":"))


def parse_plan(text: str, problem: Problem, device: Device, num_sms: int) -> AnyPlan | None:
    """The plan of a row; None unless it is legal for this problem on at most `num_sms` SMs of the device."""
    family: type[AnyPlan] = CpuPlan if device.is_cpu else Plan
    try:
        plan = family(**json.loads(text))
        hints = _FIELD_TYPES[family.__name__]
        if any(type(value) is not hints[name] for name, value in plan._asdict().items()):
            return None
        if plan.num_sms > num_sms or any(plan.violations(problem.kind, device)):
            return None
        if isinstance(plan, Plan) and not cost.suits(problem, plan):
            return None
    except (TypeError, ValueError, ArithmeticError):  # no JSON, unknown fields, nonsense
        return None
    return plan


# ---- the file -------------------------------------------------------------------------------------------------------


def path() -> Path:
    """Where the store is: beside the cubins."""
    return cache.directory() / "plans.db"


def create(connection: "sqlite3.Connection") -> None:
    """Brings the file up to the newest schema; the connection is in autocommit mode."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version >= VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()  # another process may have been faster
        for script in MIGRATIONS[version:]:
            for statement in script.split(";\n"):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {max(version, VERSION)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


class StoreUnusable(StoreError):
    """The file is not one that this version reads; `corrupt`: nor is it anybody's store."""

    def __init__(self, reason: str, corrupt: bool) -> None:
        super().__init__(f"the store of plans cannot be used: {reason}")
        self.corrupt = corrupt


def check(connection: "sqlite3.Connection") -> bool:
    """Whether there is a schema yet. Raises StoreUnusable for a foreign file or one of a newer version."""
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if owner != APPLICATION_ID:
        if owner or version or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise StoreUnusable("it is another program's", corrupt=True)
        return False
    if version > VERSION:
        raise StoreUnusable(f"a newer fp8gemm made it (schema {version}, this one reads {VERSION})", corrupt=False)
    return bool(version == VERSION)


def is_corruption(error: "sqlite3.Error") -> bool:
    """Whether SQLite says that the file is damaged, rather than busy or out of reach."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (_CORRUPT, _NOT_A_DATABASE, _NO_SUCH_TABLE)


def open_reader(file: Path) -> "sqlite3.Connection":
    """A connection that changes nothing, but may complete what a killed writer left half done."""
    import sqlite3

    uri = f"file:{urllib.parse.quote(str(file))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=_READ_TIMEOUT, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    connection.row_factory = sqlite3.Row
    return connection


Signature = tuple[int, int, int, int]
_UNREAD: Signature = (0, 0, 0, 0)  # of no file: differs from every other, and from there being none


def signature(file: Path) -> Signature | None:
    """Changes whenever the file does; None if there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_warned: set[tuple[Path, str]] = set()


def warn(file: Path, reason: str, consequence: str) -> None:
    """Once a process, file and consequence."""
    if (file, consequence) not in _warned:
        _warned.add((file, consequence))
        warnings.warn(f"the store of plans {file} {consequence}: {reason}", RuntimeWarning, stacklevel=2)


def set_aside(file: Path, seen: Signature | None, reason: str) -> None:
    """Renames a corrupt file, if it is still the one that was `seen`, so that a new one can begin."""
    aside = f"{file.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    try:
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if seen is None or signature(file) != seen:
                return  # somebody else has done it, and this is a new file
            with contextlib.suppress(FileNotFoundError):  # its journal would spoil the new one
                os.rename(f"{file}-journal", file.with_name(f"{aside}-journal"))
            os.rename(file, file.with_name(aside))
    except OSError as error:
        warn(file, f"{reason}; nor can it be moved away ({error})", "is not used")
        return
    warn(file, reason, f"was corrupt and is now {aside}; plans come from the cost model until it is tuned again")


# ---- what calls see -------------------------------------------------------------------------------------------------


class Mirror:
    """The winners of one file, in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen: Signature | None = _UNREAD
        self._plans: dict[tuple[Task, str], str] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Reads the file again if it has changed. Whether it did."""
        now = signature(self.file)
        if now == self._seen:
            return False
        self._seen = _UNREAD
        found = None if now is None else self._read(now)
        if found is None and now is not None:
            return False  # busy or out of reach: what was read before serves, and the next refresh tries again
        if now is None or time.time_ns() - now[3] > _SETTLED_NS:
            self._seen = now
        self._plans = found or {}
        return True

    def plan(self, problem: Problem, device: Device, num_sms: int) -> AnyPlan | None:
        """The stored plan of a problem whose sizes are buckets; None if there is no legal one.

        Where only the other layout of A's scales was tuned, that plan serves: it moves most plans' times alike.
        """
        task = Task(problem, device.name, device.sms, num_sms)
        for known in (task, task.with_other_scales()):
            text = self._plans.get((known, space(device)))
            if text and (plan := parse_plan(text, problem, device, num_sms)):
                return plan
        return None

    def __len__(self) -> int:
        return len(self._plans)

    def _read(self, seen: Signature) -> dict[tuple[Task, str], str] | None:
        import sqlite3

        try:
            with contextlib.closing(open_reader(self.file)) as connection:
                connection.execute("BEGIN")
                rows = connection.execute("SELECT * FROM winners") if check(connection) else []
                return dict(_winners(rows))
        except StoreUnusable as error:
            if error.corrupt:
                set_aside(self.file, seen, str(error))
            else:
                warn(self.file, str(error), "is not read")
            return {}
        except sqlite3.Error as error:
            if is_corruption(error):
                set_aside(self.file, seen, str(error))
                return {}
            return None


def _winners(rows: Any) -> Iterator[tuple[tuple[Task, str], str]]:
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, IndexError):  # kinds to come
            yield (Task.from_row(row), row["space"]), row["plan"]


_mirrors: dict[Path, Mirror] = {}


def mirror() -> Mirror:
    """The mirror of this process's store, read when first asked for."""
    file = path()
    if file not in _mirrors:
        _mirrors[file] = Mirror(file)
    return _mirrors[file]


def plan(problem: Problem, device: Device, num_sms: int) -> AnyPlan | None:
    """The stored plan of a problem whose sizes are buckets; None if there is no legal one."""
    return mirror().plan(problem, device, num_sms)


def rows(table: str, where: str = "", values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows of a table, for people; none without a store. Raises StoreError if there is one that cannot be read."""
    import sqlite3

    if signature(path()) is None:
        return []
    try:
        with contextlib.closing(open_reader(path())) as connection:
            found = connection.execute(f"SELECT * FROM {table} {where}", values or {}) if check(connection) else []
            return [dict(row) for row in found]
    except sqlite3.Error as error:
        raise StoreError(f"{path()}: {error}") from error


def add_misses(file: Path, calls: Mapping[Task, int]) -> bool:
    """Adds to the calls of problems that had no stored plan. False, at once, if the file cannot be written now."""
    import sqlite3

    columns = ", ".join(f":{name}" for name in TASK_COLUMNS)
    upsert = (
        f"INSERT INTO misses ({_TASK_KEY}, calls, last_seen) VALUES ({columns}, :calls, datetime('now')) "
        f"ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, last_seen = excluded.last_seen"
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
            check(connection)
            create(connection)
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(upsert, [task.row() | {"calls": count} for task, count in calls.items()])
            connection.execute("COMMIT")
    except (OSError, sqlite3.Error, StoreUnusable):
        return False
    return True
