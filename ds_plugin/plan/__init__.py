"""What a recipe comes to on so many ranks, before the first step: ``python -m ds_plugin plan``."""
