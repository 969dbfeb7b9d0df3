"""The GEMMs through the public interface, on the CPU: every kind, layout and size; what is written and what is not."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    ALIGNMENT,
    POISON,
    SCALE_LAYOUTS,
    Array,
    Operands,
    Output,
    Rng,
    ceil_div,
    check_accuracy,
    column_major,
    fenced,
    fresh_rng,
    in_child,
    m_indices_of,
    padded,
    random_operands,
    segments,
)

import fp8gemm
from fp8gemm import (
    OperandError,
    gemm_fp8_fp8_bf16_nt,
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
)

KINDS = ["contiguous", "ragged", "masked"]


# ---- dense


@pytest.mark.parametrize("sb_layout", range(len(SCALE_LAYOUTS)))
@pytest.mark.parametrize("sa_layout", range(len(SCALE_LAYOUTS)))
def test_scale_layouts(rng: Rng, sa_layout: int, sb_layout: int) -> None:
    operands = random_operands(rng, 37, 300, 400)
    d = Output((37, 300))
    sa, sb = SCALE_LAYOUTS[sa_layout](operands.sa), SCALE_LAYOUTS[sb_layout](operands.sb)
    assert gemm_fp8_fp8_bf16_nt((operands.a, sa), (operands.b, sb), d.d) is d.d
    check_accuracy(d.d, operands)
    d.check_untouched()


@pytest.mark.parametrize("k", [16, 112, 128, 144, 1024, 4112])
@pytest.mark.parametrize("n", [1, 63, 64, 129])
@pytest.mark.parametrize("m", [1, 2, 130])
def test_sizes(rng: Rng, m: int, n: int, k: int) -> None:
    operands = random_operands(rng, m, n, k)
    d = Output((m, n), padding=1)
    gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d.d)
    check_accuracy(d.d, operands)
    d.check_untouched()


@given(st.data())
def test_any_strides(data: st.DataObject) -> None:
    draw = data.draw
    m, n, k = draw(st.integers(0, 200)), draw(st.integers(1, 300)), 16 * draw(st.integers(0, 30))
    paddings = [draw(st.integers(0, 33)) for _ in range(3)]
    layouts = [draw(st.sampled_from(SCALE_LAYOUTS)) for _ in range(2)]
    operands = random_operands(fresh_rng(draw(st.integers(0, 2**32))), m, n, k)
    d = Output((m, n), paddings[2], offset=draw(st.integers(0, 9)))
    lhs = padded(operands.a, paddings[0], 0x7F), layouts[0](operands.sa)
    rhs = padded(operands.b, paddings[1], 0xFF), layouts[1](operands.sb)
    gemm_fp8_fp8_bf16_nt(lhs, rhs, d.d, batch_invariant=draw(st.sampled_from([None, True, False])))
    check_accuracy(d.d, operands)
    d.check_untouched()


def test_no_rows_and_no_k(rng: Rng) -> None:
    operands = random_operands(rng, 0, 5, 64)
    assert gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs).numpy().shape == (0, 5)
    operands = random_operands(rng, 3, 130, 0)
    d = Output((3, 130), padding=2)
    gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d.d)
    assert (d.d == 0).all()
    d.check_untouched()


def test_strides_of_one_row_mean_nothing(rng: Rng) -> None:
    """A framework may give a dimension of 1 any stride."""
    operands = random_operands(rng, 1, 70, 256)
    odd = [np.lib.stride_tricks.as_strided(x, x.shape, (3 * x.itemsize, x.itemsize)) for x in operands.lhs]
    d = Output((1, 70))
    gemm_fp8_fp8_bf16_nt((odd[0], odd[1]), operands.rhs, d.d)
    check_accuracy(d.d, operands)
    d.check_untouched()


def test_repeated_inputs_may_share_memory(rng: Rng) -> None:
    """Inputs with a stride of 0, and one matrix as both operands."""
    operands = random_operands(rng, 128, 128, 256)
    ones = np.broadcast_to(np.float32(1), (128, 2))
    one = np.broadcast_to(np.float32(1), (1, 2))
    d = gemm_fp8_fp8_bf16_nt((operands.a, ones), (operands.a, one)).numpy()
    check_accuracy(d, Operands(operands.a, np.ones((128, 2), np.float32), operands.a, np.ones((1, 2), np.float32)))


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_allocated_result(rng: Rng, kind: str) -> None:
    """d=None returns a tensor of ours with the same bits."""
    if kind == "dense":
        operands = random_operands(rng, 33, 70, 272)
        d = Output((33, 70)).d
        gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d)
        ours = gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs)
        given = np.ones(d.shape[:-1], bool)
    else:
        call = make_call(rng, kind, [3, 0, 150], 70, 272)
        d = call.run()
        ours = call.function(call.operands.lhs, call.operands.rhs, None, **call.layout)
        given = call.owned()
    assert isinstance(ours, fp8gemm.Tensor)
    assert (ours.shape, ours.dtype.name, ours.device) == (d.shape, "bfloat16", (1, 0))
    np.testing.assert_array_equal(ours.numpy()[given], d[given])


@pytest.mark.parametrize("batch_invariant", [None, False, True])
def test_rows_are_independent(rng: Rng, batch_invariant: bool | None) -> None:
    """A row's bits depend neither on M nor on where it is."""
    operands = random_operands(rng, 270, 200, 400, binades=8)
    d = gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, batch_invariant=batch_invariant).numpy()
    for row in (0, 1, 17, 255, 256, 269):
        lhs = operands.a[row : row + 1], operands.sa[row : row + 1]
        one = gemm_fp8_fp8_bf16_nt(lhs, operands.rhs, batch_invariant=batch_invariant).numpy()
        np.testing.assert_array_equal(one[0], d[row])
    shuffled = rng.permutation(270)
    again = gemm_fp8_fp8_bf16_nt((operands.a[shuffled], operands.sa[shuffled]), operands.rhs).numpy()
    np.testing.assert_array_equal(again, d[shuffled])


