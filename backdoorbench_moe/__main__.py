"""`python -m backdoorbench_moe` is `bbmoe`."""

from backdoorbench_moe.cli import main

main()
