"""One walk over the blocks of a model: activations are carried on, each block is solved and committed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
