"""The folder of a run: what it holds, the proof of it, and how runs compare."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
