"""The releases of verl whose private names this package knows."""

from importlib.metadata import PackageNotFoundError, version

from kepo_kernels.versions import release

OLDEST, FIRST_UNKNOWN = (0, 9, 1), (0, 10)
WANTED = "verl>=0.9.1,<0.10"


def refuse_unknown_releases() -> None:
    """Raise ImportError if verl is not installed, or is a release that was not read and tested.

    It does not import verl, which may be importing this package.
    """
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise ImportError(
            f"kepo_kernels.integrations.verl needs {WANTED}, and verl is not installed: "
            f"pip install '{WANTED}'"
        ) from None
    if not OLDEST <= release(found) < FIRST_UNKNOWN:
        raise ImportError(
            f"kepo_kernels.integrations.verl needs {WANTED}, and verl {found} is installed: it "
            "rests on functions and classes that verl does not promise to keep; "
            f"pip install '{WANTED}'"
        )
