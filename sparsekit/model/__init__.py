"""A model on disk and in memory: found, opened, divided into blocks, cut, written."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
