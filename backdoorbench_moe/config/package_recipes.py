"""What the package of a third party's model says of a recipe, where the built-in one does not suit its models."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files

from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.plugins import RECIPE_GROUP, discover


def model_recipe(model: str, recipe: str) -> tuple[str, str] | None:
    """The YAML that the package offering a model has for a recipe, and package and version; None where it has none.

    An entry point names it: in the group `backdoorbench_moe.recipes`, "quick = package.folder:quick" is
    quick.yaml in that folder of the package. Only the package's top module is imported. Raises PluginError, naming
    the package, if the file cannot be read.
    """
    family = model.partition(":")[0]
    usable = (candidate for candidate in discover("model") if not candidate.mismatch)
    holder = next((candidate for candidate in usable if candidate.name == family), None)
    if holder is None or holder.builtin:
        return None
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