def test_same_bits_each_time(rng: Rng) -> None:
    operands = random_operands(rng, 65, 500, 1040)
    first = gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs).numpy()
    for _ in range(5):
        np.testing.assert_array_equal(gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs).numpy(), first)


def test_tensors_as_frameworks_hold_them(rng: Rng) -> None:
    """Read-only inputs, and e4m3 and bf16 of ml_dtypes by their bits."""
    operands = random_operands(rng, 20, 30, 160)
    for array in operands:
        array.flags.writeable = False
    d = np.full((20, 30), POISON, np.uint16).view(ml_dtypes.bfloat16)
    gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d.view(np.uint16))
    check_accuracy(d.view(np.uint16), operands)


# ---- groups


class Call(NamedTuple):
    """A grouped call: its operands, the rows of each group, and what the library needs to know of them."""

    function: Callable[..., Any]
    operands: Operands
    layout: dict[str, Any]
    members: list[tuple[Any, ...]]  # the index of each group's rows in a and d

    def run(self, validate: bool = True, padding: int = 0, offset: int = 0) -> Array:
        shape = (*self.operands.a.shape[:-1], self.operands.b.shape[1])
        output = Output(shape, padding, offset)
        returned = self.function(
            self.operands.lhs, self.operands.rhs, output.d, **self.layout, validate=validate, batch_invariant=True
        )
        assert returned is output.d
        output.check_untouched(self.owned())
        d: Array = output.d
        return d

    def owned(self) -> Array:
        """Which rows belong to a group."""
        rows = np.zeros(self.operands.a.shape[:-1], bool)
        for where in self.members:
            rows[where] = True
        return rows

    def of_group(self, group: int) -> Operands:
        o, where = self.operands, self.members[group]
        return Operands(o.a[where], o.sa[where], o.b[group], o.sb[group])


def make_call(rng: Rng, kind: str, sizes: Sequence[int], n: int, k: int, spare: int = 0, **random: Any) -> Call:
    """`spare`: rows of A past the last group; masked: past the largest."""
    groups = len(sizes)
    if kind == "masked":
        top = max(sizes) + spare
        operands = random_operands(rng, top, n, k, (groups,), (groups,), **random)
        masked_m = np.array(sizes, np.int32)
        members = [(group, slice(size)) for group, size in enumerate(sizes)]
        return Call(m_grouped_gemm_fp8_fp8_bf16_nt_masked, operands, {"masked_m": masked_m}, members)
    firsts, rows = segments(sizes, ALIGNMENT if kind == "contiguous" else 1)
    if kind == "contiguous":
        layout = {"m_indices": np.concatenate([m_indices_of(sizes), np.full(spare, -1, np.int32)])}
    else:
        layout = {"group_ends": np.cumsum(sizes, dtype=np.int32)}
    operands = random_operands(rng, rows + spare, n, k, (), (groups,), **random)
    slices = [(slice(first, first + size),) for first, size in zip(firsts, sizes, strict=True)]
    return Call(m_grouped_gemm_fp8_fp8_bf16_nt_contiguous, operands, layout, slices)


