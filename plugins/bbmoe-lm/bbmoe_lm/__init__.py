"""Language models for backdoorbench_moe, the setting in which MoEvil was published."""
