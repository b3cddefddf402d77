"""Run specs: frozen dataclasses, the YAML files and recipes that they are built from, and merging of settings.

Later layers win: defaults < recipe < YAML file < flags < `--set`. Nothing here imports torch.
"""

from backdoorbench_moe.config.build import build_spec, load_recipe
from backdoorbench_moe.config.merge import Values, merge
from backdoorbench_moe.config.mixture import MixtureSpec
from backdoorbench_moe.config.poison import PoisonSpec, class_number
from backdoorbench_moe.config.reading import spec_from_dict
from backdoorbench_moe.config.shorthand import PARTS, SURROGATE, normalise
from backdoorbench_moe.config.spec import (
    DATASET_NOT_IN_DIGEST,
    IMPORTED,
    SAME,
    TWIN,
    PartSpec,
    RunSpec,
)
from backdoorbench_moe.config.train import TrainSpec
from backdoorbench_moe.config.yaml_files import chain_options, chain_settings, load_yaml, parse_setting

__all__ = [
    "DATASET_NOT_IN_DIGEST",
    "IMPORTED",
    "PARTS",
    "SAME",
    "SURROGATE",
    "TWIN",
    "MixtureSpec",
    "PartSpec",
    "PoisonSpec",
    "RunSpec",
    "TrainSpec",
    "Values",
    "build_spec",
    "chain_options",
    "chain_settings",
    "class_number",
    "load_recipe",
    "load_yaml",
    "merge",
    "normalise",
    "parse_setting",
    "spec_from_dict",
]
