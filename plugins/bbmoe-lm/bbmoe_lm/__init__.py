"""Language models for backdoorbench_moe: MoEvil where it was found."""
