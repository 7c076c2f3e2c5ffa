"""CompleteP (arXiv 2505.01618) without a framework: the rules, roles of parameters, param groups, folding."""
