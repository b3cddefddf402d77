"""The state of a learned trigger in a run folder."""

from __future__ import annotations

from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.records import TRIGGER, Record, RunFolder
from backdoorbench_moe.triggers.learned import LearnedTrigger

# Key of the hash of the state in the values of the trigger in a record.
STATE_SHA256 = "state_sha256"


def learned_trigger(stamper: Stamper | None) -> LearnedTrigger | None:
    """The trigger of a run if it is a learned one, otherwise None."""
    trigger = None if stamper is None else stamper.trigger
    return trigger if isinstance(trigger, LearnedTrigger) else None


def keep_trigger(stamper: Stamper | None, folder: RunFolder, record: Record) -> None:
    """Write the state of a learned trigger to a run folder, and its hash to the record. Do nothing if it has no state.

    The record is written immediately after the state, for a run that is killed before its first checkpoint.
    """
    trigger = learned_trigger(stamper)
    if trigger is None or not trigger.learned:
        return
    folder.save_trigger(trigger.state())
    record.parts["trigger"][STATE_SHA256] = folder.trigger_sha256
    folder.write(record)


def restore_trigger(stamper: Stamper | None, folder: RunFolder, record: Record) -> None:
    """Load the state of a learned trigger from a run folder. Do nothing for any other trigger.

    Raises:
        RecordError: The file is missing or damaged, or does not have the hash in the record.
    """
    if (trigger := learned_trigger(stamper)) is None:
        return
    file, tensors = folder.path / TRIGGER, folder.load_trigger()
    if folder.trigger_sha256 != record.parts.get("trigger", {}).get(STATE_SHA256):
        raise RecordError(f"trigger file {file}: is not the one that the run used")
    try:
        trigger.load_state(tensors)
    except ConfigError as error:
        raise RecordError(f"trigger file {file}: {error}") from error
