"""What holds while sparsekit works: the vector maths has begun, and libraries keep their notices to themselves."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import cache


@cache
def begin_vector_maths() -> None:
    """Call every function of the vector maths library once, on one number, on this thread.

    The library (SLEEF or MKL's, behind torch's cos, exp and the like) starts itself at its first call. Where that call
    is made by several threads at once, one of them may compute with tables that are not there yet: the first cosine of
    a process was wrong by 1.5e-4 in about one of 600 processes, so that rotary tables differed from those of the next
    forward pass. Whatever computes calls this first; it costs microseconds.
    """
    import torch

    one = torch.full((1,), 0.5)
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf, torch.log):
        function(one)
    torch.pow(one, 1.5)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """While this lasts sparsekit works: notices of libraries (tips, bars, devices found) stay off the terminal.

    Every way into sparsekit that computes goes through here: `fit`, `prune`, `evaluate`, `verify`, `bench`.
    """
    begin_vector_maths()
    import transformers.utils.logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*configure_optimizers.*")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
