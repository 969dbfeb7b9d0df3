"""The daemon: tunes what calls missed, most-called first, one process a device.

By default it works while the device is idle. Beside a serving process (`share`) it takes little memory, measures in
bursts of milliseconds with long rests, and rounds that the others disturbed do not count.

The work is done on a thread, so that SIGTERM is heard in whatever it is: what was measured by then is in the store.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fp8gemm import cache, store
from fp8gemm.errors import Fp8GemmError
from fp8gemm.store import Task

from .sweep import Sweep
from .target import Target, open_target
from .writer import Writer, holder

LOOK = 1.0  # seconds between two looks for misses
RENEW = 30.0  # seconds between two renewals of the lease at hand
GRACE = 1.5  # seconds that work gets to end after SIGTERM
BACK_OFF = 4.0  # rests are so much longer after a burst that was disturbed
HELD = 4  # exit code: another daemon has this device


class Share(NamedTuple):
    """How a daemon works beside a serving process: the most GPU memory, the share of the time that it measures."""

    memory_bytes: int | None
    duty: float


class Ended(NamedTuple):
    """How a daemon came to its end."""

    exit_code: int
    tuned: int
    failed: int
    reason: str


def run(where: str | None, share: Share | None = None, once: bool = False) -> Ended:
    """Works until SIGTERM or SIGINT, or with `once` until nothing is left. Logs to stderr; tells systemd.

    Raises BackendUnavailable for a device that cannot serve, StoreError for a store that cannot be written.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    work = _Work(where, share, once, stop)
    thread = threading.Thread(target=work.run, name="tuning", daemon=True)
    thread.start()
    while thread.is_alive() and not stop.wait(0.1):
        work.renew()
    notify("STOPPING=1")
    thread.join(GRACE)
    if thread.is_alive():  # in a driver call or a product that will not be interrupted; nothing finished is lost
        log("ended in the midst of a problem, whose finished measurements are kept")
        sys.stderr.flush()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(0)
    if work.error is not None:
        raise work.error
    return work.ended


class _Work:
    """What the thread does."""

    def __init__(self, where: str | None, share: Share | None, once: bool, stop: threading.Event) -> None:
        self.where, self.share, self.once, self.stop = where, share, once, stop
        self.error: BaseException | None = None
        self.ended = Ended(0, 0, 0, "asked to")
        self._tuned = self._failed = 0
        self._task: Task | None = None
        self._renewed = 0.0

    def run(self) -> None:
        try:
            with contextlib.closing(
                open_target(self.where, self.share is not None, self.share and self.share.memory_bytes)
            ) as target:
                self._hold(target)
        except BaseException as error:  # the main thread raises it again
            self.error = error

    def _hold(self, target: Target) -> None:
        with locked(target.lock_name) as other:
            if other:
                reason = f"{target.name} is held by {other['holder']} since {other['since']}"
                self.ended = Ended(HELD, 0, 0, reason)
                log(reason)
                return
            reason = self._serve(target)
            self.ended = Ended(0, self._tuned, self._failed, reason)

    def _serve(self, target: Target) -> str:
        with Writer() as writer:
            how = "sharing it" if self.share else "while it is idle"
            log(f"tuning {target.name} ({target.device.name}) {how}, into {writer.file}")
            notify("READY=1")
            while not self.stop.is_set():
                if not (self.share or target.is_idle()):
                    self._say(target, "waiting until the device is idle")
                    self.stop.wait(LOOK)
                elif task := writer.claim(target.device, target.stamp):
                    self._tune(target, writer, task)
                elif self.once:
                    return "nothing left to tune"
                else:
                    self._say(target, "looking for misses")
                    self.stop.wait(LOOK)
        return "asked to"

    def _tune(self, target: Target, writer: Writer, task: Task) -> None:
        self._task, self._renewed = task, time.monotonic()
        self._say(target, f"tuning {task.name}")
        log(f"tuning {task.name}")
        rest = self._rest if self.share else None
        outcome = Sweep(target, writer, task, self.stop.is_set, lambda _: None, rest=rest).run()
        self._task = None
        if outcome.winner:
            self._tuned += 1
            winner = outcome.winner
            beside = f", default {1e6 * winner.default_seconds:.1f}" if winner.default_seconds else ""
            log(f"{task.name}: {winner.plan}, {1e6 * winner.seconds:.1f} us{beside}")
            return
        log(f"{task.name}: no winner: {outcome.reason}")
        self._failed += outcome.failed
        writer.release(task, outcome.reason if outcome.failed else None)
        if outcome.failed:
            target.check()  # a crash would fail every problem after it: end, and let systemd start anew

    def renew(self) -> None:
        """On the main thread: keeps others from the problem at hand, however long it takes."""
        task = self._task
        if task is None or time.monotonic() - self._renewed < RENEW:
            return
        self._renewed = time.monotonic()
        with contextlib.suppress(Fp8GemmError), Writer() as writer:
            writer.renew(task)

    def _rest(self, seconds: float, disturbed: bool) -> None:
        duty = self.share.duty if self.share else 1.0
        self.stop.wait(seconds * (1 / duty - 1) * (BACK_OFF if disturbed else 1.0))

    def _say(self, target: Target, doing: str) -> None:
        """For `daemon status` and systemd."""
        notify(f"STATUS={doing}")
        with contextlib.suppress(OSError):
            _describe(lock_file(target.lock_name), target.name, doing)


