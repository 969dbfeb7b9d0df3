"""Where the benchmark's matrices are made, checked and timed: NumPy on a CPU, PyTorch or CuPy on a GPU."""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from . import accuracy
from .accuracy import BLOCK, POISON, Check
from .backends import cpu_threads
from .device import cpu_name, require_hopper
from .errors import BackendUnavailable
from .gemm import Matrix
from .layout import ceil_div, get_tma_aligned_size
from .native import library
from .peers import Call, Peers, numpy_peers, torch_peers
from .quantize import per_block_cast_to_fp8, per_token_cast_to_fp8

FLUSH_BYTES = 512 << 20  # ten times the L2 of a Hopper; reading it leaves L2 clean
CPU_ROWS = 64  # rows of D that a CPU checks: float64 products are slow
WARM_UP = 2  # rounds on a GPU that do not count
CPU_ROUND = 0.03  # seconds that a contender gets in a round at least


class Workbench(Protocol):
    """One framework on one device. FP8 is uint8, scales float32, from this library's quantisers."""

    device: str
    hardware: str
    statistic: str  # of the rounds' times
    versions: dict[str, str]
    left_out: dict[str, str]  # peers that cannot run, and why

    def activations(self, m: int, k: int) -> Matrix:
        """Random normal, quantised: (m, k), (m, ceil(k / 128))."""

    def weights(self, n: int, k: int) -> Matrix:
        """Random normal, quantised: (n, k), (ceil(n / 128), ceil(k / 128))."""

    def empty(self, m: int, n: int) -> Any:
        """Room for a bf16 result (m, n)."""

    def poison(self, d: Any) -> None:
        """Fills d with NaN."""

    def copy(self, d: Any) -> Any: ...

    def same(self, d: Any, e: Any) -> bool:
        """Whether two results agree bit for bit and are finite."""

    def check(self, lhs: Matrix, rhs: Matrix, d: Any) -> Check:
        """d beside the float64 product of the dequantised operands."""

    def peers(self, lhs: Matrix, rhs: Matrix, d: Any) -> Peers:
        """What else computes this product here."""

    def seconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        """Time of each call; they take turns."""


def interleaved(calls: Mapping[str, Call], rounds: int) -> Iterator[tuple[str, Call]]:
    """Every call once a round; another one begins each time."""
    names = list(calls)
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            yield name, calls[name]


def event_seconds(
    calls: Mapping[str, Call], rounds: int, flush: Call, event: Call, milliseconds: Callable[[Any, Any], float]
) -> dict[str, float]:
    """Median time of each call on the current stream, between two CUDA events of the caller's framework.

    The flush before each call lasts longer than the host needs to issue it, so no gap counts.
    """
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for name, call in interleaved(calls, WARM_UP + rounds):
        start: Any = event()
        end: Any = event()
        flush()
        start.record()
        call()
        end.record()
        spans[name].append((start, end))
    for finished in spans.values():
        finished[-1][1].synchronize()
    return {name: statistics.median(milliseconds(*s) for s in spans[name][WARM_UP:]) / 1e3 for name in calls}


def busy_share(seconds: float = 0.3) -> float:
    """Share of this machine's cores that is busy while this process waits; 0 if the system does not tell."""

    def read() -> tuple[int, int]:
        user, nice, system, idle, wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return idle + wait, user + nice + system + idle + wait + sum(rest)

    try:
        idle, total = read()
        time.sleep(seconds)
        idle_after, total_after = read()
    except (OSError, ValueError):
        return 0.0
    return 1 - (idle_after - idle) / max(total_after - total, 1)


