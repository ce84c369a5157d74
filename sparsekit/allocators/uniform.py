"""Uniform allocation: every linear gets the same sparsity."""


def uniform(linears: dict[str, int], sparsity: float) -> dict[str, float]:
    """Give every linear the sparsity of the whole, as magnitude, SparseGPT and Wanda do.

    linears: name -> number of parameters. sparsity: the fraction removed.

    >>> uniform({"q_proj": 100, "k_proj": 50}, 0.5)
    {'q_proj': 0.5, 'k_proj': 0.5}
    """
    return dict.fromkeys(linears, sparsity)
