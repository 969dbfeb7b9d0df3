"""The one thing that we change in the assembler's code: the rhythm of the promotion's FMAs.

While a warp promotes, the tensor core works for another one, and both use the same register file. In tiles of 128 rows
and more the assembler has every other FMA keep the scale for the next one (`.reuse`: a read less), and the one between
give way to other warps (its yield hint). With three that keep it before one that gives way, 256 x 128 takes 1 to 1.5%
less time, 128 x 192 2 to 3.5%, 128 x 160 4%; 128 x 128 and 192 x 128 stay as they were (H200, 2026-11-28; the log in
native/README.md has more). Both are hints: no result depends on them.

Of an instruction's 128 bits on sm_90, 0 to 11 say what it does, 16 to 23 and 32 to 39 are the registers of the result
and of the second operand, 105 to 108 the cycles until the next one, 109 is 0 where it gives way, and 122 to 125 keep
its operands, one bit each (Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018,
chapter 2; nvdisasm's listings agree). With 12 cycles and more bit 109 means something else, and results were wrong:
what waits for more than one cycle is left alone.
"""

import struct
from collections.abc import Iterator

from .errors import CompileError

RHYTHM = 4  # FMAs up to the one that gives way
LEAST_ROWS = 128  # of a tile: with fewer nothing was gained
_FFMA = 0x223  # of four registers
_CYCLES, _CYCLE = 15 << 105 - 64, 1 << 105 - 64  # in the upper 64 bits
_KEEPS, _STAYS = 1 << 123 - 64, 1 << 109 - 64  # the second operand is kept; does not give way
_HEADER, _SECTION, _INSTRUCTION = struct.Struct("<4s36xQ10xHHH"), struct.Struct("<IIQQQQIIQQ"), struct.Struct("<QQ")


def pace(cubin: bytes) -> bytes:
    """The cubin with the promotion's FMAs in our rhythm. Raises CompileError if it is no whole 64-bit ELF file."""
    try:
        return _paced(cubin, list(texts(cubin)))
    except (struct.error, IndexError) as error:
        raise CompileError(f"a cubin of {len(cubin)} bytes is cut off: {error}") from error


def _paced(cubin: bytes, sections: list[tuple[int, int]]) -> bytes:
    code = bytearray(cubin)
    for offset, size in sections:
        words = [_INSTRUCTION.unpack_from(cubin, at) for at in range(offset, offset + size, _INSTRUCTION.size)]
        scales = [low >> 32 & 0xFF if low & 0xFFF == _FFMA else None for low, _ in words] + [None]
        count = 0  # of FMAs with this scale, one behind another
        for i, (low, high) in enumerate(words):
            count = count + 1 if i and scales[i] == scales[i - 1] else 1
            if scales[i] is None or high & _CYCLES != _CYCLE:
                continue
            if count % RHYTHM == 0:
                high &= ~(_KEEPS | _STAYS)
            else:
                same_again = scales[i] == scales[i + 1] and low >> 16 & 0xFF != scales[i]
                high |= _STAYS | (_KEEPS if same_again else 0)
            _INSTRUCTION.pack_into(code, offset + i * _INSTRUCTION.size, low, high)
    return bytes(code)


def texts(cubin: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of each section of code."""
    if len(cubin) < _HEADER.size or cubin[:5] != b"\x7fELF\x02":
        raise CompileError("a cubin is no 64-bit ELF file")
    _, table, size, count, names = _HEADER.unpack_from(cubin)
    sections = [_SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length, *_ in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            yield offset, length
