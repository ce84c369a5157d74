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

_attached, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":  # of what is installed, which is that of the last tag (see pyproject.toml)
        from importlib.metadata import version

        return version("sparsekit-lightning")
    return _attached(name)
