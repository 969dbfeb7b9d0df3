"""The rhythm of the promotion's FMAs: which bits change, and that nothing else does."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8gemm import CompileError, sass

KEEPS, STAYS, CYCLE = 1 << 123, 1 << 109, 1 << 105
FFMA = 0x223
Instruction = tuple[int, int, int]  # opcode, second operand's register, whatever else

instructions = st.lists(
    st.tuples(
        st.sampled_from([FFMA, FFMA, FFMA, 0x221, 0x984]),
        st.sampled_from([6, 7]),
        st.builds(
            lambda rest, result, cycles: rest & ~(15 * CYCLE | 0xFF << 16) | result << 16 | cycles * CYCLE,
            st.integers(0, 2**128 - 1),
            st.sampled_from([6, 7, 8]),
            st.sampled_from([1, 1, 1, 4, 12]),
        ),
    ),
    max_size=40,
)


def elf(*sections: tuple[bytes, bytes]) -> bytes:
    """A file of nothing but sections: (name, content)."""
    names = b"\0" + b"".join(name + b"\0" for name, _ in sections) + b".shstrtab\0"
    contents = [(b".shstrtab", names), *sections]
    body, table = b"", b""
    for name, content in contents:
        place = names.index(b"\0" + name + b"\0") + 1
        table += struct.pack("<IIQQQQIIQQ", place, 1, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0)
        body += content
    header = struct.pack("<4sB35xQ10xHHH", b"\x7fELF", 2, 64 + len(body), 64, len(contents), 0)
    return header + body + table


def encode(listing: list[Instruction]) -> bytes:
    fixed = 0xFFF | 0xFF << 32
    return b"".join(
        (rest & ~fixed | opcode | register << 32).to_bytes(16, "little") for opcode, register, rest in listing
    )


def decode(code: bytes) -> list[int]:
    return [int.from_bytes(code[i : i + 16], "little") for i in range(0, len(code), 16)]


def paced(listing: list[Instruction]) -> tuple[list[int], list[int]]:
    """The instructions before and after, between two sections that are no code."""
    code = encode(listing)
    file = elf(
        (b".nv.info", b"x" * 48), (b".text.fp8gemm_gemm", code), (b".rela.text.gemm", encode([(FFMA, 6, 0)] * 4))
    )
    at = file.index(code) if code else 0
    changed = sass.pace(file)
    assert changed[:at] == file[:at]
    assert changed[at + len(code) :] == file[at + len(code) :]
    return decode(code), decode(changed[at : at + len(code)])


@given(instructions)
def test_only_hints_of_fmas_change(listing: list[Instruction]) -> None:
    before, after = paced(listing)
    for (opcode, _, _), old, new in zip(listing, before, after, strict=True):
        assert (old ^ new) & ~(KEEPS | STAYS) == 0
        assert opcode == FFMA or old == new


@given(instructions)
def test_nothing_is_newly_kept_for_another_register(listing: list[Instruction]) -> None:
    """The next instruction would read the wrong one."""
    before, after = paced(listing)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if new & KEEPS and not old & KEEPS:
            assert listing[i + 1][:2] == (FFMA, listing[i][1])
            assert old >> 16 & 0xFF != listing[i][1], "its own result"


@given(instructions)
def test_once_is_enough(listing: list[Instruction]) -> None:
    file = elf((b".text.k", encode(listing)))
    assert sass.pace(sass.pace(file)) == sass.pace(file)


@given(instructions)
def test_what_waits_is_left_alone(listing: list[Instruction]) -> None:
    """After a wait of 12 cycles the yield hint's bit is no hint: nvdisasm knows no such FMA, and results were wrong."""
    before, after = paced(listing)
    for old, new in zip(before, after, strict=True):
        assert old == new or old >> 105 & 15 == 1


def test_the_rhythm() -> None:
    """Ten FMAs of one scale, two of another: each fourth gives way, and a scale is kept up to there, or to its last."""
    _, after = paced([(FFMA, 6, CYCLE)] * 10 + [(FFMA, 7, CYCLE)] * 2)
    assert "".join(".Y"[not word & STAYS] for word in after) == "...Y...Y...."
    assert "".join(".r"[bool(word & KEEPS)] for word in after) == "rrr.rrr.r.r."


def test_every_section_of_code() -> None:
    code = encode([(FFMA, 6, CYCLE)] * 4)
    file = elf((b".text.one", code), (b".nv.info", code), (b".text.two", code))
    places = [offset for offset, _ in sass.texts(file)]
    changed = [sass.pace(file)[offset : offset + len(code)] != code for offset in places]
    assert changed == [True, True]
    assert sass.pace(file).count(code) == 1


@pytest.mark.parametrize("file", [b"", b"MZ" + b"\0" * 80, b"\x7fELF\x01" + b"\0" * 80])
def test_not_a_cubin(file: bytes) -> None:
    with pytest.raises(CompileError, match="no 64-bit ELF file"):
        sass.pace(file)


def test_a_file_that_is_cut_off() -> None:
    file = elf((b".text.k", encode([(FFMA, 6, CYCLE)] * 4)))
    for size in range(64, len(file)):
        with pytest.raises(CompileError, match="cut off"):
            sass.pace(file[:size])
