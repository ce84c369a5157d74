"""What can be removed from a model (heads, channels, layers), how it runs without, and how it is cut."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
