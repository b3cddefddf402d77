"""Check the instructions of a pickle that `torch.load` reads with `weights_only`, without executing them.

`weights_only` calls only functions that it knows, but without limits: encoding a text in any encoding, or copying the
same list into a set again and again. Here the stack of the pickle is followed, so that each call is known before it is
made.
"""

from __future__ import annotations

import io
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backdoorbench_moe.engine.weights.refusals import first_line, refusal, short
from backdoorbench_moe.engine.weights.stand_ins import ENCODE, is_admitted

# A thousand tensors take about 100 KB and 20,000 pickle instructions.
LARGEST_HEADER = 16 << 20
MOST_OPCODES = 500_000
# Maximum number of values that calls copy. A pickle that uses each value once cannot have more.
MOST_COPIED = MOST_OPCODES
# The instructions that `weights_only` executes, without those of newer protocols than torch.save's default.
READ = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|NEWOBJ|REDUCE|BUILD|APPENDS?|SETITEMS?|TUPLE[123]?|EMPTY_(TUPLE|LIST|DICT)"
    r"|NONE|NEWFALSE|NEWTRUE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|SHORT_BINSTRING|BINPERSID|(LONG_)?BIN(GET|PUT)"
)
OPCODES = frozenset(code.name for code in pickletools.opcodes if READ.fullmatch(code.name))
# The instructions that make a number or None.
NUMBERS = frozenset(("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
PROTOCOL = 2
# Maximum number of values in all tuples that a pickle creates or uses again. Python hashes a tuple by hashing all its
# values again, which takes forever if each of many tuples contains the previous one twice.
MOST_IN_TUPLES = 10 * MOST_OPCODES
# Functions that copy their arguments; they may only be called with values whose length is known.
COPYING = frozenset(
    (
        "collections OrderedDict",
        "collections Counter",
        "torch Size",
        *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("complex", "set")),
    )
)
# The name that pickle writes in protocol 2 for bytes.
ENCODING = "latin1"
ADVICE = "save model.state_dict() with torch.save or safetensors"


def check_pickle(file: Path, content: io.BytesIO, largest: int | None) -> None:
    """List the instructions of a pickle without executing them.

    Args:
        file: The file, for error messages.
        content: The pickle; it is read up to its end.
        largest: The largest integer that is allowed; None for no limit.

    Raises:
        RecordError: The pickle is damaged, or has a name, instruction, call or number that is not allowed.
    """
    stack = _Stack()
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(content)):
            if number > MOST_OPCODES:
                raise refusal(file, f"its pickle has more than {MOST_OPCODES:,} instructions")
            if code.name not in OPCODES:
                raise refusal(file, _unknown(code))
            if code.name == "GLOBAL" and not is_admitted(str(argument)):
                raise refusal(
                    file, f"contains {short(str(argument).replace(' ', '.'))}, not only tensors; {ADVICE}"
                )
            if largest is not None and type(argument) is int and argument > largest:
                raise refusal(
                    file, f"contains the number {short(str(argument))}, which is larger than the file"
                )
            stack.follow(code, argument)
            if fault := stack.fault:
                raise refusal(file, f"{fault}; {ADVICE}")
    except (ValueError, EOFError, OverflowError) as error:
        raise refusal(file, f"is not a valid pickle: {first_line(error)}") from error


def _unknown(code: pickletools.OpcodeInfo) -> str:
    if code.proto > PROTOCOL:
        return (
            f"expected pickle protocol {PROTOCOL}, the default of torch.save, got an instruction of protocol "
            f"{code.proto} ({code.name}); {ADVICE}"
        )
    return f"contains an instruction that no state dict has ({code.name}); {ADVICE}"


@dataclass(eq=False, slots=True)
class _Value:
    """A value on the stack.

    Attributes:
        nested: 1, or for tuples the number of values in them, including tuples in them, plus 1.
        length: Number of items or characters; None if unknown.
        name: Module and name, if it is a global.
        text: The text, if it is one.
        items: The items, if it is a tuple.
    """

    nested: int = 1
    length: int | None = 0
    name: str = ""
    text: str | None = None
    items: tuple[_Value, ...] | None = None


# Stands for all numbers; a pickle may have hundreds of thousands.
NUMBER = _Value()


def _check_storage(reference: _Value) -> None:
    """Raise ValueError for a reference whose key is no text, as torch formats it, however large it is."""
    match reference.items:
        case (_, _, key, place, *_) if key.text is not None and place.text is not None:
            return
    raise ValueError("a reference to something else than a storage")


