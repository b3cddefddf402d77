"""The command-line interface: one file per command."""

from backdoorbench_moe.cli.app import bbmoe, main

__all__ = ["bbmoe", "main"]
