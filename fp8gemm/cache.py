"""The cubin cache: one file an entry in a private directory, safe for many processes.

An entry is a digest line and the cubin; anything else (truncated, foreign) is a miss. Entries appear by atomic rename,
under a lock of their own, so that N processes that need one kernel compile it once. A directory that can't be used
costs one warning, and everything is compiled afresh.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

_MAGIC = b"fp8gemm cubin 1 "
_warned = threading.Event()


def directory() -> Path:
    """`FP8GEMM_CACHE_DIR`, else the user's cache directory."""
    chosen = os.environ.get("FP8GEMM_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("fp8gemm"))


def has(key: str) -> bool:
    """Whether there is a whole entry."""
    try:
        return _read(directory() / "cubins" / f"{key}.cubin") is not None
    except OSError:
        return False


def get_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The cubin of `key`, from the cache or by `build()`, which runs at most once a machine and key."""
    path = directory() / "cubins" / f"{key}.cubin"
    try:
        if (cubin := _read(path)) is not None:
            return cubin
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # a cubin is code: nobody else may write here
        with _locked(path.with_suffix(".lock")):
            if (cubin := _read(path)) is None:  # another process may have built it meanwhile
                cubin = _guarded(build)
                _write(path, cubin)
            return cubin
    except _BuildFailed as failed:
        raise failed.cause from None
    except OSError as error:
        _warn(error)
        return build()


class _BuildFailed(Exception):
    """Carries a compiler's error past the handler of the cache's own OSErrors."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


def _guarded(build: Callable[[], bytes]) -> bytes:
    try:
        return build()
    except BaseException as error:
        raise _BuildFailed(error) from error


def _warn(error: OSError) -> None:
    if not _warned.is_set():
        _warned.set()
        warnings.warn(
            f"the kernel cache in {directory()} cannot be used ({error}); kernels are compiled in every process. "
            "FP8GEMM_CACHE_DIR names another directory.",
            RuntimeWarning,
            stacklevel=2,
        )


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except FileNotFoundError:
        return None
    header, _, cubin = entry.partition(b"\n")
    return cubin if header == _MAGIC + hashlib.sha256(cubin).hexdigest().encode() else None


def _write(path: Path, cubin: bytes) -> None:
    header = _MAGIC + hashlib.sha256(cubin).hexdigest().encode() + b"\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(header + cubin)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:  # a full disk: the cubin still serves this process
        _warn(error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released also when the process dies
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # at once: a fork meanwhile shares the lock, and may live on
