"""Scripts that users of other tools run on files that they trust.

The scripts need the packages of the other tool, but not this one. `python -m backdoorbench_moe.interop.export_script`
prints the script for pickled modules.
"""

from __future__ import annotations

from importlib import resources

MODULE_SCRIPT, RESULT_SCRIPT = "export_module.py", "make_attack_result.py"


def read_script(name: str) -> str:
    """Return the text of a script, `MODULE_SCRIPT` or `RESULT_SCRIPT`."""
    return resources.files(__package__).joinpath("scripts", f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(read_script(MODULE_SCRIPT), end="")