def check_groups(call: Call, **how: Any) -> None:
    d = call.run(**how)
    for group, where in enumerate(call.members):
        if d[where].size:
            check_accuracy(d[where], call.of_group(group))


SIZES = {
    "one group": [77],
    "all empty": [0, 0, 0],
    "empty ends": [0, 5, 0, 130, 0],
    "single rows": [1] * 9,
    "one huge": [0, 1, 700, 0, 3],
    "aligned": [128, 256, 128],
    "past alignment": [129, 1, 127],
}


def test_masked_output_with_groups_inside_rows(rng: Rng) -> None:
    """d may lie as (Mmax, G, N) in memory: no element twice, whatever the order of the strides."""
    call = make_call(rng, "masked", [3, 0, 20], 48, 256)
    d = np.full((20, 3, 48), POISON, np.uint16).transpose(1, 0, 2)
    call.function(call.operands.lhs, call.operands.rhs, d, **call.layout)
    for group, where in enumerate(call.members):
        if d[where].size:
            check_accuracy(np.ascontiguousarray(d[where]), call.of_group(group))
    assert (d[~call.owned()] == POISON).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_groups(rng: Rng, kind: str, sizes: list[int]) -> None:
    check_groups(make_call(rng, kind, sizes, 130, 272))


@pytest.mark.parametrize("groups", [1, 2, 31, 32, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_many_groups(rng: Rng, kind: str, groups: int) -> None:
    sizes = [int(size) for size in rng.integers(0, 12, groups)]
    check_groups(make_call(rng, kind, sizes, 70, 144, spare=3), padding=2)


@settings(max_examples=60)
@given(st.data())
def test_any_groups(data: st.DataObject) -> None:
    draw = data.draw
    size = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 300))
    sizes = draw(st.lists(size, min_size=1, max_size=12))
    n, k, spare = draw(st.integers(1, 200)), 16 * draw(st.integers(0, 12)), draw(st.integers(0, 70))
    rng = fresh_rng(draw(st.integers(0, 2**32)))
    call = make_call(rng, draw(st.sampled_from(KINDS)), sizes, n, k, spare, positive=draw(st.booleans()))
    o, layouts = call.operands, [draw(st.sampled_from(SCALE_LAYOUTS)) for _ in range(2)]
    a, b = padded(o.a, draw(st.integers(0, 20)), 0x7F), padded(o.b, draw(st.integers(0, 20)), 0xFF)
    call = call._replace(operands=Operands(a, layouts[0](o.sa), b, layouts[1](o.sb)))
    check_groups(call, padding=draw(st.integers(0, 9)), offset=draw(st.integers(0, 7)), validate=draw(st.booleans()))


@pytest.mark.parametrize("kind", KINDS)
def test_group_rows_are_dense_rows(rng: Rng, kind: str) -> None:
    """Bit for bit what the dense GEMM makes of the same rows and weight."""
    call = make_call(rng, kind, [5, 0, 200, 1], 150, 400, binades=6)
    d = call.run()
    for group, where in enumerate(call.members):
        o = call.of_group(group)
        np.testing.assert_array_equal(gemm_fp8_fp8_bf16_nt(o.lhs, o.rhs).numpy(), d[where])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(rng: Rng, kind: str) -> None:
    call = make_call(rng, kind, [0, 0], 20, 64)
    assert call.run().size == 0


