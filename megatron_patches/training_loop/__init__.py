"""The three methods in Megatron-LM's own training scripts, which stay as they are."""
