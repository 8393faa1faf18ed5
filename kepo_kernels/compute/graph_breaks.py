"""A decorator that keeps functions out of the graphs of `torch.compile`."""

from collections.abc import Callable
from functools import cache, wraps

import torch


def breaks_graph(what: str) -> Callable[[Callable], Callable]:
    """Make a function run outside of torch.compile's graph, with one graph break that says why.

    `torch.compiler.disable` does that, but as a decorator it would import the whole compiler, and
    Triton, with this package. So it is applied when a compiler first traces the call.
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