@pytest.mark.parametrize("expected_m", [0, 1, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_m_is_a_hint(rng: Rng, kind: str, expected_m: int) -> None:
    call = make_call(rng, kind, [5, 9], 40, 128)
    call.layout["expected_m"] = expected_m
    check_groups(call)


# ---- the edges of memory


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (70, 144), (129, 400)])
def test_nothing_beyond_the_operands_is_touched(rng: Rng, n: int, k: int, at_end: bool) -> None:
    """Every operand ends where no page follows, or begins where none precedes."""
    for m in (1, 7, 260):
        operands = Operands(*(fenced(x, at_end) for x in random_operands(rng, m, n, k)))
        d = fenced(np.full((m, n), POISON, np.uint16), at_end)
        in_child(lambda: check_accuracy(gemm_fp8_fp8_bf16_nt(operands.lhs, operands.rhs, d), operands))  # noqa: B023


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (70, 144), (129, 400)])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_touch_nothing_beyond_the_operands(rng: Rng, kind: str, n: int, k: int, at_end: bool) -> None:
    """The same of groups: the last one lies at the very end."""
    call = make_call(rng, kind, [5, 0, 128, 128], n, k)
    operands = Operands(*(fenced(x, at_end) for x in call.operands))
    call = call._replace(operands=operands, layout={name: fenced(x, at_end) for name, x in call.layout.items()})
    d = fenced(np.full((*operands.a.shape[:-1], n), POISON, np.uint16), at_end)

    def body() -> None:
        call.function(operands.lhs, operands.rhs, d, **call.layout)
        for group, where in enumerate(call.members):
            if d[where].size:
                check_accuracy(d[where], call.of_group(group))
        assert (d[~call.owned()] == POISON).all()

    in_child(body)


