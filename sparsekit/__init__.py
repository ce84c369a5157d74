"""sparsekit: make large transformers sparse.

A scientist needs three names and no framework:

    stats = Stats.of(inputs)                              # (tokens, in)
    sparse = chain(wanda, partial(refit, damping=0.1))(weight, stats, NM(2, 4))

An engineer needs one, for a model in memory or for a recipe:

    result = prune(model, tokenizer, pattern="2:4", stages=["wanda", {"fista": {}}], calibration=texts)
    result = fit("recipes/llama3_2to4.yaml")

Everything here is loaded when first asked for, so that `import sparsekit` costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
