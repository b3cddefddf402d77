"""Language models: a dense Llama, and mixtures of Llamas that other programs read as Mixtral."""
