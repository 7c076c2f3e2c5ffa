"""What a recipe comes to on so many ranks, before the first step: ``ds-plugin plan``."""
