"""Sparse base models: pruning, and how many weights of a model are zero."""
