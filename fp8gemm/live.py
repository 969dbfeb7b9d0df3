"""Follows the store while the process runs, in one background thread that the first plan in the table starts.

Every 0.4 s it looks whether the file has changed. A new plan that gives the same bits as the one in use (the same
reduction) takes its place at once: kernel loaded first, then the table's entry swapped. Another reduction waits for
`refresh()` or the next start, so that no result changes between two calls. And it counts: calls of problems that no
stored plan serves are misses, which the tuner takes from the store. Where that cannot be written now, the counts wait.

Kernels are loaded so that captures which are open elsewhere go on. A forked child has no such thread.
"""

import atexit
import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator

from . import native, planner, store
from .errors import Fp8GemmError
from .store import Task

INTERVAL = 0.4  # seconds between two looks at the file: new plans are in use within a second
FLUSH_INTERVAL = 10.0  # seconds between two writes of counts alone; a problem not seen before is written at once
RETRY_INTERVAL = 30.0  # seconds until a plan that could not be built or loaded is tried again
_PATIENCE = 1.0  # seconds that the end of the process waits for a plan that is just being loaded


class _Follower:
    """What the thread does, one turn at a time."""

    counts = True  # calls that the store lacks a plan for

    def __init__(self) -> None:
        self._lock = threading.Lock()  # turns are taken by the thread and by refresh()
        self._misses: dict[Task, int] = {}
        self._known: set[bytes] = set()
        self._flushed = 0.0
        self._retry = math.inf  # when to try again what could not be loaded

    def turn(self, every_reduction: bool = False, flush: bool = False) -> int:
        """Counts misses, adopts plans. The number of problems whose plan is another one now."""
        with self._lock:
            look = store.mirror().refresh() or every_reduction or time.monotonic() > self._retry
            if look:
                self._retry = math.inf
            listed = planner.listing()
            adopted = sum(self._adopt(entry.key, every_reduction) for entry in listed) if look else 0
            news = sum(self._count(entry) for entry in listed)  # all of them, not just the first
            if self._misses and (news or flush or time.monotonic() - self._flushed > FLUSH_INTERVAL):
                if store.add_misses(store.path(), self._misses):
                    self._misses.clear()
                self._flushed = time.monotonic()
            return adopted

    def _count(self, entry: planner.Listed) -> bool:
        """Whether it is a miss that was not known before."""
        key, device = bytes(entry.key), planner.device_of(entry.key)
        if not self.counts or entry.from_store or entry.key.reference or not entry.calls:
            return False
        limit = entry.key.num_sms or device.sms
        problem = planner.problem_of(entry.key)
        if store.plan(problem, device, limit):
            return False  # which this process may not take, for its reduction: measuring again would not help
        new = key not in self._known
        self._known.add(key)
        task = Task(problem, device.name, device.sms, limit)
        self._misses[task] = self._misses.get(task, 0) + entry.calls
        return new

    def _adopt(self, key: native.Key, every_reduction: bool) -> bool:
        """Whether the key's plan was replaced."""
        old, new = planner.current(key), planner.stored(key, planner.device_of(key))
        if old is None or new is None:
            return False
        if not every_reduction and new.reduction != old.reduction:
            return False
        try:
            planner.publish(key, new, True, may_build=True)
        except Fp8GemmError:  # it cannot be built or loaded now: the old one serves
            self._retry = time.monotonic() + RETRY_INTERVAL
            return False
        return new != old


_follower = _Follower()
_stop = threading.Event()
_thread: threading.Thread | None = None
_start = threading.Lock()


def refresh() -> int:
    """Reads the store again and takes every plan that is in it, also where results may change in their last bits.

    Returns the number of problems of this process whose plan is another one now.
    """
    return _follower.turn(every_reduction=True)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Calls meanwhile are no misses: they measure something, and nobody waits for them to become faster."""
    _Follower.counts = False
    try:
        yield
    finally:
        with contextlib.suppress(ImportError):  # without the library nothing was called
            planner.listing()  # forgets them
        _Follower.counts = True


def watch() -> None:
    """Starts the thread, if it does not run and this process may have it."""
    global _thread
    if _thread is None:
        with _start:
            if _thread is None:
                os.register_at_fork(after_in_child=_forked)
                atexit.register(_finish, os.getpid())
                _thread = threading.Thread(target=_run, name="fp8gemm store", daemon=True)
                _thread.start()


def _run() -> None:
    while not _stop.wait(INTERVAL):
        with contextlib.suppress(Fp8GemmError, OSError):  # a GPU or a disk that is gone: calls will say so
            _follower.turn()


def _forked() -> None:
    """In a child: no thread, and a lock that nobody holds."""
    global _follower
    _stop.set()
    _follower = _Follower()


def _finish(process: int) -> None:
    """At exit: the thread ends, and what it counted is written."""
    if os.getpid() != process or _stop.is_set():
        return
    _stop.set()
    if _thread is not None:
        _thread.join(_PATIENCE)
        if not _thread.is_alive():
            with contextlib.suppress(Fp8GemmError, OSError):
                _follower.turn(flush=True)


planner.follow = watch
