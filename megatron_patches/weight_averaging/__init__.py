"""Weight averaging on megatron-core's optimizers."""