def _extended(container: _Value, count: int) -> _Value:
    """Add a number of items to a container, and return it."""
    if container is NUMBER:
        raise ValueError("an instruction adds items to a number")
    if container.length is not None:
        container.length += count
    return container


class _Stack:
    """Follows the stack of a pickle.

    Attributes:
        fault: Why the pickle must not be executed; "" if nothing was found so far.
    """

    def __init__(self) -> None:
        self._stack: list[_Value | None] = []  # None for marks
        self._memo: dict[Any, _Value] = {}
        self._in_tuples = self._copied = self._encoded = 0
        self.fault = ""

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow an instruction. Raises ValueError if it takes values that were not created."""
        if code.name in NUMBERS:
            self._stack.append(NUMBER)
            return
        match code.name:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = value = self._take_one()
                self._stack.append(value)
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError(f"an instruction takes the value {argument}, which is not there")
                self._push(self._memo[argument])
            case "MARK":
                self._stack.append(None)
            case _:
                taken = self._take([kind.name for kind in code.stack_before])
                for _ in code.stack_after:
                    self._push(self._made(code.name, argument, taken))

    def _made(self, code: str, argument: Any, taken: tuple[_Value, ...]) -> _Value:
        """Return the value that an instruction makes of the values that it takes."""
        match code:
            case "GLOBAL":
                return _Value(name=str(argument))
            case "BINUNICODE" | "SHORT_BINSTRING":
                return _Value(length=len(argument), text=argument)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
                nested = 1 + sum(value.nested for value in taken)
                return _Value(nested, len(taken), items=taken)
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                return _extended(taken[0], len(taken) - 1)
            case "REDUCE" | "NEWOBJ":
                return _Value(length=self._call(*taken))
            case "BUILD":
                self._set_attributes(taken[1])
                return taken[0]
            case "BINPERSID":
                _check_storage(taken[0])
                return _Value(length=None)
        return _Value()

    def _call(self, function: _Value, arguments: _Value) -> int | None:
        """Check a call, and return the length of its result; None if it is unknown."""
        name, items = function.name, arguments.items
        if not name or items is None:
            raise ValueError("a call of something else than a function, or with something else than a tuple")
        if name == ENCODE:
            return self._encode(items)
        if name in COPYING:
            for item in items:
                self._copy(name.replace(" ", "."), item)
            return sum(item.length or 0 for item in items)
        # Tensors can be as long as their shape says. Stand-ins keep nothing of their arguments.
        return None if name.startswith("torch") else 0

    def _set_attributes(self, state: _Value) -> None:
        """Count the attributes of an object: a dict, or a pair of two dicts."""
        pair = state.items if state.items is not None and len(state.items) == 2 else ()
        for part in (state, *pair):
            self._copy("attributes", part)

    def _copy(self, what: str, value: _Value) -> None:
        if value.length is None:
            self.fault = f"makes {what} of an object that may be of any size"
            return
        self._copied += value.length
        if self._copied > MOST_COPIED:
            self.fault = f"copies more than {MOST_COPIED:,} values"

    def _encode(self, arguments: tuple[_Value, ...]) -> int:
        """Check a call of `_codecs.encode`, with which pickle writes bytes: the text has a character for each byte."""
        match [argument.text for argument in arguments]:
            case [str(text), str(encoding)] if encoding == ENCODING:
                self._encoded += len(text)
                if self._encoded > LARGEST_HEADER:
                    self.fault = f"makes more than {LARGEST_HEADER:,} bytes"
                elif text and ord(max(text)) > 255:
                    self.fault = "contains bytes that are written with larger numbers than 255"
                return len(text)
        self.fault = "calls _codecs.encode with something else than a text and latin1"
        return 0

    def _push(self, value: _Value) -> None:
        self._stack.append(value)
        if value.nested > 1:
            self._in_tuples += value.nested
            if self._in_tuples > MOST_IN_TUPLES:
                self.fault = f"its tuples have more than {MOST_IN_TUPLES:,} values"

    def _take(self, kinds: list[str]) -> tuple[_Value, ...]:
        """Take values from the stack: all above the last mark if the kinds include one, and one for each other."""
        taken: list[_Value] = []
        if "mark" in kinds:
            while (value := self._pop()) is not None:
                taken.append(value)
            kinds = kinds[: kinds.index("mark")]
        taken += [self._take_one() for _ in kinds]
        return tuple(reversed(taken))

    def _take_one(self) -> _Value:
        value = self._pop()
        if value is None:
            raise ValueError("an instruction takes a value that is not there")
        return value

    def _pop(self) -> _Value | None:
        if not self._stack:
            raise ValueError("an instruction takes a value that is not there")
        return self._stack.pop()
