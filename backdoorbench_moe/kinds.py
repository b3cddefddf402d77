"""The kinds of parts that a run consists of. A new kind needs a row here and a module with its parts."""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "backdoorbench_moe"


@dataclass(frozen=True)
class Kind:
    """One kind of part.

    Args:
        name: Name of the kind, such as "trigger". Its functions are `create_<name>` and `list_<name>s`, and its
            entry-point group is `backdoorbench_moe.<name>s`.
        room: Module, inside the package, that contains its parts and their `registry`.
        base: Class that every part of the kind subclasses, as "module:Class".
        given: Keyword arguments that are set by the caller; users may not set them as options.
        needs: Options that every part of the kind must have.
        optional: Whether the part may be None in a spec.
        repeated: Whether a spec contains a list of such parts (under "<name>s") instead of at most one.
    """

    name: str
    room: str
    base: str
    given: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    optional: bool = False
    repeated: bool = False

    @property
    def group(self) -> str:
        """The entry-point group of the kind."""
        return f"{PACKAGE}.{self.name}s"

    @property
    def key(self) -> str:
        """The key of the part, or of the list of parts, in a spec."""
        return f"{self.name}s" if self.repeated else self.name


KINDS = {
    kind.name: kind
    for kind in (
        Kind("trigger", "triggers", f"{PACKAGE}.triggers.base:Trigger", needs=("seed",), optional=True),
        Kind("applicator", "applicators", f"{PACKAGE}.applicators.base:Applicator", optional=True),
        Kind("attack", "attacks", f"{PACKAGE}.attacks.base:Attack", given=("poison",), optional=True),
        Kind("splitter", "splitters", f"{PACKAGE}.splitters.base:Splitter", optional=True),
        Kind("gate", "gates", f"{PACKAGE}.gates.base:Gate", optional=True),
        Kind("model", "models", "torch.nn:Module", given=("num_classes", "image_size")),
        Kind("defense", "defenses", f"{PACKAGE}.defenses.base:Defense", repeated=True),
        Kind("dataset", "data", f"{PACKAGE}.data.base:DataSource"),
    )
}
