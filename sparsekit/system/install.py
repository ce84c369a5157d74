"""What else is installed beside sparsekit and would be in its way."""

from importlib import metadata

OURS = "sparsekit-lightning"  # our name on the package index; the import is called sparsekit


def other_sparsekit() -> str:
    """A sentence if somebody else's package of the import's name is installed too; empty if none is.

    On the package index the name `sparsekit` belongs to an unrelated package. Both write into one folder, so whichever
    was installed last is imported, in part with the other's files.
    """
    try:
        found = metadata.distribution("sparsekit")
    except metadata.PackageNotFoundError:
        return ""
    return (
        f"another package called sparsekit ({found.version}) is installed here, and it and {OURS} overwrite each "
        f"other's files: pip uninstall sparsekit {OURS}, then install {OURS} again, best into an environment of its own"
    )
