"""Elastic LoRA ranks: the search space, sampling, the elastic model, and the files that describe them."""
