"""The only exception class of this package."""


class KepoInputError(ValueError):
    """An argument that a public function cannot accept.

    The message names the function and the arguments, and says what was given, what was expected
    and what to do instead.
    """
