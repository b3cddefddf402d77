"""A reader of pickles that builds plain values only. Python's unpickler, which imports and calls, is not used.

A pickle is a program for a stack machine. This one supports the operations that build numbers, strings, bytes, lists,
tuples and dicts. Globals are looked up in a table from the caller and never imported.
"""

from __future__ import annotations

import codecs
import mmap
import pickletools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from backdoorbench_moe.errors import DataError

OPERATIONS = {ord(op.code): op.name for op in pickletools.opcodes}
HIGHEST_PROTOCOL = 5
LONGEST_NAME = 1000
LONGEST_NUMBER = 1000


@dataclass(frozen=True)
class Limits:
    """Limits for a pickle, which are checked before memory is allocated.

    Args:
        nbytes: Maximum length of the pickle in bytes, and maximum total size of bytes that calls return.
        operations: Maximum number of operations, and so of values.
        depth: Maximum nesting depth of containers.
    """

    nbytes: int = 64 << 20
    operations: int = 1_000_000
    depth: int = 20


@dataclass(frozen=True)
class Global:
    """Replacement for a global that a pickle may refer to.

    Args:
        name: Its name, such as "numpy.dtype".
        call: Returns the result of a call with the given arguments, and raises DataError for unexpected arguments; None
            if the global must not be called.
    """

    name: str
    call: Callable[[tuple[Any, ...]], object] | None = None


class Stateful(ABC):
    """A value whose content a pickle sets after creating it."""

    @abstractmethod
    def set_state(self, state: object) -> None:
        """Set the content. Raises DataError if it does not fit this value."""

    @property
    def complete(self) -> bool:
        """Whether the value has its content."""
        return True


Source = bytes | mmap.mmap
Globals = Mapping[tuple[str, str], Global]


def read_value(
    data: Source,
    admitted: Globals,
    *,
    start: int = 0,
    persistent: Callable[[object], object] | None = None,
    limits: Limits | None = None,
    only: str = "",
) -> tuple[object, int]:
    """Read the pickle that starts at a position of some bytes.

    Args:
        data: The bytes, or a mapped file.
        admitted: The allowed globals, by module and name.
        start: Position of the pickle.
        persistent: Checks a persistent id and returns its object; None to refuse such ids.
        limits: The limits; the defaults if None.
        only: The readable types, for messages about other globals, such as "numpy arrays".

    Returns:
        The value, which may contain itself (see `structure.check_structure`), and the position after the pickle.

    Raises:
        DataError: The pickle is damaged, exceeds a limit, or has an operation or global that is not allowed.
    """
    machine = _Machine(data, start, admitted, persistent, limits or Limits(), only)
    try:
        return machine.run(), machine.position
    except (ValueError, IndexError, struct.error, UnicodeError) as error:
        reason = "values are missing" if isinstance(error, IndexError) else str(error)
        raise DataError(f"damaged pickle at byte {machine.position}: {reason}") from None


