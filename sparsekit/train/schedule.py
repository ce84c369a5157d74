"""How a learning rate goes."""

import math
from collections.abc import Callable


def cosine(steps: int, warmup: float = 0.0) -> Callable[[int], float]:
    """Step -> share of the peak: a linear rise over the share `warmup` of the steps, then a cosine to zero.

    >>> rate = cosine(4, warmup=0.5)
    >>> [round(rate(step), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rising = math.ceil(warmup * steps)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return rate
