"""The methods on a DeepSpeed engine. The names of DeepSpeed's that are private are all in `compat`."""
