"""Writes the store: measurements, winners, leases. Every method is one transaction; a killed one leaves nothing."""

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlite_utils import Database

from fp8gemm import store
from fp8gemm.device import Device
from fp8gemm.errors import StoreError
from fp8gemm.store import AnyPlan, Task

LEASE_SECONDS = 120.0
EXPORT_VERSION = 1
_TIMEOUT = 30.0  # seconds that a transaction waits for others
_WHERE_TASK = " AND ".join(f"{name} = :{name}" for name in store.TASK_COLUMNS)


class Stamp(NamedTuple):
    """What a measurement depends on besides problem and plan: where it differs from today's, a row is stale."""

    compiler: str
    driver: str
    sources: str


class Measurement(NamedTuple):
    """What was found out about one plan in one sweep."""

    plan: AnyPlan
    is_default: bool
    predicted: float | None  # by the cost model, in units of its own
    seconds: float | None  # mean of the middle half; None: not timed
    spread: float | None  # its standard error
    clock_hz: float | None
    rounds: int
    error: float | None  # over that of rounding to bf16 alone
    verdict: str  # "right", "wrong", or why it was not measured


class Winner(NamedTuple):
    """The outcome of a sweep. `frugal`: with the fewest SMs among those that cost under 1%, if that is another plan."""

    plan: AnyPlan
    seconds: float
    spread: float
    default_plan: AnyPlan
    default_seconds: float | None
    frugal_plan: AnyPlan | None = None
    frugal_seconds: float | None = None


