"""Layer-wise solvers, one paper a file: `(weight, stats, pattern, *, options) -> weight`."""
