"""Run folders: the record, the model, the poison indices, the checkpoint and other files, all written atomically."""

from backdoorbench_moe.records.atomic import write_atomically
from backdoorbench_moe.records.folder import (
    CHECKPOINT,
    LOCK,
    MODEL,
    POISON,
    PROBE,
    RECORD,
    SCORES,
    TRIGGER,
    RunFolder,
)
from backdoorbench_moe.records.reading import parse_record
from backdoorbench_moe.records.record import (
    SCHEMA_VERSION,
    GateShares,
    Input,
    Judged,
    NamedFile,
    Record,
    Stage,
    TaskFacts,
)

__all__ = [
    "CHECKPOINT",
    "LOCK",
    "MODEL",
    "POISON",
    "PROBE",
    "RECORD",
    "SCHEMA_VERSION",
    "SCORES",
    "TRIGGER",
    "GateShares",
    "Input",
    "Judged",
    "NamedFile",
    "Record",
    "RunFolder",
    "Stage",
    "TaskFacts",
    "parse_record",
    "write_atomically",
]
