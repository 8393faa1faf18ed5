"""The one exception of this package."""


class KepoInputError(ValueError):
    """A caller's mistake.

    The text names the function, the arguments, what came, what was expected and the remedy.
    """
