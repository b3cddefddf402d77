"""Language models: a dense Llama, and mixtures of Llamas, which can be exported as Mixtral."""
