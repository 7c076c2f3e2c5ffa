"""Stands where a Megatron-LM checkout has its training code; ``megatron.core`` beside it is the installed one."""
