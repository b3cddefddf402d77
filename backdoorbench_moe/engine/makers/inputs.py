"""The weights of the runs that a run is made from, and the checks that they are the right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.engine.graph import BASE, BENIGN, PARENT, base_of, benign_experts, expert_of, needs
from backdoorbench_moe.engine.run import Run, check_data, check_model
from backdoorbench_moe.engine.train import load_weights
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import MODEL, RunFolder


def load_input(
    model: nn.Module, inputs: Mapping[str, Run], role: str, spec: RunSpec, images: ImageSet
) -> None:
    """Load the weights of one of the runs that a run is made from.

    Args:
        model: The model, whose weights are replaced.
        inputs: The runs, by role.
        role: The role of the one to load.
        spec: The spec of the run that is made.
        images: The data.

    Raises:
        RecordError: It is another run than the one that the spec needs, is not finished, was made from other data, or
            its weights do not fit the model.
    """
    tensors = read_input(inputs, role, spec, images)
    load_weights(model, tensors, str(inputs[role].folder.path / MODEL))


def read_input(inputs: Mapping[str, Run], role: str, spec: RunSpec, images: ImageSet) -> dict[str, Tensor]:
    """Read the weights of one of the runs that a run is made from; see `load_input`."""
    check_input(inputs[role], role, spec, images)
    tensors, _ = inputs[role].folder.load_tensors()
    check_model(inputs[role])
    return tensors


def check_input(run: Run, role: str, spec: RunSpec, images: ImageSet) -> None:
    """Check that a run is the finished run that another one needs in a role, made from the same data.

    Raises:
        RecordError: It is not.
    """
    folder, record = run.folder, run.record
    # The digest of a run that was made before files were hashed covers their paths. The second digest covers their
    # hashes.
    digests = (record.digest, pin_files(run.located_spec()).digest)
    if needs(spec)[role].digest not in digests or record.status != "finished":
        what = "is to be defended" if role == PARENT else f"is needed as the {role}"
        raise RecordError(f"run folder {folder.path}: is not the finished run that {what}")
    if tuple(record.data["classes"]) != images.classes:
        raise RecordError(
            f"run folder {folder.path}: expected a model for the {len(images.classes)} classes of the data, "
            f"got one for other classes ({len(record.data['classes'])})"
        )
    check_data(folder, record, images)


def check_expert(expert: Run, base: Run) -> None:
    """Check that an expert was tuned from the present model of a base, a poisoned one by way of a benign one.

    Raises:
        RecordError: The model of the base, or that of the benign expert, has changed since.
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


def check_parts(spec: RunSpec, find: Callable[[RunSpec], Run | None]) -> None:
    """Check those of a mixture's base and experts that exist, so that no other is made which could not be merged.

    Args:
        spec: The mixture.
        find: Returns the finished run of a spec; None if there is none.

    Raises:
        RecordError: A model file is missing, or an expert was tuned from another model of the base.
    """
    if (base := find(base_of(spec))) is None:
        return
    parts = [base]
    for e, benign in enumerate(benign_experts(spec)):
        # A poisoned expert that does not exist is made from the benign one.
        if (run := find(expert_of(spec, e)) or find(benign)) is not None:
            parts.append(run)
    for run in parts:
        if run.folder.model_sha256 is None:
            raise RecordError(f"model file {run.folder.path / MODEL}: not found")
        check_expert(run, base)


def check_unchanged(run: Run, role: str, source: Run) -> None:
    """Check that a run was made from the present model of another one.

    Args:
        run: The run.
        role: The role in which it was made from the other.
        source: The other run.

    Raises:
        RecordError: The model has changed since.
    """
    for each in run.record.inputs:
        known, now = each["sha256"], source.folder.model_sha256
        if each["role"] == role and None not in (known, now) and known != now:
            raise RecordError(
                f"run folder {source.folder.path}: its model has changed since {run.folder.path.name} was made from "
                "it; delete that run to make it again"
            )
