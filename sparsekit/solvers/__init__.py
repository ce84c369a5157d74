"""Layer-wise solvers, one paper a file: `(weight, stats, pattern, *, options) -> weight`, pure, float32 in and out."""
