"""The contracts: what a stage, a criterion, a metric and an exporter are, and what each is given."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
