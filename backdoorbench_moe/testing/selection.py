"""Selection of the parts on which the conformance tests run."""

from __future__ import annotations

from collections.abc import Sequence

from backdoorbench_moe.data.text import TextDataset
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.moe.structure import takes_text
from backdoorbench_moe.plugins import normalize

# The models on which every defense is tested: one with experts, a dense one, and one without convolutions.
REFERENCE_MODELS = ("pmoe", "wide_resnet", "timm:test_vit")


def kind_of(fixture: str) -> str | None:
    """Return the kind in the name of a fixture, such as "trigger" of "trigger_name", or None."""
    kind = fixture.removesuffix("_name")
    return kind if kind != fixture and kind in REGISTRIES else None


class Selection:
    """The tested parts, and the parts that they are combined with in tests.

    A part is combined with built-in parts and parts of its package. Parts that cannot be imported and parts of other
    packages are not used, since they could cause a failure.

    Args:
        package: Name of the package whose parts are tested; all registered parts if None.
    """

    def __init__(self, package: str | None) -> None:
        self.package = None if package is None else normalize(package)

    def names(self, kind: str) -> list[str]:
        """Return the names of the tested parts of a kind."""
        return [name for name in REGISTRIES[kind].names() if self._tests(kind, name)]

    def parts(self) -> list[tuple[str, str]]:
        """Return kind and name of every tested part."""
        return [(kind, name) for kind in REGISTRIES for name in self.names(kind)]

    def partners(self, kind: str) -> list[str]:
        """Return the names of the parts of a kind with which parts of other kinds are combined."""
        registry = REGISTRIES[kind]
        builtin = [name for name in registry.names() if _builtin(kind, name)]
        third = [
            name
            for name in self.names(kind)
            if name not in builtin and has(kind, name, object) and not of_texts(kind, name)
        ]
        return [*(REFERENCE_MODELS if kind == "model" else builtin), *third]

    def rows(
        self,
        kinds: Sequence[str],
        interface: type | None = None,
        without: type | None = None,
        *,
        texts: bool = False,
    ) -> list[tuple[str, ...]]:
        """Return the names, or pairs of names, on which a test runs.

        Args:
            kinds: One kind, or two.
            interface: Return only classes with this interface; requires a single kind.
            without: Return only classes without this interface.
            texts: Return models and data sets of texts instead of those of images.
        """
        if len(kinds) == 1:
            [kind] = kinds
            return [
                (name,)
                for name in self.names(kind)
                if (kind not in ("model", "dataset") or of_texts(kind, name) == texts)
                and (interface is None or has(kind, name, interface))
                and (without is None or not has(kind, name, without))
            ]
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


def of_texts(kind: str, name: str) -> bool:
    """Return whether a part is a model or a data set of texts; False if it cannot be imported."""
    try:
        part = REGISTRIES[kind].lookup(name)
    except PluginError:
        return False
    return takes_text(part) if kind == "model" else issubclass(part, TextDataset)


def has(kind: str, name: str, interface: type) -> bool:
    """Return whether a part has an interface; False if it cannot be imported."""
    try:
        return issubclass(REGISTRIES[kind].lookup(name), interface)
    except PluginError:
        return False
