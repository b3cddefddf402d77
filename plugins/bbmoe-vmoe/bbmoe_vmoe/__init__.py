"""Vision transformers with mixtures of experts for backdoorbench_moe: `vmoe` and `soft-moe`."""
