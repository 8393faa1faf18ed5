"""Errors of the training loop; each is also a built-in error, so callers may catch either."""


class KepoError(Exception):
    """Base of every error that ``kepo`` raises on purpose."""


class KepoConfigError(KepoError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class KepoDataError(KepoError, ValueError):
    """A dataset on disk, or a record of it, is not what the loader needs."""


class KepoCheckpointError(KepoError, RuntimeError):
    """A model or training state on disk is missing, incomplete or of another kind."""


class KepoRewardError(KepoError, RuntimeError):
    """A reward function failed or returned something that is not a finite number."""
