"""Finds the start length and duration of a warmup with short runs of a script: ``ds-plugin tune-warmup``."""
