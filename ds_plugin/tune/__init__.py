"""Finds the start length and duration of a warmup with short runs of a script: ``python -m ds_plugin tune-warmup``."""
