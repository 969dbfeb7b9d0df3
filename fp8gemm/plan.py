"""Plans: how a problem is computed on a Hopper GPU.

A plan has two halves. The compiled half (tile, stages, cluster, depth, split, slices, swap_ab, one_tile) goes into the
kernel as macros and, with the kind, keys a cubin; the launch half (num_sms, raster, b_policy) are kernel arguments.
`Plan.violations` says what is legal; what of it suits a problem's size, `cost.suits`.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from . import native
from .device import Device
from .errors import PlanError

SPACE_VERSION = 5  # of the fields of Plan and their meaning: a stored plan of another version is not read
K_ASCENDING = "k ascending"  # the reduction that is batch-invariant: a row's bits depend on nothing but the row
TILE_K = 128  # one scale block, one swizzled row of shared memory

# createpolicy encodings, as the driver's headers' users know them: fractional policies over all of the data.
L2_POLICIES = {
    "evict_normal": 0x1000000000000000,
    "evict_first": 0x12F0000000000000,
    "evict_last": 0x14F0000000000000,
}
TILE_MS = (32, 64, 128, 192, 256)
TILE_NS = tuple(range(16, 193, 16))
SWAPPED_TILE_MS = (8, 16, 32)
SWAPPED_TILE_NS = (32, 48, 56, 64, 96, 128)
CLUSTERS = ((1, 1), (2, 1), (1, 2))
DEPTHS = (1, 2, 4)
SPLITS = (1, 2, 3, 4)
SLICES = (1, 2)
MOST_CTAS = 4  # of a cluster: wider ones reach fewer SMs (native/README.md)
MIN_STAGES, MAX_STAGES = 3, 16  # of compiled_space: two could not hide a load's latency
FEWER_BYTES_AHEAD = (64 << 10, 96 << 10)  # of B, in the stages of plans for few rows


class Kernel(NamedTuple):
    """What to compile: a source of native/kernels, a function of it, its macros."""

    source: str
    function: str
    macros: tuple[tuple[str, int], ...]


class Plan(NamedTuple):
    """One way to compute a problem. Tiles in elements.

    Of a cluster, `cluster_m` CTAs share a B tile, or `cluster_n` an A tile, or `split` share the K of one tile of D.
    A stage holds `depth` blocks (of 128) of K. Two `slices`: two consumers multiply one of these each, for all of the
    tile. With `swap_ab` wgmma's rows are B's, for few rows of A. With `one_tile`, as with any split of K, a cluster has
    one tile: its kernel has no loop over tiles, and its first load comes sooner.
    """

    tile_m: int
    tile_n: int
    stages: int
    cluster_m: int = 1
    cluster_n: int = 1
    depth: int = 1
    split: int = 1
    slices: int = 1
    swap_ab: int = 0
    one_tile: int = 0
    num_sms: int = 1
    raster: int = 1
    b_policy: str = "evict_normal"

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n * self.split

    @property
    def has_one_tile(self) -> bool:
        """Whether a cluster has one tile, which the grid names."""
        return bool(self.one_tile) or self.split > 1

    @property
    def reduction(self) -> str:
        """How K is summed: plans of one reduction give the same bits, so one may replace another between two calls."""
        parts = "" if self.split == 1 else f"{self.split} parts of whole {self.turn * TILE_K}s of k"
        slices = "" if self.slices == 1 else f"{self.slices} slices of each {self.depth * TILE_K} of k"
        return ", ".join(filter(None, (parts, slices))) or K_ASCENDING

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply: one for each slice of a low tile; two share a taller tile's rows, three 192."""
        return self.slices if self.tile_m <= 64 else 3 if self.tile_m == 192 else 2

    @property
    def waves(self) -> int:
        """Blocks of 64 rows that each consumer multiplies, one after another."""
        if self.swap_ab:
            return -(-self.tile_n // 64)
        return max(1, self.tile_m // 64 // self.consumers)

    @property
    def two_partials(self) -> bool:
        """Whether registers hold two partial sums at a time: one's promotion then hides behind the next one's wgmma."""
        return not self.swap_ab and self.consumers <= 2 and self.tile_n * (self.waves + 2) + 32 * self.waves <= 416

    @property
    def turn(self) -> int:
        """Blocks of K that a consumer multiplies at a time."""
        return 2 if self.two_partials and self.waves == 1 and self.depth == 1 else self.depth

    @property
    def threads(self) -> int:
        """One producer warpgroup, and the consumers."""
        return 128 * (1 + self.consumers)

    @property
    def staged(self) -> bool:
        """Whether D passes through shared memory; else it goes from registers."""
        return self.tile_m >= 64 and self.split == 1

    @property
    def consumer_n(self) -> int:
        """Columns of a tile that are a consumer's in the end: of two slices, half of them."""
        return self.tile_n // self.slices

    @property
    def columns(self) -> int:
        """Of these, what it stores: of a split the largest share, in whole groups of eight; swapped, all are equal."""
        return self.tile_n // self.split if self.swap_ab else -(-self.consumer_n // (8 * self.split)) * 8

    @property
    def shared_bytes(self) -> int:
        """What native/kernels/storage.cuh takes and what is read behind it; it asserts that both agree."""
        segments = self.tile_n // math.gcd(self.tile_n, 128)  # of columns, a B scale each
        scales = self.tile_m + 4 + (segments + 3) // 4 * 4
        stage = self.depth * ((self.tile_m + self.tile_n) * TILE_K + scales * 4) + 2 * 8
        sent = 64 * self.waves // self.split if self.swap_ab else self.columns
        parts = (self.split - 1) * self.tile_m * sent * self.slices * 4 if self.split > 1 else 16 * self.consumers
        d = (self.tile_m * self.slices if self.staged else 1) * self.columns * 2
        apart = self.slices > 1 and not self.has_one_tile  # what slices send one another, else in the ring
        exchanged = self.slices * (self.tile_m * self.consumer_n * 4 if apart else 16)
        beyond = (64 * self.waves - self.tile_n) * TILE_K if self.swap_ab else 0  # wgmma reads whole waves of B
        total = self.stages * ((stage + 1023) // 1024 * 1024) + (d + 15) // 16 * 16 + parts + exchanged
        total += (8 * self.consumers + 15) // 16 * 16
        return (total + 1023) // 1024 * 1024 + beyond

    def violations(self, kind: int, device: Device) -> Iterator[str]:
        """Every rule that the plan breaks for this kind of problem on this device, in words; none if it is legal."""
        tile_ms, tile_ns = (SWAPPED_TILE_MS, SWAPPED_TILE_NS) if self.swap_ab else (TILE_MS, TILE_NS)
        if self.tile_m not in tile_ms:
            yield f"tile_m {self.tile_m}, allowed are {tile_ms}"
        if self.tile_n not in tile_ns:
            yield f"tile_n {self.tile_n}, allowed are {tile_ns}"
        if self.swap_ab not in (0, 1):
            yield f"swap_ab {self.swap_ab}, allowed are 0 and 1"
        if self.swap_ab and self.split not in (1, 2, 4):
            yield f"split {self.split} of K with swap_ab: the sums of four warps are shared by two or four"
        if self.tile_m > 128 and self.tile_n > 128:
            yield f"tile {self.tile_m} x {self.tile_n}: the FP32 sums do not fit in registers, one side must be <= 128"
        if (self.cluster_m, self.cluster_n) not in CLUSTERS:
            yield f"cluster {self.cluster_m} x {self.cluster_n}, allowed are {CLUSTERS}"
        if self.cluster_m * self.cluster_n > 1 and self.tile_m < 64:
            yield f"cluster {self.cluster_m} x {self.cluster_n} for tile_m {self.tile_m}, allowed from 64 on"
        if self.split not in SPLITS:
            yield f"split {self.split}, allowed are {SPLITS}"
        elif self.cluster > MOST_CTAS:
            yield f"cluster of {self.cluster} CTAs, allowed are {MOST_CTAS}"
        elif self.split > 1 and self.cluster > self.split and self.tile_m != 64:
            yield f"split {self.split} of K in clusters that share operands, tile_m {self.tile_m}: allowed for 64 rows"
        if self.split > 1 and kind != native.DENSE:
            yield f"split {self.split} of K for groups: nobody knows on the host whether their tiles are few"
        if not self.swap_ab and self.tile_n < 8 * self.split:
            yield f"split {self.split} of K: tile_n {self.tile_n} must be at least {8 * self.split} then"
        if self.slices not in SLICES:
            yield f"slices {self.slices}, allowed are {SLICES}"
        elif self.slices > 1 and (self.tile_m, self.depth) != (64, self.slices):
            yield f"slices {self.slices} of tile_m {self.tile_m}, depth {self.depth}: allowed are 64 rows, a block each"
        if self.slices > 1 and (self.cluster == 1 or kind != native.DENSE):
            yield f"slices {self.slices}: allowed in clusters and for dense problems, whose CTAs have few tiles"
        if self.slices > 1 and self.split == 1 and self.tile_n % 32:
            yield f"slices {self.slices} for tile_n {self.tile_n}: must be a multiple of 32 where K is not split"
        if self.one_tile not in (0, 1):
            yield f"one_tile {self.one_tile}, allowed are 0 and 1"
        elif self.one_tile and (self.depth == 1 or self.split > 1 or kind != native.DENSE):
            yield f"one_tile, depth {self.depth}, split {self.split}: for deep stages of dense problems, K not split"
        if self.depth not in DEPTHS:
            yield f"depth {self.depth}, allowed are {DEPTHS}"
        if self.depth > 1 and (self.tile_m > 128 or self.tile_n > 128):
            yield f"depth {self.depth} for a tile of {self.tile_m} x {self.tile_n}, allowed up to 128 x 128"
        if not 2 <= self.stages <= MAX_STAGES:
            yield f"{self.stages} stages, allowed are 2 to {MAX_STAGES}"
        if self.shared_bytes > device.shared_bytes:
            yield f"{self.shared_bytes} bytes of shared memory, {device.name} has {device.shared_bytes} for a CTA"
        if kind == native.CONTIGUOUS and self.swap_ab:
            yield "swap_ab for contiguous groups: their segments are 128 rows at least"
        if kind == native.CONTIGUOUS and self.tile_m > 128:
            yield f"tile_m {self.tile_m} for contiguous groups: their segments are aligned to 128 rows only"
        if kind in (native.RAGGED, native.MASKED) and self.consumers > 2:
            yield f"tile_m {self.tile_m} for groups: three consumers have no registers to look for them"
        if not self.cluster <= self.num_sms <= device.sms:
            yield f"num_sms {self.num_sms}, allowed are {self.cluster} (the cluster) to {device.sms}"
        if self.raster < 1:
            yield f"raster {self.raster}, must be at least 1"
        if self.b_policy not in L2_POLICIES:
            yield f"b_policy {self.b_policy!r}, allowed are {tuple(L2_POLICIES)}"

    def check(self, kind: int, device: Device) -> None:
        """Raises PlanError if the plan is illegal."""
        if broken := list(self.violations(kind, device)):
            raise PlanError(f"{self}: " + "; ".join(broken))

    def kernel(self, kind: int) -> Kernel:
        macros = {
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            "STAGES": self.stages,
            "CLUSTER_M": self.cluster_m,
            "CLUSTER_N": self.cluster_n,
            "DEPTH": self.depth,
            "SPLIT": self.split,
            "SLICES": self.slices,
            "SWAP_AB": self.swap_ab,
            "ONE_TILE": int(self.has_one_tile),
            "KIND": kind,
            "SMEM_BYTES": self.shared_bytes,
        }
        return Kernel("gemm.cu", "fp8gemm_gemm", tuple(macros.items()))

    def native(self) -> native.Plan:
        fields = self._asdict() | {"b_policy": L2_POLICIES[self.b_policy], "one_tile": self.has_one_tile}
        return native.Plan(**fields, shared_bytes=self.shared_bytes, threads=self.threads)

    def __str__(self) -> str:
        cluster = f" cluster {self.cluster_m}x{self.cluster_n}" if self.cluster_m * self.cluster_n > 1 else ""
        depth = f"x{self.depth}" if self.depth > 1 else ""
        split = f" split {self.split}" if self.split > 1 else ""
        slices = f" slices {self.slices}" if self.slices > 1 else ""
        swapped = " swapped" if self.swap_ab else ""
        one = " one tile" if self.one_tile else ""
        compiled = f"{self.tile_m}x{self.tile_n}{swapped} stages {self.stages}{depth}{cluster}{split}{slices}{one}"
        policy = "" if self.b_policy == "evict_normal" else f" {self.b_policy}"
        return f"{compiled} sms {self.num_sms} raster {self.raster}{policy}"


def reference_kernel(kind: int, output_fp32: bool = False) -> Kernel:
    """The plain FP32 GEMM: the slow path for strides that TMA cannot take, and what plans are checked against."""
    macros = (("KIND", kind), ("OUTPUT_FP32", 1)) if output_fp32 else (("KIND", kind),)
    return Kernel("reference.cu", "fp8gemm_reference", macros)


def tuner_kernels() -> Kernel:
    """The tuner's own: filling operands, flushing L2, comparing outputs. One cubin holds them all."""
    return Kernel("tuner.cu", "fp8gemm_fill_e4m3", ())


def cast_kernel(per_block: bool, input_type: int) -> Kernel:
    """A quantiser; `input_type` 0 bf16, 1 fp16, 2 fp32."""
    function = "fp8gemm_cast_per_block" if per_block else "fp8gemm_cast_per_token"
    return Kernel("quantize.cu", function, (("INPUT", input_type),))


def copy_kernel() -> Kernel:
    """Copies scales into another layout."""
    return Kernel("quantize.cu", "fp8gemm_copy_scales", (("INPUT", 2),))


@functools.cache
def compiled_space(kind: int, device: Device) -> tuple[Plan, ...]:
    """Every legal compiled half of three stages and more for this kind, each with as many as fit in shared memory.

    Plans for few rows with deep stages also come with fewer: the first stages of all SMs together are a queue at the
    memory, and what the consumers need first, scales, stands in it too (native/README.md).
    """
    plans = []
    sharing = [(*cluster, split) for cluster in CLUSTERS for split in SPLITS]
    tiles = [(*tile, 0) for tile in itertools.product(TILE_MS, TILE_NS)]
    tiles += [(*tile, 1) for tile in itertools.product(SWAPPED_TILE_MS, SWAPPED_TILE_NS)]
    for (tile_m, tile_n, swap), shared, depth, slices in itertools.product(tiles, sharing, DEPTHS, SLICES):
        cluster_m, cluster_n, split = shared
        most = Plan(tile_m, tile_n, MAX_STAGES, cluster_m, cluster_n, depth, split, slices, swap, num_sms=device.sms)
        while most.stages >= MIN_STAGES and any(most.violations(kind, device)):
            most = most._replace(stages=most.stages - 1)
        counts = {most.stages}
        if tile_m <= 64 and depth > 1:
            counts |= {round(bytes_ahead / (depth * tile_n * TILE_K)) for bytes_ahead in FEWER_BYTES_AHEAD}
        one_tile = (0, 1) if depth > 1 and split == 1 and kind == native.DENSE else (0,)
        found = [most._replace(stages=n) for n in sorted(counts) if MIN_STAGES <= n <= most.stages]
        plans += [plan._replace(one_tile=one) for plan in found for one in one_tile]
    return tuple(plans)
