"""Compiles kernels into the cache, in processes that see no GPU: the one that measures only loads."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from fp8gemm import backends, cache, compiler
from fp8gemm.errors import CompileError
from fp8gemm.plan import Kernel

MOST_WORKERS = 16
_PR_SET_PDEATHSIG = 1


def _start(nvrtc_12: bool) -> None:
    """In a worker, before anything opens the driver: the compiler is the parent's, though no driver tells which."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives a parent that was killed
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if nvrtc_12:
        compiler.preload_nvrtc_12()


def _build(kernel: Kernel) -> str | None:
    """In a worker: why the kernel cannot be built, None if it is in the cache now."""
    try:
        compiler.cubin(kernel)
    except CompileError as error:
        return str(error).splitlines()[0]
    return None


class Builder:
    """A pool of compiling processes; each kernel is built once. Raises CompilerNotFound if there is no compiler."""

    def __init__(self, workers: int | None = None) -> None:
        nvrtc_12 = compiler.compiler().kind == "nvrtc" and compiler.compiler().major == 12
        self.workers = workers or min(backends.cpu_threads(), MOST_WORKERS)
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the driver, which does not survive it
        self._pool = ProcessPoolExecutor(self.workers, spawn, _start, (nvrtc_12,))
        self._futures: dict[Kernel, Future[str | None]] = {}

    def submit(self, kernels: Iterable[Kernel]) -> int:
        """Begins to build those that are not in the cache; how many these are."""
        new = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._futures]
        self._futures |= {kernel: self._begin(kernel) for kernel in new}
        return sum(not self._futures[kernel].done() for kernel in new)

    def _begin(self, kernel: Kernel) -> "Future[str | None]":
        if cache.has(compiler.key(kernel)):
            done: Future[str | None] = Future()
            done.set_result(None)
            return done
        return self._pool.submit(_build, kernel)

    def results(
        self, kernels: Iterable[Kernel], stop: Callable[[], bool], told: Callable[[int, int], None] = lambda *_: None
    ) -> dict[Kernel, str | None]:
        """Waits until all are built: why each could not be, None if it is in the cache. `told` hears (done, all).

        With `stop` those that are not finished fail. Raises CompileError if a worker died.
        """
        wanted = list(dict.fromkeys(kernels))
        self.submit(wanted)
        futures = {self._futures[kernel] for kernel in wanted}
        pending = futures
        while pending and not stop():
            told(len(futures) - len(pending), len(futures))
            _, pending = wait(pending, timeout=0.2)
        told(len(futures) - len(pending), len(futures))
        try:
            return {k: self._futures[k].result(0) if self._futures[k].done() else "stopped" for k in wanted}
        except BrokenProcessPool as error:
            raise CompileError(f"a compiling process died: {error}") from error

    def close(self) -> None:
        """Builds that have not begun never will; those that run are ended."""
        workers = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + 0.5
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                with contextlib.suppress(OSError):
                    worker.kill()
