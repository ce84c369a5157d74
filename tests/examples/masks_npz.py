"""The masks as one NumPy file: an example of a sparsekit exporter."""

from pathlib import Path

import numpy

from sparsekit.contracts import Exporter, Finished


def masks_npz(*, compress: bool = True) -> Exporter:
    """Write masks.npz: for every pruned linear a boolean matrix (out, in), true where a weight is kept.

    compress: the file

    Source: an example, no paper.
    """

    def why_not(finished: Finished) -> str:
        return "" if finished.patterns else "no stage pruned weights, so there are no masks"

    def write(finished: Finished, target: Path) -> None:
        target.mkdir()
        save = numpy.savez_compressed if compress else numpy.savez
        save(target / "masks.npz", **{name: kept.numpy() for name, kept in finished.masks().items()})

    def differences(finished: Finished, target: Path) -> list[str]:
        stored, masks = numpy.load(target / "masks.npz"), finished.masks()
        names = sorted({*stored.files, *masks})
        return [
            f"masks.npz has another mask of {name}"
            for name in names
            if name not in stored.files or name not in masks or not numpy.array_equal(stored[name], masks[name].numpy())
        ]

    return Exporter(why_not, write, differences)