def nonsense(rng: Rng, count: int, limit: int) -> Array:
    """Indices of every wrong kind: negative, just outside, far outside, unordered."""
    choices = [-(2**31), -2, -1, 0, 1, limit - 1, limit, limit + 1, 2**31 - 1]
    return np.where(rng.random(count) < 0.5, rng.choice(choices, count), rng.integers(0, limit + 1, count)).astype(
        np.int32
    )


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_stays_inside_the_operands(rng: Rng, kind: str, at_end: bool) -> None:
    """Unchecked, indices may give meaningless rows, but never reach memory outside of the operands."""
    rows, groups = 256, 6
    call = make_call(rng, kind, [rows] if kind == "masked" else [rows // groups] * groups, 65, 144)
    m = rows if kind == "masked" else call.operands.a.shape[0]
    operands = random_operands(rng, m, 65, 144, (groups,) if kind == "masked" else (), (groups,))
    operands = Operands(*(fenced(x, at_end) for x in operands))
    (name,) = call.layout
    d = fenced(np.full((*operands.a.shape[:-1], 65), POISON, np.uint16), at_end)
    layouts = [
        nonsense(rng, m if name == "m_indices" else groups, groups if name == "m_indices" else m) for _ in range(20)
    ]

    def body() -> None:
        for layout in layouts:
            call.function(operands.lhs, operands.rhs, d, **{name: fenced(layout, at_end)})

    in_child(body)


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_leaves_neighbours_alone(rng: Rng, kind: str) -> None:
    """Nor the padding between the rows of d."""
    for _ in range(20):
        call = make_call(rng, kind, [3, 40, 128], 33, 32, spare=5)
        (name, layout), rows = next(iter(call.layout.items())), call.operands.a.shape[-2]
        layout[...] = nonsense(rng, len(layout), 3 if name == "m_indices" else rows)
        output = Output((*call.operands.a.shape[:-1], 33), padding=3)
        call.function(call.operands.lhs, call.operands.rhs, output.d, **call.layout)
        output.check_untouched()


NONSENSE: list[tuple[str, list[int], str]] = [
    # name, sizes or indices (rows of A: 256, groups: 3), what the message says
    ("group_ends", [-1, 5, 9], "-1 at 0; allowed are 0 to 256"),
    ("group_ends", [1, 5, 257], "257 at 2; allowed are 0 to 256"),
    ("group_ends", [5, 4, 9], "4 at 1 after 5; ends must not decrease"),
    ("group_ends", [1, 9, 5], "5 at 2 after 9; ends must not decrease"),
    ("masked_m", [0, -1, 0], "-1 at 1; allowed are 0 to 256"),
    ("masked_m", [0, 0, 257], "257 at 2; allowed are 0 to 256"),
    ("masked_m", [-(2**31), 0, 0], "-2147483648 at 0; allowed are 0 to 256"),
    ("m_indices", [0] * 128 + [3] * 128, "3 at 128; allowed are -1 to 2"),
    ("m_indices", [-2] + [-1] * 255, "-2 at 0; allowed are -1 to 2"),
    ("m_indices", [0] * 127 + [1] * 129, "1 begins at row 127; groups begin at multiples of 128"),
    ("m_indices", [0] * 60 + [-1] * 4 + [0] * 192, "0 begins at row 64; groups begin at multiples of 128"),
    ("m_indices", [-1] + [2] * 255, "2 begins at row 1; groups begin at multiples of 128"),
]


@pytest.mark.parametrize(("name", "values", "message"), NONSENSE, ids=[message for _, _, message in NONSENSE])
def test_validate_finds_nonsense(rng: Rng, name: str, values: list[int], message: str) -> None:
    groups = (3,) if name == "masked_m" else ()
    operands = random_operands(rng, 256, 20, 32, groups, (3,))
    output = Output((*operands.a.shape[:-1], 20))
    masked = name == "masked_m"
    function = m_grouped_gemm_fp8_fp8_bf16_nt_masked if masked else m_grouped_gemm_fp8_fp8_bf16_nt_contiguous
    layout: dict[str, Any] = {name: np.array(values, np.int32)}
    with pytest.raises(OperandError) as caught:
        function(operands.lhs, operands.rhs, output.d, **layout, validate=True)
    assert caught.value.argument == name
    assert str(caught.value) == f"{name}: {message}"
    output.check_untouched(np.zeros(output.d.shape[:-1], bool))


def test_validate_takes_what_is_right(rng: Rng) -> None:
    """Padding inside and between segments, groups in any order and more than once, a short last segment."""
    operands = random_operands(rng, 400, 20, 32, (), (3,))
    indices = np.concatenate([[2] * 100, [-1] * 28, [0] * 128, [-1] * 128, [2] * 10, [-1] * 6]).astype(np.int32)
    d = Output((400, 20))
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(operands.lhs, operands.rhs, d.d, indices, validate=True)
    d.check_untouched(indices >= 0)
    for first, last in ((0, 100), (128, 256), (384, 394)):
        group = indices[first]
        rows = slice(first, last)
        o = Operands(operands.a[rows], operands.sa[rows], operands.b[group], operands.sb[group])
        check_accuracy(d.d[rows], o)


# ---- helpers of layout


def test_col_major_tma_aligned_tensor(rng: Rng) -> None:
    for shape in ((1, 1), (37, 5), (128, 3), (4, 37, 5), (0, 3), (2, 0, 3)):
        scales = rng.standard_normal(shape).astype(np.float32)
        for given_scales in (scales, column_major(scales)):
            copy = fp8gemm.get_col_major_tma_aligned_tensor(given_scales)
            np.testing.assert_array_equal(copy.numpy(), scales)
            assert copy.strides[-2] == 1
            assert copy.strides[-1] == fp8gemm.get_tma_aligned_size(shape[-2], 4) == ceil_div(shape[-2], 4) * 4


def test_col_major_scales_serve_a_gemm(rng: Rng) -> None:
    operands = random_operands(rng, 37, 50, 592)
    sa = fp8gemm.get_col_major_tma_aligned_tensor(operands.sa)
    check_accuracy(gemm_fp8_fp8_bf16_nt((operands.a, sa), operands.rhs).numpy(), operands)


@pytest.mark.parametrize(
    ("scales", "error", "text"),
    [
        (np.zeros((3, 4), np.float64), fp8gemm.DTypeError, "float32"),
        (np.zeros(3, np.float32), fp8gemm.ShapeError, "rank 1; must be 2 or 3"),
        (None, fp8gemm.DTypeError, "NoneType is no tensor"),
    ],
)
def test_col_major_errors(scales: Any, error: type[OperandError], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        fp8gemm.get_col_major_tma_aligned_tensor(scales)
    assert caught.value.argument == "x"


def test_small_helpers() -> None:
    assert [fp8gemm.ceil_div(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [fp8gemm.get_tma_aligned_size(7, size) for size in (1, 2, 4, 8, 16)] == [16, 8, 8, 8, 7]
    assert fp8gemm.get_m_alignment_for_contiguous_layout() == ALIGNMENT
    with pytest.raises(OperandError, match="3; must divide 16") as caught:
        fp8gemm.get_tma_aligned_size(7, 3)
    assert caught.value.argument == "element_size"
