"""The names the conformance tests run over."""

from __future__ import annotations

from collections.abc import Sequence

from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.plugins import normalize

# The models every defense is tried on: one with experts, a dense one, and one without convolutions.
REFERENCE_MODELS = ("pmoe", "wide_resnet", "timm:test_vit")


def kind_of(fixture: str) -> str | None:
    """The kind a fixture such as "trigger_name" names; None for one that names none."""
    kind = fixture.removesuffix("_name")
    return kind if kind != fixture and kind in REGISTRIES else None


class Selection:
    """What is tested, and with what: all that is registered, or what one package registers, with built-ins.

    Nothing is tested together with a part that does not load, nor with another package's: it is not to blame.
    """

    def __init__(self, package: str | None) -> None:
        self.package = None if package is None else normalize(package)

    def names(self, kind: str) -> list[str]:
        """The names that are tested."""
        return [name for name in REGISTRIES[kind].names() if self._tests(kind, name)]

    def parts(self) -> list[tuple[str, str]]:
        """Kind and name of every part that is tested."""
        return [(kind, name) for kind in REGISTRIES for name in self.names(kind)]

    def partners(self, kind: str) -> list[str]:
        """The names that something of another kind is tested with."""
        registry = REGISTRIES[kind]
        builtin = [name for name in registry.names() if _builtin(kind, name)]
        third = [name for name in self.names(kind) if name not in builtin and has(kind, name, object)]
        return [*(REFERENCE_MODELS if kind == "model" else builtin), *third]

    def rows(self, kinds: Sequence[str], interface: type | None = None) -> list[tuple[str, ...]]:
        """The names, or pairs of names of two kinds, that a test runs over.

        interface: take only classes that have it.
        """
        if len(kinds) == 1:
            [kind] = kinds
            return [(name,) for name in self.names(kind) if interface is None or has(kind, name, interface)]
        first, second = kinds
        tested = {kind: {*self.names(kind)} for kind in kinds}
        return [
            (one, other)
            for one in self.partners(first)
            for other in self.partners(second)
            if one in tested[first] or other in tested[second]
        ]

    def _tests(self, kind: str, name: str) -> bool:
        candidate = REGISTRIES[kind].candidate(name)
        return self.package is None or (
            candidate is not None and normalize(candidate.package) == self.package
        )


def _builtin(kind: str, name: str) -> bool:
    candidate = REGISTRIES[kind].candidate(name)
    return candidate is not None and candidate.builtin


def has(kind: str, name: str, interface: type) -> bool:
    """Whether the class called `name` has an interface; not where it does not load."""
    try:
        return issubclass(REGISTRIES[kind].lookup(name), interface)
    except PluginError:
        return False
