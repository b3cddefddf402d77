"""The command line: one file a command."""

from backdoorbench_moe.cli.app import bbmoe, main

__all__ = ["bbmoe", "main"]
