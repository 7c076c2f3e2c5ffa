"""Small models trained over widths, depths and learning rates: whether CompleteP holds."""
