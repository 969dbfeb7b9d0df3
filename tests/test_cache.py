"""The cubin cache: what is a hit, what is a miss, many processes, directories that do not work."""

import errno
import multiprocessing
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fp8gemm import cache

CUBIN = b"\x7fELF a kernel\n\0 of some\n length" * 100


class Builds:
    """A build function that counts its calls."""

    def __init__(self, cubin: bytes = CUBIN) -> None:
        self.cubin, self.count = cubin, 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.cubin


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of this test's own, and a process that has warned of nothing."""
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))
    cache._warned.clear()
    yield tmp_path / "cache"
    cache._warned.clear()


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cubins").glob("*.cubin"))


def test_hit_and_miss(folder: Path) -> None:
    build, other = Builds(), Builds(b"another")
    assert cache.get_or_build("key", build) == CUBIN
    assert cache.get_or_build("key", build) == CUBIN
    assert cache.get_or_build("other", other) == b"another"
    assert cache.get_or_build("key", other) == CUBIN
    assert (build.count, other.count) == (1, 1)
    assert [path.stem for path in entries(folder)] == ["key", "other"]
    assert not list(folder.rglob(".new-*"))


def test_empty_cubin_is_an_entry() -> None:
    build = Builds(b"")
    assert cache.get_or_build("key", build) == cache.get_or_build("key", build) == b""
    assert build.count == 1


def test_directory(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.directory() == folder
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "fp8gemm"
    monkeypatch.delenv("FP8GEMM_CACHE_DIR")
    assert cache.directory() == tmp_path / "xdg" / "fp8gemm"
    cache.get_or_build("key", Builds())
    assert entries(tmp_path / "xdg" / "fp8gemm")
    assert not folder.exists()


def test_directory_changed_between_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = Builds()
    for name in ("one", "two"):
        monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path / name))
        cache.get_or_build("key", build)
        assert len(entries(tmp_path / name)) == 1
    assert build.count == 2


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_private(folder: Path, umask: int) -> None:
    """A cubin is code: nobody else may put one there, or read it."""
    saved = os.umask(umask)
    try:
        cache.get_or_build("key", Builds())
    finally:
        os.umask(saved)
    assert stat.S_IMODE((folder / "cubins").stat().st_mode) == 0o700
    assert stat.S_IMODE(entries(folder)[0].stat().st_mode) == 0o600


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda entry: b"",
    "header only": lambda entry: entry[: entry.index(b"\n") + 1],
    "truncated": lambda entry: entry[:-1],
    "truncated header": lambda entry: entry[:20],
    "longer": lambda entry: entry + b"\0",
    "one bit off": lambda entry: entry[:-5] + bytes([entry[-5] ^ 1]) + entry[-4:],
    "without its header": lambda entry: entry[entry.index(b"\n") + 1 :],
    "of another version": lambda entry: entry.replace(b"cubin 1", b"cubin 2", 1),
    "garbage": lambda entry: os.urandom(len(entry)),
    "text": lambda entry: b"not a kernel\n" * 10,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_spoilt_entry_is_a_miss(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Never an error, never served; it is built again and mended."""
    build = Builds()
    cache.get_or_build("key", build)
    (path,) = entries(folder)
    path.write_bytes(spoil(path.read_bytes()))
    assert cache.get_or_build("key", build) == CUBIN
    assert build.count == 2
    assert cache.get_or_build("key", build) == CUBIN
    assert build.count == 2


def test_entry_of_another_key(folder: Path) -> None:
    """Keys are digests of all that goes into a cubin, so a copied entry could only be put there on purpose."""
    cache.get_or_build("key", Builds())
    cache.get_or_build("other", Builds(b"another"))
    assert (folder / "cubins" / "key.cubin").read_bytes() != (folder / "cubins" / "other.cubin").read_bytes()


# ---- many processes


def build_slowly(counter: Any) -> bytes:
    with counter.get_lock():
        counter.value += 1
    time.sleep(0.2)
    return CUBIN


def ask(counter: Any, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(cache.get_or_build("key", lambda: build_slowly(counter)))


def test_many_processes_build_once() -> None:
    context = multiprocessing.get_context("spawn")
    count = 6
    counter, barrier, results = context.Value("i", 0), context.Barrier(count), context.Queue()
    processes = [context.Process(target=ask, args=(counter, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [CUBIN] * count
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert counter.value == 1


def die_building(started: Any) -> None:
    def build() -> bytes:
        started.set()
        os._exit(3)

    cache.get_or_build("key", build)


def test_a_builder_that_dies_gives_the_lock_back() -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=die_building, args=(started,))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert started.is_set()
    build = Builds()
    assert cache.get_or_build("key", build) == CUBIN
    assert build.count == 1


def test_two_keys_do_not_wait_for_each_other(folder: Path) -> None:
    """A build may ask for another kernel."""
    inner = Builds(b"inner")
    assert cache.get_or_build("outer", lambda: cache.get_or_build("inner", inner) + b"!") == b"inner!"
    assert len(entries(folder)) == 2


# ---- directories that do not work


def expect_one_warning(build: Builds, *texts: str) -> None:
    """Three calls, two keys: all work, each builds, one of them warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("key", "key", "other"):
            assert cache.get_or_build(key, build) == CUBIN
    assert build.count == 3
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    for text in (*texts, str(cache.directory()), "FP8GEMM_CACHE_DIR", "compiled in every process"):
        assert text in message


def test_directory_is_a_file(folder: Path) -> None:
    folder.write_text("in the way")
    expect_one_warning(Builds(), "Not a directory")


def test_unwritable_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    expect_one_warning(Builds(), "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    expect_one_warning(Builds(), "Permission denied")


@pytest.mark.parametrize("call", ["tempfile.mkstemp", "os.fdopen", "os.replace"])
def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """At whatever call it shows; nothing half-written is left."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"fp8gemm.cache.{call}", full)
        expect_one_warning(Builds(), "No space left")
    assert not entries(folder)
    assert not list((folder / "cubins").glob(".new-*"))
    build = Builds()
    cache.get_or_build("key", build)  # there is space again
    assert len(entries(folder)) == build.count == 1


def test_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot lock."""

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fp8gemm.cache.fcntl.flock", unsupported)
    expect_one_warning(Builds(), os.strerror(errno.ENOLCK))


def test_directory_removed_meanwhile(folder: Path) -> None:
    build = Builds()
    cache.get_or_build("key", build)
    for path in (folder / "cubins").iterdir():
        path.unlink()
    (folder / "cubins").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cache.get_or_build("key", build) == CUBIN
    assert build.count == 2


# ---- builds that fail


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "mine"), KeyboardInterrupt()], ids=repr)
def test_errors_of_a_build_pass(folder: Path, error: BaseException) -> None:
    """An OSError too: it is the compiler's, not the cache's, and the build is not tried twice."""
    builds = Builds()

    def fail() -> bytes:
        builds()
        raise error

    with pytest.raises(type(error)) as caught:
        cache.get_or_build("key", fail)
    assert caught.value is error
    assert builds.count == 1
    assert not entries(folder)
    assert cache.get_or_build("key", builds) == CUBIN
