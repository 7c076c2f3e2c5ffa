"""The weighted mean of checkpoints on disk."""
