"""Options: the keyword-only parameters of a part's constructor, and checks of config values against them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.plain import plain

REQUIRED = inspect.Parameter.empty


class NamesFile:
    """Marker in the annotation of an option whose value is the path of a file that the part reads."""


class NamesFolder(NamesFile):
    """Marker in the annotation of an option whose value is the path of a folder from which the part reads files.

    Attributes:
        counted: Suffixes of the files in the folder that are part of the spec.
    """

    counted: ClassVar[tuple[str, ...]] = (".json", ".safetensors")


class NamesTextFolder(NamesFolder):
    """`NamesFolder` for folders of texts or tokenizers, where files of weights are not part of the spec."""

    counted: ClassVar[tuple[str, ...]] = (".json", ".jsonl", ".jinja")


# Annotations of such options. The spec of a run contains the SHA-256 of the file, or of the counted files of the
# folder, which is checked when the part is used again.
FilePath = Annotated[str, NamesFile]
FolderPath = Annotated[str, NamesFolder]
TextFolderPath = Annotated[str, NamesTextFolder]
# Suffixes of the files that are part of the spec in some kind of folder.
COUNTED = frozenset(suffix for marker in (NamesFolder, NamesTextFolder) for suffix in marker.counted)


@dataclass(frozen=True)
class Option:
    """A keyword option.

    Args:
        name: Name of the parameter.
        annotation: Type of the parameter; `Any` if it has no annotation.
        default: Default value, or `REQUIRED`.
    """

    name: str
    annotation: Any
    default: Any

    def names_file(self, value: object) -> bool:
        """Return whether a value of this option is the path of a file or folder that the part reads.

        It is False for None, for a choice of a `Literal`, and if the annotation contains no `FilePath` or `FolderPath`.
        """
        choices = (self.annotation, *get_args(self.annotation))
        words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
        return (
            value is not None and value not in words and any(_marks(choice, NamesFile) for choice in choices)
        )

    @property
    def counted(self) -> tuple[str, ...]:
        """Suffixes of the files that are part of the spec if the option names a folder; empty otherwise."""
        for choice in (self.annotation, *get_args(self.annotation)):
            for marker in getattr(choice, "__metadata__", ()):
                if isinstance(marker, type) and issubclass(marker, NamesFolder):
                    return marker.counted
        return ()

    @property
    def type_name(self) -> str:
        """The type as shown to users: "file" or "folder" for paths, choices for a `Literal`, else as in source code."""
        return _type_name(self.annotation)


def _marks(annotation: Any, marker: type) -> bool:
    """Whether an annotation has a marker or a subclass of it."""
    return any(isinstance(m, type) and issubclass(m, marker) for m in getattr(annotation, "__metadata__", ()))


def list_options(target: Callable[..., object], *, given: Collection[str] = ()) -> dict[str, Option]:
    """Return the keyword-only parameters of a class or function by name, without those in `given`."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    return {name: option for name, option in _options_of(function).items() if name not in given}


@functools.cache
def _options_of(function: Callable[..., object]) -> dict[str, Option]:
    """All keyword-only parameters of a function. Cached, since a suite needs those of the same parts in every cell."""
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: Option(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def call_fault(part: type, *, given: Collection[str] = (), needs: Collection[str] = ()) -> str | None:
    """Return why a class cannot be built from keyword options, or None if it can.

    Args:
        part: The class.
        given: Keyword arguments that the caller passes besides the options.
        needs: Options that the class must have.
    """
    if inspect.isabstract(part):
        return (
            f"{part.__name__} does not define {', '.join(sorted(getattr(part, '__abstractmethods__', ())))}"
        )
    try:
        options = list_options(part, given=given)
    except Exception as error:  # Evaluating annotations runs third-party code, which may raise anything.
        return f"the options of {part.__name__} cannot be read: {type(error).__name__}: {error}"
    for option in options.values():
        if not _is_plain(option.annotation):
            kinds = "bool, int, float, str, Literal, tuples of these, FilePath, FolderPath, TextFolderPath and None"
            shown = "none" if option.annotation is Any else option.type_name
            return f"{part.__name__}: option {option.name!r}: expected an annotation of {kinds}, got {shown}"
    if lacking := sorted(set(needs) - options.keys()):
        return f"{part.__name__} does not take {', '.join(lacking)}; expected it as a keyword-only option"
    parameters = inspect.signature(part).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        p.name for p in parameters if p.kind in positional and p.default is REQUIRED and p.name not in given
    ]
    if needed:
        return f"{part.__name__} takes {', '.join(needed)} as positional arguments; expected keyword-only options"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        lacking = sorted(set(given) - {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY})
        if lacking:
            return f"{part.__name__} does not take {', '.join(lacking)}"
    return None


