"""How good a model is: generation with the training prompts, compared with the expected responses."""
