"""Backdoor attacks and defenses on Mixture-of-Experts image models.

The public interface, all imported on first use:

- `attack(...)` trains and evaluates backdoored models and returns their runs; `load_run(folder)` opens a run.
- `import_weights(file, model)` imports a model that was trained elsewhere as a run.
- `defend(run, defense)` applies a defense to the model of a finished run and returns the defended run.
- `analyze(run)` analyses how the model of a finished run routes, and which experts carry the backdoor.
- `draw_figures(analysis)` draws the results of `analyze`.
- `audit(model, images=...)` checks a module or a run of unknown origin for signs of a backdoor.
- `try_trigger(model, trigger)` tests how a run's model or a module reacts to a trigger it was not trained with.
- `defend` and `analyze` also take any `nn.Module`, with clean images; `normalised(module, mean, std)` adds
  normalisation to a module.
- `make_spec(...)` builds the frozen RunSpec of a run.
- `create_trigger`, `create_applicator`, `create_attack`, `create_splitter`, `create_gate`, `create_model`,
  `create_defense` and `create_dataset` build parts by name, including those of plug-ins; `list_triggers` etc. return
  the names.
- To write a new part, subclass `Trigger`, `Applicator`, `Attack`, `Splitter`, `Gate`, `RoutedModel`, `Defense` or
  `Dataset`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "analyze": "backdoorbench_moe.api",
    "attack": "backdoorbench_moe.api",
    "audit": "backdoorbench_moe.api",
    "defend": "backdoorbench_moe.api",
    "draw_figures": "backdoorbench_moe.api",
    "import_weights": "backdoorbench_moe.api",
    "run_suite": "backdoorbench_moe.api",
    "read_suite": "backdoorbench_moe.api",
    "SuiteResult": "backdoorbench_moe.api.suites",
    "load_run": "backdoorbench_moe.api",
    "make_spec": "backdoorbench_moe.api",
    "normalised": "backdoorbench_moe.api",
    "try_trigger": "backdoorbench_moe.api",
    "Run": "backdoorbench_moe.engine.run",
    "RunSpec": "backdoorbench_moe.config",
    "Observer": "backdoorbench_moe.engine.progress.observer",
    "LineObserver": "backdoorbench_moe.engine.progress.lines",
    "BbmoeError": "backdoorbench_moe.errors",
    "create_trigger": "backdoorbench_moe.triggers",
    "list_triggers": "backdoorbench_moe.triggers",
    "create_applicator": "backdoorbench_moe.applicators",
    "list_applicators": "backdoorbench_moe.applicators",
    "create_attack": "backdoorbench_moe.attacks",
    "list_attacks": "backdoorbench_moe.attacks",
    "create_splitter": "backdoorbench_moe.splitters",
    "list_splitters": "backdoorbench_moe.splitters",
    "create_gate": "backdoorbench_moe.gates",
    "list_gates": "backdoorbench_moe.gates",
    "create_model": "backdoorbench_moe.models",
    "list_models": "backdoorbench_moe.models",
    "create_defense": "backdoorbench_moe.defenses",
    "list_defenses": "backdoorbench_moe.defenses",
    "create_dataset": "backdoorbench_moe.data",
    "list_datasets": "backdoorbench_moe.data",
    "Trigger": "backdoorbench_moe.triggers.base",
    "Applicator": "backdoorbench_moe.applicators.base",
    "RoutedModel": "backdoorbench_moe.moe.routed",
    "RoutedOutput": "backdoorbench_moe.moe.routed",
    "Routing": "backdoorbench_moe.moe.routed",
    "Attack": "backdoorbench_moe.attacks.base",
    "PoisonPlan": "backdoorbench_moe.attacks.base",
    "TrainingControl": "backdoorbench_moe.attacks.training_control",
    "ControlledBatch": "backdoorbench_moe.attacks.training_control",
    "ExpertPoisoning": "backdoorbench_moe.attacks.expert_poisoning",
    "ExpertTask": "backdoorbench_moe.attacks.expert_poisoning",
    "Splitter": "backdoorbench_moe.splitters.base",
    "Gate": "backdoorbench_moe.gates.base",
    "Judgement": "backdoorbench_moe.defenses.judgement",
    "Defense": "backdoorbench_moe.defenses.base",
    "DefenseResult": "backdoorbench_moe.defenses.base",
    "DefenseTask": "backdoorbench_moe.defenses.base",
    "ChannelGroup": "backdoorbench_moe.moe.structure",
    "Dataset": "backdoorbench_moe.data.base",
    "ImageSet": "backdoorbench_moe.data.base",
    "Split": "backdoorbench_moe.data.base",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from backdoorbench_moe.api import (
        analyze,
        attack,
        audit,
        defend,
        draw_figures,
        import_weights,
        load_run,
        make_spec,
        normalised,
        read_suite,
        run_suite,
        try_trigger,
    )
    from backdoorbench_moe.api.suites import SuiteResult
    from backdoorbench_moe.applicators import create_applicator, list_applicators
    from backdoorbench_moe.applicators.base import Applicator
    from backdoorbench_moe.attacks import create_attack, list_attacks
    from backdoorbench_moe.attacks.base import Attack, PoisonPlan
    from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
    from backdoorbench_moe.attacks.training_control import ControlledBatch, TrainingControl
    from backdoorbench_moe.config import RunSpec
    from backdoorbench_moe.data import create_dataset, list_datasets
    from backdoorbench_moe.data.base import Dataset, ImageSet, Split
    from backdoorbench_moe.defenses import create_defense, list_defenses
    from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
    from backdoorbench_moe.defenses.judgement import Judgement
    from backdoorbench_moe.engine.progress.lines import LineObserver
    from backdoorbench_moe.engine.progress.observer import Observer
    from backdoorbench_moe.engine.run import Run
    from backdoorbench_moe.errors import BbmoeError
    from backdoorbench_moe.gates import create_gate, list_gates
    from backdoorbench_moe.gates.base import Gate
    from backdoorbench_moe.models import create_model, list_models
    from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
    from backdoorbench_moe.moe.structure import ChannelGroup
    from backdoorbench_moe.splitters import create_splitter, list_splitters
    from backdoorbench_moe.splitters.base import Splitter
    from backdoorbench_moe.triggers import create_trigger, list_triggers
    from backdoorbench_moe.triggers.base import Trigger


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
