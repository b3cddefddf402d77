"""Load and check the weights of the runs that a run is built from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Material
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.graph import (
    BASE,
    BENIGN,
    PARENT,
    base_of,
    benign_experts,
    expert_of,
    expert_role,
    needs,
)
from backdoorbench_moe.engine.run import Run, check_data, check_model
from backdoorbench_moe.engine.training.checkpoint import load_weights
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.moe.merging import check_same_base, expert_names
from backdoorbench_moe.records import MODEL, RunFolder


def load_input(model: nn.Module, inputs: Mapping[str, Run], role: str, spec: RunSpec, data: Material) -> None:
    """Load the weights of one of the runs that a run is built from.

    Args:
        model: The model, whose weights are replaced.
        inputs: The runs, by role.
        role: Role of the run to load.
        spec: The spec of the run to build.
        data: The data.

    Raises:
        RecordError: The input is not the run that the spec needs, is not finished, has other data, or its weights do
            not match the model.
    """
    tensors = read_input(inputs, role, spec, data)
    load_weights(model, tensors, str(inputs[role].folder.path / MODEL))


def read_input(inputs: Mapping[str, Run], role: str, spec: RunSpec, data: Material) -> dict[str, Tensor]:
    """Read the weights of one of the runs that a run is built from; see `load_input`."""
    check_input(inputs[role], role, spec, data)
    tensors, _ = inputs[role].folder.load_tensors()
    check_model(inputs[role])
    return tensors


def check_input(run: Run, role: str, spec: RunSpec, data: Material) -> None:
    """Check that a run is finished, has the same data, and is the run that a spec needs in a role.

    Raises:
        RecordError: A check fails.
    """
    folder, record = run.folder, run.record
    # In old records without file hashes, the digest covers the paths of files. The second digest covers their hashes.
    digests = (record.digest, pin_files(run.located_spec()).digest)
    if needs(spec)[role].digest not in digests or record.status != "finished":
        what = "is to be defended" if role == PARENT else f"is needed as the {role}"
        raise RecordError(f"run folder {folder.path}: is not the finished run that {what}")
    if isinstance(data, ImageSet) and tuple(record.data["classes"]) != data.classes:
        raise RecordError(
            f"run folder {folder.path}: expected a model for the {len(data.classes)} classes of the data, "
            f"got one for other classes ({len(record.data['classes'])})"
        )
    check_data(folder, record, data)


def check_expert(expert: Run, base: Run) -> None:
    """Check that an expert was fine-tuned from the current model of a base, directly or from a benign expert.

    Raises:
        RecordError: The model of the base or of the benign expert has changed since.
    """
    check_unchanged(expert, BASE, base)
    for each in expert.record.inputs:
        if each["role"] != BENIGN:
            continue
        folder = RunFolder(expert.folder.path.parent / each["run"])
        if folder.exists and (record := folder.read()).status == "finished":
            benign = Run(folder, record)
            check_unchanged(expert, BENIGN, benign)
            check_expert(benign, base)


def check_parts(spec: RunSpec, find: Callable[[RunSpec], Run | None], data: Material) -> None:
    """Check the existing base and experts of a mixture, before missing experts are trained that could not be merged.

    Args:
        spec: The mixture.
        find: Returns the finished run of a spec; None if there is none.
        data: The data.

    Raises:
        RecordError: One of them is not the run that the mixture needs, has other data, was built from another model of
            the base, or has no model file.
    """
    if (base := find(base_of(spec))) is None:
        return
    tensors, names = read_input({BASE: base}, BASE, spec, data), expert_names(base.model())
    for e, benign in enumerate(benign_experts(spec)):
        poisoned = expert_of(spec, e)
        role, made = expert_role(e), spec
        if (run := find(poisoned)) is None:
            # A missing poisoned expert will be built from the benign one.
            role, made, run = BENIGN, poisoned, find(benign)
        if run is not None:
            check_expert(run, base)
            check_tuned(read_input({role: run}, role, made, data), tensors, names, run)


def check_tuned(
    expert: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Collection[str], run: Run
) -> None:
    """Check that all weights of an expert except the MLPs are those of the base.

    Args:
        expert: The weights of the expert.
        base: The weights of the base.
        names: Names of the weights of the MLPs; see `expert_names`.
        run: The expert, for the error message.

    Raises:
        RecordError: A weight differs.
    """
    try:
        check_same_base(base, expert, names, f"run folder {run.folder.path}")
    except ConfigError as error:
        raise RecordError(f"{error}; delete that folder to run it again") from error


def check_lineage(run: Run) -> None:
    """Check that the runs that a run was built from have not changed since. Only runs in the same folder are checked.

    Raises:
        RecordError: A run has changed.
    """
    for each in run.record.inputs:
        folder = RunFolder(run.folder.path.parent / each["run"])
        if folder.exists and (record := folder.read()).status == "finished":
            source = Run(folder, record)
            check_unchanged(run, each["role"], source)
            check_lineage(source)


def check_unchanged(run: Run, role: str, source: Run) -> None:
    """Check that a run was built from the current model of another run.

    Args:
        run: The run.
        role: The role of `source` for `run`.
        source: The other run.

    Raises:
        RecordError: The model of `source` has changed since.
    """
    for each in run.record.inputs:
        known, now = each["sha256"], source.folder.model_sha256
        if each["role"] == role and None not in (known, now) and known != now:
            raise RecordError(
                f"run folder {source.folder.path}: its model has changed since {run.folder.path.name} was made from "
                f"it; delete the folder {run.folder.path.name} to run it again"
            )