def _is_plain(annotation: Any) -> bool:
    """Whether values of this type can be written in a config file and checked by `convert`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return True
    if origin is Annotated:
        return _is_plain(arguments[0])
    if origin is tuple and any(_marks(item, NamesFile) for item in arguments):
        return False  # Files are hashed only if the option holds a single path.
    if origin in (Union, types.UnionType, tuple):
        return all(item is Ellipsis or _is_plain(item) for item in arguments)
    return annotation in (bool, int, float, str, type(None))


def check_options(
    target: Callable[..., object], options: Mapping[str, object], *, where: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Check the names and types of options against a signature, and convert the values (see `convert`).

    Args:
        target: Class or function that has the options.
        options: Values by name.
        where: The part, for error messages, such as "trigger 'warp'".
        given: Keyword-only parameters that are not options, because the caller passes them.

    Returns:
        The converted values by name. Options that are not in `options` are left out.

    Raises:
        UnknownNameError: There is no such option.
        ConfigError: A value is of the wrong type, or a required option is missing.
    """
    known = list_options(target, given=given)
    checked = {}
    for name, value in options.items():
        if name not in known:
            raise UnknownNameError(f"{where}: option", name, known)
        checked[name] = convert(value, known[name].annotation, f"{where}: {name}")
    for option in known.values():
        if option.default is REQUIRED and option.name not in checked:
            raise ConfigError(f"{where}: option {option.name!r} is required ({option.type_name})")
    return checked


def convert(value: object, annotation: Any, parameter: str) -> Any:
    """Convert a value to the type of an option, such as an int to a float, or a list to a tuple.

    First `plain.plain` converts values of other libraries, such as NumPy scalars, paths and `torch.device`, to plain
    Python values. A bool is never converted to a number.

    Args:
        value: The value.
        annotation: The type of the option.
        parameter: Name of the option in error messages.

    Raises:
        ConfigError: The value does not have the type.
    """
    value = plain(value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        return convert(value, arguments[0], parameter)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, parameter)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        if isinstance(value, str):
            raise UnknownNameError(parameter, value, [str(choice) for choice in arguments])
        raise ConfigError.expected(parameter, " or ".join(map(repr, arguments)), value)
    if origin is tuple:
        return _convert_tuple(value, arguments, parameter)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return _to_float(value, parameter)
    if isinstance(annotation, type) and isinstance(value, annotation):
        if isinstance(value, bool) and annotation is not bool:
            raise ConfigError.expected(parameter, _describe(annotation), value)
        return value
    if annotation is float and isinstance(value, str) and value.endswith("%"):
        # Only the rates of a spec, such as poison.rate, may be written as percentages.
        raise ConfigError.expected(parameter, f"a number, such as {_share(value)}", value)
    raise ConfigError.expected(parameter, _describe(annotation), value)


def _to_float(value: int, parameter: str) -> float:
    try:
        return float(value)
    except OverflowError:  # The integer is left out: Python refuses to print the longest ones.
        raise ConfigError(
            f"{parameter}: expected a number below 1.8e308, got an integer of {value.bit_length()} bits"
        ) from None


def _share(percentage: str) -> float:
    """Read "5%" as 0.05; 0.05 if there is no number before the sign."""
    try:
        return float(percentage[:-1]) / 100
    except ValueError:
        return 0.05


def _convert_union(value: object, annotation: Any, parameter: str) -> Any:
    near: UnknownNameError | None = None
    for choice in get_args(annotation):
        try:
            return convert(value, choice, parameter)
        except UnknownNameError as error:
            near = error
        except ConfigError:
            continue
    raise near or ConfigError.expected(parameter, _describe(annotation), value)


def convert_fields(spec: object, prefix: str, names: Iterable[str]) -> None:
    """Convert fields of a frozen dataclass to their annotated types, for its `__post_init__`.

    Args:
        spec: The dataclass instance.
        prefix: Prefix of the names of fields in error messages, such as "train.".
        names: Names of the fields to convert.

    Raises:
        ConfigError: A value does not have the type.
    """
    hints = field_types(type(spec))  # type: ignore[arg-type]
    for name in names:
        object.__setattr__(spec, name, convert(getattr(spec, name), hints[name], f"{prefix}{name}"))


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotated types of a class, by field. Cached, since resolving them takes most of the time to build a spec."""
    return get_type_hints(kind)


def _convert_tuple(value: object, arguments: tuple[Any, ...], parameter: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError.expected(parameter, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(item, arguments[0], parameter) for item in value)
    if len(value) != len(arguments):
        raise ConfigError.expected(parameter, f"a list of {len(arguments)} items", value)
    return tuple(convert(item, kind, parameter) for item, kind in zip(value, arguments, strict=True))


def _describe(annotation: Any) -> str:
    """Describe the values of a type in words, for error messages."""
    if get_origin(annotation) is Annotated:
        return (
            f"the path of a {'folder' if _marks(annotation, NamesFolder) else 'file'}"
            if _marks(annotation, NamesFile)
            else _describe(get_args(annotation)[0])
        )
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "none"}
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"a list ({', '.join('...' if a is Ellipsis else _describe(a) for a in get_args(annotation))})"
    return names.get(annotation, str(annotation))


def _type_name(annotation: Any) -> str:
    """A type as shown to users, see `Option.type_name`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is Annotated:
        if _marks(annotation, NamesFolder):
            return "folder"
        return "file" if _marks(annotation, NamesFile) else _type_name(arguments[0])
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and not arguments else str(annotation)
