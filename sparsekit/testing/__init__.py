"""The contracts as one-line tests of anybody's method, and a small real context to try one in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