@final
class _Machine:
    """The machine, with its stack, the marks that delimit items on it, and the memo of stored values."""

    def __init__(
        self,
        data: Source,
        start: int,
        admitted: Globals,
        persistent: Callable[[object], object] | None,
        limits: Limits,
        only: str,
    ) -> None:
        self.data, self.position, self.limits = data, start, limits
        self.end = min(len(data), start + limits.nbytes)
        self.admitted, self.persistent, self.only = admitted, persistent, only
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def run(self) -> object:
        for _ in range(self.limits.operations):
            if self.position >= self.end:
                raise DataError(self.ended("it ends before its last operation"))
            code = self.data[self.position]
            self.position += 1
            if code == STOP:
                if len(self.stack) != 1 or self.marks:
                    raise ValueError("values are left over")
                return self.stack[0]
            operation = TABLE.get(code)
            if operation is None:
                name = OPERATIONS.get(code)
                raise DataError(
                    f"refused operation {name}" if name else f"damaged pickle: no operation {code:#04x}"
                )
            operation(self)
        raise DataError(f"expected a pickle of at most {self.limits.operations} operations, got more")

    # Reading arguments of operations.

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > self.end:
            raise DataError(
                self.ended(f"at byte {self.position}, {count} bytes are announced that it does not have")
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def ended(self, fault: str) -> str:
        if self.end < len(self.data):
            return f"expected a pickle of at most {self.limits.nbytes} bytes, got more, or a damaged one: {fault}"
        return f"damaged pickle: {fault}"

    def counted(self, form: str) -> bytes:
        return self.take(self.number(form))

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.end)
        if end < 0:
            raise DataError(self.ended("a line does not end"))
        taken = self.data[self.position : end]
        self.position = end + 1
        return taken

    def short_line(self) -> bytes:
        line = self.line()
        if len(line) > LONGEST_NAME:
            raise DataError(
                f"expected a number or name of at most {LONGEST_NAME} characters, got {len(line)}"
            )
        return line

    # Executing operations.

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        if len(self.marks) >= self.limits.depth:
            raise DataError(f"expected containers nested at most {self.limits.depth} deep, got more")
        self.marks.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Return the values above the last mark."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        found = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return found

    def put(self, number: int) -> None:
        # A valid pickle cannot store more values than it has bytes.
        if not 0 <= number <= len(self.data):
            raise DataError(f"damaged pickle: stores an object under the number {number}")
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        if number not in self.memo:
            raise ValueError(f"it refers to a value {number} that it has not stored")
        self.push(self.memo[number])

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("it appends to something else than a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("it sets items of something else than a dict")
        if len(items) % 2:
            raise ValueError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise DataError("refused global whose name is no text")  # Its text could be of any length.
        found = self.admitted.get((module, name))
        if found is None:
            shown = f"{module}.{name}"[:LONGEST_NAME]
            raise DataError(f"refused global {shown}" + (f"; only {self.only} are read" if self.only else ""))
        self.push(found)

    def reduce(self) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, Global) or function.call is None:
            raise DataError(f"refused call of {_shown(function)}")
        if type(arguments) is not tuple:
            raise ValueError("arguments are no tuple")
        self.push(self.measured(function.call(arguments)))

    def measured(self, value: object) -> object:
        """Count the bytes that calls return; otherwise a few operations could request gigabytes."""
        self.made += len(value) if isinstance(value, bytes) else 0
        if self.made > self.limits.nbytes:
            raise DataError(f"expected values of at most {self.limits.nbytes} bytes, got more")
        return value

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Global):
            raise DataError("tries to change a global")
        if not isinstance(target, Stateful):
            raise DataError(f"refused operation BUILD on {_shown(target)}")
        target.set_state(state)

    def persistent_id(self) -> None:
        pid = self.stack.pop()
        if self.persistent is None:
            raise DataError("refused operation BINPERSID: a reference to something outside the pickle")
        self.push(self.persistent(pid))


def _shown(value: object) -> str:
    return value.name if isinstance(value, Global) else type(value).__name__


def _key(key: object) -> str | bytes | int:
    """Check a key of a dict. Nested keys are refused, since hashing is recursive."""
    if not isinstance(key, str | bytes | int):
        raise DataError(f"expected a dict with texts or numbers as keys, got {_shown(key)}")
    if not isinstance(key, int) and len(key) > LONGEST_NAME:
        raise DataError(f"expected keys of at most {LONGEST_NAME} characters, got {len(key)}")
    return key


def _protocol(machine: _Machine) -> None:
    if (protocol := machine.take(1)[0]) > HIGHEST_PROTOCOL:
        raise DataError(f"expected a pickle of protocol 0 to {HIGHEST_PROTOCOL}, got {protocol}")


def _integer(machine: _Machine) -> None:
    line = machine.short_line()
    machine.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else _decimal(line))


def _decimal(line: bytes) -> int:
    if len(line) > LONGEST_NUMBER:
        raise DataError(f"expected numbers of at most {LONGEST_NUMBER} digits, got {len(line)}")
    return int(line)


