"""Sequence length warmup: train on short prefixes first (Li, Zhang, He, arXiv 2108.06084)."""
