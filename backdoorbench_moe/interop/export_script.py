"""Scripts for users of other tools, which run them where they trust the files.

They need that tool's packages and not this one. `python -m backdoorbench_moe.interop.export_script` prints the one for
whole pickled modules.
"""

from __future__ import annotations

from importlib import resources

MODULE_SCRIPT, RESULT_SCRIPT = "export_module.py", "make_attack_result.py"


def read_script(name: str) -> str:
    """Return the text of a script, `MODULE_SCRIPT` or `RESULT_SCRIPT`."""
    return resources.files(__package__).joinpath("scripts", f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(read_script(MODULE_SCRIPT), end="")