class NumpyBench:
    """The CPU backend beside NumPy."""

    xp: Any  # the array module
    device, statistic = "cpu", "best"

    def __init__(self) -> None:
        import numpy as np

        self.xp = np
        self.seeds = np.random.SeedSequence(0)
        self.hardware = f"{cpu_name()}, {cpu_threads()} cores, {library().cpu_features().decode()}"
        self.versions = {"numpy": np.__version__}
        self.left_out: dict[str, str] = {}

    def _random(self, rows: int, columns: int) -> Any:
        """Standard normal, as bf16 bits (rows, columns)."""
        np, out = self.xp, self.xp.empty((rows, columns), self.xp.uint16)
        blocks = [out[i : i + BLOCK] for i in range(0, rows, BLOCK)]

        def fill(block: Any, seed: Any) -> None:
            block[:] = accuracy.to_bf16(np, np.random.default_rng(seed).standard_normal(block.shape, dtype=np.float32))

        with ThreadPoolExecutor(cpu_threads()) as pool:
            list(pool.map(fill, blocks, self.seeds.spawn(len(blocks))))
        return out

    def activations(self, m: int, k: int) -> Matrix:
        out = self.xp.empty((m, k), self.xp.uint8), self.xp.empty((m, ceil_div(k, BLOCK)), self.xp.float32)
        return per_token_cast_to_fp8(self._random(m, k), out)

    def weights(self, n: int, k: int) -> Matrix:
        shape = ceil_div(n, BLOCK), ceil_div(k, BLOCK)
        out = self.xp.empty((n, k), self.xp.uint8), self.xp.empty(shape, self.xp.float32)
        return per_block_cast_to_fp8(self._random(n, k), out)

    def empty(self, m: int, n: int) -> Any:
        return self.xp.empty((m, n), self.xp.uint16)

    def poison(self, d: Any) -> None:
        d[:] = POISON

    def copy(self, d: Any) -> Any:
        return d.copy()

    def same(self, d: Any, e: Any) -> bool:
        return bool((d == e).all()) and accuracy.finite(self.xp, d)

    def check(self, lhs: Matrix, rhs: Matrix, d: Any) -> Check:
        m = d.shape[0]
        generator = self.xp.random.default_rng(m)
        rows = generator.choice(m, min(m, CPU_ROWS), replace=False)
        return accuracy.summarise(accuracy.reference_errors(self.xp, (lhs[0][rows], lhs[1][rows]), rhs, d[rows]))

    def peers(self, lhs: Matrix, rhs: Matrix, d: Any) -> Peers:
        return numpy_peers(lhs, rhs)

    def seconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        best = dict.fromkeys(calls, float("inf"))
        for name, call in interleaved(calls, rounds):
            until = time.perf_counter() + CPU_ROUND
            while (started := time.perf_counter()) < until:
                call()
                best[name] = min(best[name], time.perf_counter() - started)
        return best


