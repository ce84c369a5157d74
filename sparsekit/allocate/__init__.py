"""Allocation rules: `(linears: name -> parameters, sparsity, *, options) -> name -> sparsity`, the total conserved."""
