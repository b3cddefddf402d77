"""Language models as mixtures of experts, for backdoorbench_moe."""
