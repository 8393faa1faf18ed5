"""What `torch.compile` is to leave out of its graphs."""

from collections.abc import Callable
from functools import cache, wraps

import torch


def breaks_graph(what: str) -> Callable[[Callable], Callable]:
    """Makes a function run outside of the graph, once and with a reason, under torch.compile.

    `torch.compiler.disable` does that, but as a decorator it would import the whole compiler, and
    Triton, with this package. So it is applied when a compiler first asks.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=f"{what} runs outside of the graph")
                return _disabled(function)(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


@cache
def _disabled(function: Callable) -> Callable:
    return torch.compiler.disable(function)
