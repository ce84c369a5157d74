"""How often the likeliest next token is the right one: an example of a sparsekit metric."""

import torch

from sparsekit.contracts import Count, Figure, Measure, Preparation, Subject


def bits_per_token(preparation: Preparation, *, source: str = "python-docs", windows: Count = 8) -> Measure:
    """The mean of -log2 of the probability of the next token on a text; lower is better.

    source: a source of text or a local file. windows: of it

    Source: an example, no paper.
    """
    tokens = preparation.windows(source, count=windows)

    def measure(subject: Subject) -> dict[str, Figure]:
        each = (
            torch.stack([-log.double().mean() for log in subject.log_probabilities(tokens)]) / torch.tensor(2.0).log()
        )
        stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
        settings = {"source": source, "length": tokens.shape[1], "windows": len(tokens)}
        return {f"bits {source}": Figure(float(each.mean()), stderr, len(each), "windows", "lower", settings)}

    return measure
