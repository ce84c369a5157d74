"""Allocation rules, one paper a file: how much of the sparsity each linear gets."""
