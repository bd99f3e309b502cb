"""Reads pickles of plain containers and scalars, as Flight Recorder writes them, and refuses every other pickle.

A pickle is a program. This one is checked before it is run: every opcode must be on a list of those that build None, bool, int,
float, str, bytes, tuple, list and dict. So no class, function or persistent object can be named, nothing is called, and sizes
that would exhaust memory (memo slots, strings longer than the file) are refused too. The check runs at the speed of `re`: runs of
opcodes of fixed size are matched at once. The unpickler behind it refuses globals once more.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

from actors.c4.flight_recorder.errors import RefusedPickleError, UnreadableDumpError

# Opcodes of fixed size. Memo slots below 2**22 (32 MiB of pointers) need no further look: the C unpickler allocates memory up to
# the largest slot that is named, so a 5-byte opcode could ask for 32 GiB.
_FIXED = re.compile(
    rb"(?:[()N\]}tlaesud012\x85\x86\x87\x88\x89\x94]"  # marks, containers, None, booleans, memoize
    rb"|[Kqh].|M..|J....|G.{8}|\x95.{8}|\x80[\x00-\x05]"
    rb"|[jr]..[\x00-\x3f]\x00"
    rb"|\x8a(?:\x00|\x01.|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9}))+",
    re.DOTALL,
)
# Opcodes followed by a length (bytes of the length) and that many bytes.
_SIZED = {0x58: 4, 0x8C: 1, 0x8D: 8, 0x54: 4, 0x55: 1, 0x42: 4, 0x43: 1, 0x8E: 8, 0x8A: 1, 0x8B: 4}
_LINES = frozenset(b"ILFVSpg")  # protocol 0: an argument up to the end of the line
_MAX_LINE_BYTES = 1 << 16
_MAX_LONG_BYTES = 64
_STOP = ord(".")
_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


def load_plain_pickle(data: bytes) -> Any:
    """The object in ``data``: None, bool, int, float, str, bytes, and tuples, lists and dicts of them.

    Raises:
        RefusedPickleError: an opcode could name or call something, or a size is out of proportion; nothing was executed.
        UnreadableDumpError: ``data`` ends early or is no pickle.
    """
    _check_opcodes(data)
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except RefusedPickleError:
        raise
    except (MemoryError, RecursionError) as error:
        raise RefusedPickleError("the pickle asks for more memory than there is") from error
    except Exception as error:  # the C unpickler raises nearly anything on damaged input
        raise UnreadableDumpError(f"the pickle is damaged ({type(error).__name__})") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise RefusedPickleError(f"the pickle names {module}.{name}; a dump holds plain containers and numbers only")

    def persistent_load(self, identifier: Any) -> Any:
        raise RefusedPickleError(
            "the pickle refers to persistent objects; a dump holds plain containers and numbers only"
        )


def _check_opcodes(data: bytes) -> None:
    position, end = 0, len(data)
    slots = max(1 << 16, end // 2)  # a memo slot costs at least two bytes in an honest pickle
    while position < end:
        run = _FIXED.match(data, position)
        if run is not None:
            position = run.end()
            if position >= end:
                break
        code = data[position]
        if code == _STOP:
            return
        if code in _SIZED:
            width = _SIZED[code]
            size = int.from_bytes(data[position + 1 : position + 1 + width], "little")
            if code in (0x8A, 0x8B) and size > _MAX_LONG_BYTES:
                raise RefusedPickleError("the pickle holds an integer of absurd length")
            position += 1 + width + size
        elif code in _LINES:
            line_end = data.find(b"\n", position, position + _MAX_LINE_BYTES)
            if line_end < 0:
                raise UnreadableDumpError("the pickle ends in the middle of a line")
            text = data[position + 1 : line_end]
            if code in b"pg" and (not text.isdigit() or int(text[:12]) > slots):
                raise RefusedPickleError("the pickle names a memo slot out of proportion to its size")
            if code in b"IL" and len(text) > 3 * _MAX_LONG_BYTES:
                raise RefusedPickleError("the pickle holds an integer of absurd length")
            position = line_end + 1
        elif code in b"rj":
            if int.from_bytes(data[position + 1 : position + 5], "little") > slots:
                raise RefusedPickleError("the pickle names a memo slot out of proportion to its size")
            position += 5
        elif _needs_more(code, end - position):
            break
        else:
            opcode = _NAMES.get(chr(code))
            if opcode is None:
                raise UnreadableDumpError("the file is no pickle")
            raise RefusedPickleError(f"the pickle uses {opcode}, which can run code; a dump holds plain data only")
    raise UnreadableDumpError("the file is truncated")


def _needs_more(code: int, left: int) -> bool:
    """An allowed opcode of fixed size whose argument lies beyond the end of the data."""
    sizes = {ord("K"): 2, ord("q"): 2, ord("h"): 2, ord("M"): 3, ord("J"): 5, ord("G"): 9, 0x95: 9, 0x80: 2}
    return left < sizes.get(code, 0)
