"""The averaging window in a checkpoint: its files, and how they are cut for another layout."""