def _long(machine: _Machine, form: str) -> None:
    digits = machine.counted(form)
    if len(digits) > LONGEST_NUMBER:
        raise DataError(f"expected numbers of at most {LONGEST_NUMBER} bytes, got {len(digits)}")
    machine.push(int.from_bytes(digits, "little", signed=True))


def _quoted(machine: _Machine) -> None:
    """Read a quoted string of Python 2, which is bytes."""
    line = machine.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a text is not between quotes")
    machine.push(codecs.escape_decode(line[1:-1])[0])


def _dict(machine: _Machine) -> None:
    items = machine.items()
    machine.push({})
    machine.set_items(items)


def _text(machine: _Machine, form: str) -> None:
    machine.push(str(machine.counted(form), "utf-8", "surrogatepass"))


def _global_line(machine: _Machine) -> None:
    module = str(machine.short_line(), "utf-8")
    machine.find(module, str(machine.short_line(), "utf-8"))


def _nothing(machine: _Machine) -> None:
    """Skip the length of a frame, which is only useful for streams."""
    machine.take(8)


STOP = ord(".")
_OPERATIONS: dict[str, Callable[[_Machine], object]] = {
    "PROTO": _protocol,
    "FRAME": _nothing,
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "INT": _integer,
    "BININT": lambda m: m.push(m.number("<i")),
    "BININT1": lambda m: m.push(m.number("<B")),
    "BININT2": lambda m: m.push(m.number("<H")),
    "LONG": lambda m: m.push(_decimal(m.line().removesuffix(b"L"))),
    "LONG1": lambda m: _long(m, "<B"),
    "LONG4": lambda m: _long(m, "<i"),
    "FLOAT": lambda m: m.push(float(m.short_line())),
    "BINFLOAT": lambda m: m.push(m.number(">d")),
    "STRING": _quoted,
    "BINSTRING": lambda m: m.push(m.counted("<i")),
    "SHORT_BINSTRING": lambda m: m.push(m.counted("<B")),
    "BINBYTES": lambda m: m.push(m.counted("<I")),
    "SHORT_BINBYTES": lambda m: m.push(m.counted("<B")),
    "BINBYTES8": lambda m: m.push(m.counted("<Q")),
    "UNICODE": lambda m: m.push(str(m.line(), "raw-unicode-escape")),
    "BINUNICODE": lambda m: _text(m, "<I"),
    "SHORT_BINUNICODE": lambda m: _text(m, "<B"),
    "BINUNICODE8": lambda m: _text(m, "<Q"),
    "EMPTY_LIST": lambda m: m.push([]),
    "APPEND": lambda m: m.append(list(m.last(1))),
    "APPENDS": lambda m: m.append(m.items()),
    "LIST": lambda m: m.push(m.items()),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE": lambda m: m.push(tuple(m.items())),
    "TUPLE1": lambda m: m.push(m.last(1)),
    "TUPLE2": lambda m: m.push(m.last(2)),
    "TUPLE3": lambda m: m.push(m.last(3)),
    "EMPTY_DICT": lambda m: m.push({}),
    "DICT": _dict,
    "SETITEM": lambda m: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m: m.set_items(m.items()),
    "MARK": lambda m: m.mark(),
    "GET": lambda m: m.get(_decimal(m.short_line())),
    "BINGET": lambda m: m.get(m.number("<B")),
    "LONG_BINGET": lambda m: m.get(m.number("<I")),
    "PUT": lambda m: m.put(_decimal(m.short_line())),
    "BINPUT": lambda m: m.put(m.number("<B")),
    "LONG_BINPUT": lambda m: m.put(m.number("<I")),
    "MEMOIZE": lambda m: m.put(len(m.memo)),
    "GLOBAL": _global_line,
    "STACK_GLOBAL": lambda m: m.find(*m.last(2)),
    "REDUCE": lambda m: m.reduce(),
    "BUILD": lambda m: m.build(),
    "BINPERSID": lambda m: m.persistent_id(),
}
TABLE = {ord(op.code): _OPERATIONS[op.name] for op in pickletools.opcodes if op.name in _OPERATIONS}