def now() -> str:
    """UTC, to the second, as SQLite writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def holder() -> str:
    """This process, for leases and locks."""
    return f"{socket.gethostname()}:{os.getpid()}"


def exported() -> dict[str, Any]:
    """Every winner of the store, as one JSON object that `Writer.load` takes elsewhere."""
    rows = store.rows("winners", "ORDER BY device, num_sms, kind, n, k, groups, m")
    return {"fp8gemm plans": EXPORT_VERSION, "exported": now(), "winners": rows}


class Writer:
    """The store, open for writing; made if it is missing, begun anew if it is corrupt.

    Raises StoreError if it cannot be written or is of a newer version.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or store.path()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connect()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.file} cannot be written: {error}") from error

    def _connect(self) -> None:
        seen = store.signature(self.file)
        try:
            self.connection = self._open()
        except (store.StoreUnusable, sqlite3.DatabaseError) as error:
            corrupt = error.corrupt if isinstance(error, store.StoreUnusable) else store.is_corruption(error)
            if not corrupt:
                raise
            store.set_aside(self.file, seen, str(error))
            self.connection = self._open()
        self.database = Database(self.connection, execute_plugins=False, strict=True)

    def _open(self) -> sqlite3.Connection:
        """In autocommit mode: transactions are ours to begin. One thread at a time may use it."""
        connection = sqlite3.connect(self.file, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        try:
            store.check(connection)
            store.create(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """IMMEDIATE: what is read inside is still true when it is written."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.file} cannot be written: {error}") from error

    # ---- what a sweep found

    def measured(self, task: Task, space: str, sweep: str, found: Iterable[Measurement]) -> None:
        """Keeps measurements."""
        rows = [
            task.row()
            | m._asdict()
            | {"sweep": sweep, "space": space, "plan": store.plan_json(m.plan), "is_default": int(m.is_default)}
            | {"date": now()}
            for m in found
        ]
        with self._transaction():
            self.database.table("measurements").insert_all(rows)

    def publish(self, task: Task, space: str, winner: Winner, stamp: Stamp) -> None:
        """Makes a plan the winner of its problem, which is then no miss any more. Its cubin must be in the cache."""
        plans = {
            f"{name}plan": store.plan_json(plan) if plan else None
            for name, plan in (
                ("", winner.plan),
                ("default_", winner.default_plan),
                ("frugal_", winner.frugal_plan),
            )
        }
        row = task.row() | winner._asdict() | plans | stamp._asdict()
        row |= {"space": space, "reduction": winner.plan.reduction, "tuned": now()}
        with self._transaction():
            self.database.table("winners").upsert(row, pk=(*store.TASK_COLUMNS, "space"))
            self._delete("misses", task)
            self._delete("leases", task)

    def _delete(self, table: str, task: Task) -> None:
        self.connection.execute(f"DELETE FROM {table} WHERE {_WHERE_TASK}", task.row())

    # ---- who does what

    def claim(self, device: Device, stale: Stamp | None = None, seconds: float = LEASE_SECONDS) -> Task | None:
        """Leases the most-called miss of this device that nobody holds; without one, a winner of another stamp."""
        mine = {"device": device.name, "sms": device.sms, "space": store.space(device), "now": time.time()}
        free = (
            "device = :device AND sms = :sms AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.expires > :now AND "
            + " AND ".join(f"l.{name} = t.{name}" for name in store.TASK_COLUMNS)
            + ")"
        )
        misses = f"SELECT * FROM misses t WHERE {free} AND failure IS NULL ORDER BY calls DESC, last_seen DESC LIMIT 1"
        stales = (
            f"SELECT * FROM winners t WHERE {free} AND space = :space AND "
            "(compiler, driver, sources) <> (:compiler, :driver, :sources) ORDER BY tuned LIMIT 1"
        )
        with self._transaction():
            row = self.connection.execute(misses, mine).fetchone()
            if row is None and stale is not None:
                row = self.connection.execute(stales, mine | stale._asdict()).fetchone()
            if row is None:
                return None
            task = Task.from_row(row)
            self._lease(task, seconds)
            return task

    def renew(self, task: Task, seconds: float = LEASE_SECONDS) -> None:
        """Holds a lease for longer, or takes it whoever has it: as when a person asks for this problem."""
        with self._transaction():
            self._lease(task, seconds)

    def _lease(self, task: Task, seconds: float) -> None:
        row = task.row() | {"holder": holder(), "expires": time.time() + seconds}
        self.database.table("leases").upsert(row, pk=store.TASK_COLUMNS)

    def release(self, task: Task, failure: str | None = None) -> None:
        """Gives a lease back; with `failure`, the daemon will not try this miss again."""
        with self._transaction():
            self.connection.execute(
                f"DELETE FROM leases WHERE holder = :holder AND {_WHERE_TASK}", task.row() | {"holder": holder()}
            )
            if failure is not None:
                self.connection.execute(
                    f"UPDATE misses SET failure = :failure WHERE {_WHERE_TASK}", task.row() | {"failure": failure}
                )

    def misses(self, device: Device) -> list[Task]:
        """What waits to be tuned on this device, most-called first."""
        where = "WHERE device = :device AND sms = :sms ORDER BY calls DESC, last_seen DESC"
        return [Task.from_row(row) for row in self.rows("misses", where, {"device": device.name, "sms": device.sms})]

    # ---- for people

    def rows(self, table: str, where: str = "", values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of a table, by column."""
        query = f"SELECT * FROM {table} {where}"
        return [dict(row) for row in self.connection.execute(query, values or {})]

    def incumbent(self, task: Task, device: Device) -> AnyPlan | None:
        """The stored winner, if its plan is legal."""
        where = f"WHERE {_WHERE_TASK} AND space = :space"
        for row in self.rows("winners", where, task.row() | {"space": store.space(device)}):
            return store.parse_plan(row["plan"], task.problem, device, task.num_sms)
        return None

    def clear(self, winners: bool = True, misses: bool = True) -> dict[str, int]:
        """Deletes rows; how many of each table."""
        tables = (["winners", "measurements"] if winners else []) + (["misses", "leases"] if misses else [])
        with self._transaction():
            return {table: self.connection.execute(f"DELETE FROM {table}").rowcount for table in tables}

    def load(self, exported: Any) -> tuple[int, int]:
        """Takes over exported winners, in place of those that are here: (taken, passed over because they are odd).

        Raises ValueError if it is no export.
        """
        version = exported.get("fp8gemm plans") if isinstance(exported, dict) else None
        if version != EXPORT_VERSION or not isinstance(exported.get("winners"), list):
            raise ValueError(f"no export of plans of version {EXPORT_VERSION}")
        columns = {row["name"] for row in self.connection.execute("PRAGMA table_info(winners)")}
        rows = [row for row in exported["winners"] if isinstance(row, dict) and _sound(row, columns)]
        with self._transaction():
            self.database.table("winners").upsert_all(rows, pk=(*store.TASK_COLUMNS, "space"))
            for row in rows:
                self._delete("misses", Task.from_row(row))
        return len(rows), len(exported["winners"]) - len(rows)


def _sound(row: dict[str, Any], columns: set[str]) -> bool:
    """Whether a row has every column, plain values and a readable plan; if it is legal, each call asks again."""
    try:
        Task.from_row(row)
        plain = all(isinstance(value, (str, int, float, type(None))) for value in row.values())
        return row.keys() == columns and plain and isinstance(json.loads(row["plan"]), dict)
    except (KeyError, ValueError, TypeError):
        return False
