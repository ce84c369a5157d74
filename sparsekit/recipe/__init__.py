"""A recipe: the YAML file that says what to do, read and checked without torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
