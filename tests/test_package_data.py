"""What is no Python file is installed, too."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

import backdoorbench_moe

PACKAGE = Path(backdoorbench_moe.__file__).parent


def test_every_file_of_the_package_is_named_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    patterns = config["options.package_data"]["backdoorbench_moe"].split()
    named = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    walked = os.walk(PACKAGE, followlinks=True)
    others = {Path(folder) / name for folder, _, names in walked for name in names}
    assert {file for file in others if file.suffix not in (".py", ".pyc")} == named
