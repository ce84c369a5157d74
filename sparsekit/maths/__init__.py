"""Pure tensors: patterns, statistics, grids and the small problems that methods share. Nothing here knows a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
