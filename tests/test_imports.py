"""No module of the package or of its plug-ins imports itself, directly or through others."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders that are searched for modules, and the name of the package or module at their top.
SOURCES = {
    ROOT: "backdoorbench_moe",
    ROOT / "plugins" / "bbmoe-vmoe": "bbmoe_vmoe",
    ROOT / "plugins" / "bbmoe-example": "bbmoe_example",
    ROOT / "plugins" / "bbmoe-lm": "bbmoe_lm",
}


def find_modules(folder: Path, top: str) -> dict[str, Path]:
    """Dotted names of the module or package `top` in `folder` and of everything in it, with their files."""
    files = sorted((folder / top).rglob("*.py")) or [folder / f"{top}.py"]
    names = {path: path.relative_to(folder).with_suffix("").parts for path in files}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def find_imports(source: str, known: Mapping[str, object] | set[str]) -> Iterator[str]:
    """The modules in `known` that a source imports, wherever in it: at the top, in functions, for type checkers.

    `from a import b` counts as the module a.b if there is one, otherwise as a. Importing a.b does not count as an
    import of a, although Python runs a's `__init__` first: `backdoorbench_moe/__init__.py` imports for its users, and
    on first use only, from modules that all lie below it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else str(node.module)


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One cycle of a graph, its first module again at the end; empty if there is none."""
    sorter = TopologicalSorter({name: targets - {name} for name, targets in graph.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def read_graph() -> dict[str, set[str]]:
    modules: dict[str, Path] = {}
    for folder, top in SOURCES.items():
        modules |= find_modules(folder, top)
    return {name: set(find_imports(path.read_text(), modules)) for name, path in modules.items()}


def test_no_module_imports_itself_through_others() -> None:
    graph = read_graph()
    assert {"backdoorbench_moe.api", "bbmoe_vmoe.models", "bbmoe_example"} <= graph.keys()
    assert "backdoorbench_moe.moe.layers" in graph["bbmoe_vmoe.models"]
    cycle = find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


SOURCE = """
import a.b
from a import c, nothing
from a.d import thing
import json
if TYPE_CHECKING:
    from e import Type
def later():
    from f import g
"""


def test_imports_are_found_wherever_they_are() -> None:
    known = {"a", "a.b", "a.c", "a.d", "e", "f", "f.g", "unused"}
    assert set(find_imports(SOURCE, known)) == {"a", "a.b", "a.c", "a.d", "e", "f.g"}


def test_a_cycle_is_found_and_named() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}
    cycle = find_cycle(graph)
    assert cycle[0] == cycle[-1] and set(cycle) == {"a", "b", "c"}
    assert not find_cycle({**graph, "c": {"d"}})