# ---- one a device ---------------------------------------------------------------------------------------------------


def lock_file(device: str) -> Path:
    return cache.directory() / f"daemon-{device}.lock"


@contextlib.contextmanager
def locked(device: str) -> Iterator[dict[str, Any] | None]:
    """Holds the device's lock, which dies with the process; gives who has it, if it is another."""
    file = lock_file(device)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(file, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield _described(file)
            return
        _describe(file, device, "starting")
        yield None


def _describe(file: Path, device: str, doing: str) -> None:
    """Writes who holds a lock into its file, in place: a rename would leave the lock behind."""
    facts = {"device": device, "holder": holder(), "pid": os.getpid(), "since": _started, "doing": doing}
    with open(file, "r+") as lock:
        lock.write(json.dumps(facts) + "\n")
        lock.truncate()


def _described(file: Path) -> dict[str, Any]:
    unknown = {"device": file.stem.removeprefix("daemon-"), "holder": "another process", "pid": None}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = {}
    return unknown | {"since": "a moment ago", "doing": "starting"} | (found if isinstance(found, dict) else {})


_started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def status() -> dict[str, Any]:
    """Who runs here, and what there is to do. Raises StoreError if the store cannot be read."""
    running = []
    for file in sorted(cache.directory().glob("daemon-*.lock")):
        with open(file) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                running.append(_described(file))
    misses = store.rows("misses")
    leases = store.rows("leases", "WHERE expires > :now", {"now": time.time()})
    return {
        "store": str(store.path()),
        "daemons": running,
        "misses": sum(row["failure"] is None for row in misses),
        "failed": sum(row["failure"] is not None for row in misses),
        "leases": len(leases),
        "winners": len(store.rows("winners")),
    }


# ---- systemd --------------------------------------------------------------------------------------------------------


def notify(state: str) -> None:
    """sd_notify: tells systemd, if it listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.connect("\0" + address[1:] if address.startswith("@") else address)
        to.send(state.encode())


def log(line: str) -> None:
    """To stderr; journald adds time and name."""
    print(f"fp8gemm: {line}", file=sys.stderr, flush=True)


def unit(where: str | None, share: bool) -> str:
    """A unit file for `systemctl --user` or the system."""
    command = [sys.executable, "-m", "fp8gemm", "daemon", "run"]
    command += (["--device", where] if where else []) + (["--share"] if share else [])
    return f"""\
[Unit]
Description=fp8gemm: tunes FP8 GEMMs that calls missed{f" on {where}" if where else ""}

[Service]
Type=notify
ExecStart={shlex.join(command)}
Environment={shlex.quote(f"FP8GEMM_CACHE_DIR={cache.directory()}")}
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2 {HELD}
TimeoutStopSec=5
Nice=10

[Install]
WantedBy=default.target
"""
