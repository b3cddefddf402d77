"""The Python API: the commands of the command line as functions."""

from backdoorbench_moe.api.looks import analyze, audit, draw_figures, try_trigger
from backdoorbench_moe.api.modules import normalised
from backdoorbench_moe.api.runs import attack, defend, import_weights, load_run, make_spec
from backdoorbench_moe.api.suites import read_suite, run_suite

__all__ = [
    "analyze",
    "attack",
    "audit",
    "defend",
    "draw_figures",
    "import_weights",
    "load_run",
    "make_spec",
    "normalised",
    "read_suite",
    "run_suite",
    "try_trigger",
]
