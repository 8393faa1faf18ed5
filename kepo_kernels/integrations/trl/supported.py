"""The releases of TRL whose private names this package knows."""

from importlib.metadata import PackageNotFoundError, version

from kepo_kernels.versions import release

OLDEST, FIRST_UNKNOWN = (1, 16), (1, 17)


def refuse_other_releases() -> None:
    """Raise ImportError if TRL is not installed, or is a release that was not read and tested."""
    wanted = "trl>={}.{},<{}.{}".format(*OLDEST, *FIRST_UNKNOWN)
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"kepo_kernels.integrations.trl needs {wanted}, and TRL is not installed: "
            f"pip install '{wanted}'"
        ) from None
    if not OLDEST <= release(found)[:2] < FIRST_UNKNOWN:
        raise ImportError(
            f"kepo_kernels.integrations.trl needs {wanted}, and trl {found} is installed: it rests "
            f"on methods that TRL does not promise to keep; pip install '{wanted}', or call the "
            "losses by kepo_kernels.FusedHead, which rests on none"
        )
