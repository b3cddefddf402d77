"""Recipes that the package of a third-party model provides in addition to the built-in ones."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import entry_points
from importlib.resources import files

from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.plugins import RECIPE_GROUP, discover


def model_recipe(model: str, recipe: str) -> tuple[str, str] | None:
    """Return the recipe of the package that provides a model.

    The package declares the file as an entry point: in the group `backdoorbench_moe.recipes`, the entry point
    "quick = package.folder:quick" refers to quick.yaml in that folder of the package. Only the top-level module of
    the package is imported.

    Args:
        model: Name of the model.
        recipe: Name of the recipe, such as "quick".

    Returns:
        The text of the YAML file, and the name and version of the package; None if the package has no such recipe.

    Raises:
        PluginError: The file cannot be read.
    """
    family = model.partition(":")[0]
    if family in _built_in_models():
        return None
    try:
        return _find(family, recipe, tuple(sys.path))
    except LookupError:
        return None


@functools.cache
def _find(family: str, recipe: str, path: tuple[str, ...]) -> tuple[str, str] | None:
    """Find a recipe in the packages on a path.

    Raises:
        LookupError: No package provides the model. This is not cached, since one may be installed later.
    """
    holder = next((candidate for candidate in discover("model", family) if not candidate.mismatch), None)
    if holder is None:
        raise LookupError
    points = entry_points(group=RECIPE_GROUP, name=recipe)
    point = next((point for point in points if point.dist and point.dist.name == holder.package), None)
    if point is None:
        return None
    package, *folders = point.module.split(".")
    try:
        file = files(package).joinpath(*folders, f"{point.attr}.yaml")
        return file.read_text(encoding="utf-8"), holder.origin
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"recipe {recipe!r} from {holder.origin} cannot be read: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def _built_in_models() -> frozenset[str]:
    """Names of the built-in models; cached, since a suite looks up the recipe of each of its hundreds of cells."""
    return frozenset(candidate.name for candidate in discover("model") if candidate.builtin)
