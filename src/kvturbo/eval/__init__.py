"""Evaluation: retrieval, perplexity and divergence of a model on a packed cache."""
