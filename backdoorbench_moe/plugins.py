"""Finding parts by entry point: one lookup for built-ins and for third-party packages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from backdoorbench_moe.errors import PluginError

PACKAGE = "backdoorbench_moe"
GROUPS = {kind: f"{PACKAGE}.{kind}s" for kind in ("trigger", "applicator", "model", "defense", "dataset")}


@dataclass(frozen=True)
class Candidate:
    """One entry point: a name some installed package offers. Nothing is imported until `load`."""

    kind: str
    name: str
    target: str
    package: str
    version: str

    @property
    def builtin(self) -> bool:
        """Whether this package itself offers it."""
        return self.target.startswith(f"{PACKAGE}.")

    @property
    def origin(self) -> str:
        """Package and version, for messages and lists."""
        return f"{self.package} {self.version}".strip()

    def load(self) -> object:
        """Import the target.

        Raises PluginError, naming the package and the reason, whatever the import raised: a
        third party's module may fail in any way, `sys.exit` included, and must not take anything else down.
        """
        try:
            return EntryPoint(self.name, self.target, GROUPS[self.kind]).load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.kind} {self.name!r} from {self.origin} does not load: {type(error).__name__}: {error}"
            ) from error


def discover(kind: str) -> list[Candidate]:
    """List what installed packages offer for `kind`, built-ins first, then by package and name."""
    found = {
        Candidate(
            kind=kind,
            name=point.name,
            target=point.value,
            package=point.dist.name if point.dist else "unknown",
            version=point.dist.version if point.dist else "",
        )
        for point in entry_points(group=GROUPS[kind])
    }
    return sorted(found, key=lambda c: (not c.builtin, c.package, c.name, c.target))