class CupyBench(NumpyBench):
    """A GPU without PyTorch: nobody to compare with."""

    statistic = "median"

    def __init__(self, device_id: int) -> None:
        cupy: Any = importlib.import_module("cupy")
        cupy.cuda.Device(device_id).use()
        self.xp, self.rng = cupy, cupy.random.default_rng(0)
        self.device, self.hardware = f"cuda:{device_id}", require_hopper(device_id).name
        self.versions = {"cupy": cupy.__version__}
        self.left_out = {"cublaslt_block": "needs torch", "cublaslt_tensor": "needs torch", "deep_gemm": "needs torch"}
        self.flush = cupy.zeros(FLUSH_BYTES // 4, cupy.float32)

    def _random(self, rows: int, columns: int) -> Any:
        return accuracy.to_bf16(self.xp, self.rng.standard_normal((rows, columns), dtype=self.xp.float32))

    def check(self, lhs: Matrix, rhs: Matrix, d: Any) -> Check:
        return accuracy.summarise(accuracy.reference_errors(self.xp, lhs, rhs, d))

    def peers(self, lhs: Matrix, rhs: Matrix, d: Any) -> Peers:
        return {}

    def seconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        cuda = self.xp.cuda
        return event_seconds(calls, rounds, self.flush.sum, cuda.Event, cuda.get_elapsed_time)


class TorchBench:
    """A GPU beside what PyTorch has and DeepGEMM. Everyone gets A's scales column-major."""

    statistic = "median"

    def __init__(self, device_id: int) -> None:
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            raise ImportError("this build sees no GPU")
        torch.cuda.set_device(device_id)
        torch.manual_seed(0)
        self.torch = torch
        self.device, self.hardware = f"cuda:{device_id}", require_hopper(device_id).name
        self.versions = {"torch": torch.__version__}
        self.left_out: dict[str, str] = {}
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=self.device)

    def _empty(self, *shape: int, dtype: str) -> Any:
        return self.torch.empty(*shape, dtype=getattr(self.torch, dtype), device=self.device)

    def _random(self, rows: int, columns: int) -> Any:
        return self.torch.randn(rows, columns, device=self.device, dtype=self.torch.bfloat16)

    def activations(self, m: int, k: int) -> Matrix:
        scales = self._empty(ceil_div(k, BLOCK), get_tma_aligned_size(m, 4), dtype="float32").t()[:m]
        return per_token_cast_to_fp8(self._random(m, k), (self._empty(m, k, dtype="uint8"), scales))

    def weights(self, n: int, k: int) -> Matrix:
        scales = self._empty(ceil_div(n, BLOCK), ceil_div(k, BLOCK), dtype="float32")
        return per_block_cast_to_fp8(self._random(n, k), (self._empty(n, k, dtype="uint8"), scales))

    def empty(self, m: int, n: int) -> Any:
        return self._empty(m, n, dtype="bfloat16")

    def poison(self, d: Any) -> None:
        d.fill_(float("nan"))

    def copy(self, d: Any) -> Any:
        return d.clone()

    def same(self, d: Any, e: Any) -> bool:
        return bool((d == e).all())  # false where d is NaN, and e has been checked

    def _dequantise(self, matrix: Matrix, rows: int) -> Any:
        q, s = matrix
        scale = s.double().repeat_interleave(rows, 0)[: q.shape[0]].repeat_interleave(BLOCK, 1)[:, : q.shape[1]]
        return q.view(self.torch.float8_e4m3fn).float().double() * scale

    def check(self, lhs: Matrix, rhs: Matrix, d: Any) -> Check:
        b, errors = self._dequantise(rhs, BLOCK), []
        for i in range(0, d.shape[0], 1024):  # D in float64, three times over, would be gigabytes
            ref = self._dequantise((lhs[0][i : i + 1024], lhs[1][i : i + 1024]), 1) @ b.t()
            rounded = ref.to(self.torch.bfloat16).double()
            errors += accuracy.row_errors(d[i : i + 1024].double(), ref, rounded)
        return accuracy.summarise(errors)

    def peers(self, lhs: Matrix, rhs: Matrix, d: Any) -> Peers:
        return torch_peers(lhs, rhs, self.torch.empty_like(d), self.left_out)

    def seconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        event = functools.partial(self.torch.cuda.Event, enable_timing=True)
        return event_seconds(calls, rounds, self.flush.sum, event, lambda start, end: start.elapsed_time(end))


def gpu_bench(device_id: int) -> Workbench:
    """The workbench of a Hopper GPU. Raises BackendUnavailable without one, or with neither PyTorch nor CuPy for it."""
    require_hopper(device_id)
    reasons = []
    for framework, bench in (("torch", TorchBench), ("cupy", CupyBench)):
        try:
            return bench(device_id)
        except (ImportError, RuntimeError) as error:  # RuntimeError: CuPy without a GPU or its libraries
            reasons.append(f"{framework}: {error}".splitlines()[0])
    raise BackendUnavailable(
        f"the benchmark of cuda:{device_id} needs torch or cupy, for its random matrices and its reference "
        f"({'; '.join(reasons)}). `fp8gemm bench --device cpu` measures the CPU backend."
    )
