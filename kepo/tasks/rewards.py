"""Rewards of completions, with TRL's signature, so that functions written for it work unchanged:

    def concise(completions, **columns) -> list[float | None]:
        return [float(len(text) < 200) for text in completions]

A function is called with lists of one length, by keyword: ``prompts``, ``completions``,
``completion_ids`` (the tokens), and every field of the examples by its name, ``answer``,
``options``, ``images``, ``modality`` and the data's own columns among them. It returns a number for
each completion, or None where it does not apply. It may be ``async``. Of an example that came as
``messages``, prompt and completion are chats (``completion[0]["content"]``), else texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import numbers
import reprlib
import threading
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import dataclass
from typing import Any

from kepo.data.example import Example
from kepo.errors import KepoConfigError, KepoRewardError, first_line, line_of
from kepo.named import found
from kepo.sections import RewardConfig
from kepo.tasks.task import Messages, Task

BUILT_IN = ("accuracy", "format", "overlong")
"""The rewards that need no function of your own, by the names that configs, gates and logs use."""


@dataclass(frozen=True)
class OfOne:
    """A reward of one completion by itself, as those of `BUILT_IN` are."""

    of: Callable[[str, Example, list[int]], float]
    """A function of the completion's text, its example and its tokens."""


Reward = Callable[..., Any] | OfOne

_BOUND = frozenset(("self", "cls"))


def reward_name(reward: str | Reward) -> str:
    """Return what a reward is called in gates and logs: the last part of its name in a recipe."""
    if isinstance(reward, str):
        return reward.rpartition(":")[2]
    return getattr(reward, "__name__", None) or type(reward).__name__


def rewards_of(
    given: Sequence[str | Reward], task: Task, config: RewardConfig
) -> dict[str, Reward]:
    """Return the reward functions by their names; ``given`` are functions, or names of such.

    Raises KepoConfigError for one that cannot be found or called, and for a name that comes twice.
    """
    functions: dict[str, Reward] = {}
    for reward in given:
        name = reward_name(reward)
        if name in functions:
            raise KepoConfigError(f"rewards: two of them are called {name!r}; rename one")
        if isinstance(reward, str):
            reward = _built_in(reward, task, config) or found("rewards", reward)
        if not (callable(reward) or isinstance(reward, OfOne)):
            raise KepoConfigError(f"rewards: {name!r} is {reward!r}; expected a function")
        functions[name] = reward
    return functions


def _built_in(name: str, task: Task, config: RewardConfig) -> Reward | None:
    """Return the reward of that name among ours; None if the name is a function's, with a colon."""
    if ":" in name:
        return None
    if name not in BUILT_IN:
        raise KepoConfigError(
            f"rewards has {name!r}; expected one of {', '.join(BUILT_IN)}, or a function of your "
            "own as package.module:function or file.py:function"
        )
    ours: dict[str, Callable[[str, Example, list[int]], float]] = {
        "accuracy": lambda text, example, ids: float(bool(task.is_right(text, example))),
        "format": lambda text, example, ids: float(task.is_formatted(text)),
        "overlong": lambda text, example, ids: overlong_penalty(len(ids), config),
    }
    return OfOne(ours[name])


def overlong_penalty(length: int, config: RewardConfig) -> float:
    """Return DAPO's overlong penalty (Yu et al. 2025, eq. 13): 0 up to the buffer, then linear to
    -1."""
    if config.overlong_buffer == 0:
        return 0.0
    start = config.max_completion_length - config.overlong_buffer
    return -min(1.0, max(0, length - start) / config.overlong_buffer)


def scores(
    rewards: Mapping[str, Reward],
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
) -> list[dict[str, float | None]]:
    """Return the rewards of each completion, by name.

    A reward must be a Python, NumPy or torch number, which may be a bool, or an array or tensor
    without dimensions; None leaves the completion out. Raises KepoRewardError, which names the
    reward and the examples, if a function fails or returns anything else, NaN and infinities
    included: a made-up reward would silently train the model on nonsense.
    """
    if not texts:
        return []
    each = list(zip(texts, examples, completion_ids, strict=True))
    pending: dict[str, Any] = {}
    for name, reward in rewards.items():
        with _named_errors(name, examples):
            if isinstance(reward, OfOne):
                pending[name] = [reward.of(*one) for one in each]
            else:
                # Its own lists: what it does to them is not seen by the next, nor trained on.
                given = _arguments(task, examples, texts, completion_ids)
                pending[name] = reward(**_taken(reward, given))
    waiting = {name: value for name, value in pending.items() if inspect.isawaitable(value)}
    for name, result in _awaited(waiting).items():
        with _named_errors(name, examples):
            if isinstance(result, BaseException):
                raise result
        pending[name] = result
    columns = {name: _numbers(name, value, examples) for name, value in pending.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _arguments(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
) -> dict[str, list[Any]]:
    """Return the lists that a reward function is given, by name."""
    chats = [task.messages(example) for example in examples]
    prompts: list[Messages | str] = []
    completions: list[Messages | str] = []
    for example, chat, text in zip(examples, chats, texts, strict=True):
        as_chat = _came_as_chat(example)
        prompts.append(chat if as_chat else chat[-1]["content"])
        completions.append([{"role": "assistant", "content": text}] if as_chat else text)
    records = [example.fields() for example in examples]
    names = dict.fromkeys(name for record in records for name in record)
    columns: dict[str, list[Any]] = {n: [record.get(n) for record in records] for n in names}
    columns["prompts"], columns["completions"] = prompts, completions
    columns["completion_ids"] = [list(ids) for ids in completion_ids]
    return columns


def _taken(reward: Callable[..., Any], given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the lists that a function takes: all, unless it has no ``**columns``.

    A column called self goes to no object: its method has an argument of that name already.
    """
    try:
        parameters = inspect.signature(reward).parameters
    except ValueError:  # of a function in C
        return given
    needed = [
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if lacking := [name for name in needed if name not in given]:
        raise LookupError(
            f"it asks for {', '.join(lacking)}; the data have {', '.join(map(str, given))}"
        )
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return {name: values for name, values in given.items() if name not in _BOUND - {*needed}}
    return {name: values for name, values in given.items() if name in parameters}


def _came_as_chat(example: Example) -> bool:
    return any(isinstance(example.columns.get(name), list) for name in ("messages", "prompt"))


def _awaited(waiting: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the coroutines return, all of them at once; an exception in place of a result.

    They run in a loop of a thread of their own: a notebook has one that is running already.
    """
    if not waiting:
        return {}
    results: list[Any] = []

    async def one(work: Awaitable[Any]) -> Any:
        try:
            return await work
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return error

    async def together() -> None:
        results.extend(await asyncio.gather(*map(one, waiting.values())))

    thread = threading.Thread(target=_run, args=(together(),), name="rewards")
    thread.start()
    thread.join()
    return dict(zip(waiting, results, strict=True))


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@contextlib.contextmanager
def _named_errors(name: str, examples: Sequence[Example]) -> Iterator[None]:
    """Turn what the function raises, ``sys.exit`` too, into an error that names it."""
    try:
        yield
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        raise KepoRewardError(
            f"rewards: {name!r} raised {type(error).__name__} on {_named(examples)}: "
            f"{first_line(error)} ({line_of(error)})"
        ) from error


def _named(examples: Sequence[Example]) -> str:
    """Return the ids of examples, the first few of them."""
    ids = [repr(name) for name in dict.fromkeys(example.id for example in examples)]
    if len(ids) == 1:
        return f"example {ids[0]}"
    return f"examples {', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}"


def _numbers(name: str, values: Any, examples: Sequence[Example]) -> list[float | None]:
    """Return a function's rewards as numbers, one for each completion."""
    found = None
    if isinstance(values, Iterable) and not isinstance(values, Mapping | Set | str | bytes):
        with _named_errors(name, examples):  # it may be a generator; an array of no dimension
            found = None if getattr(values, "shape", None) == () else list(values)
    if found is None:
        raise KepoRewardError(
            f"rewards: {name!r} returned {_shown(values)}; expected a list of {len(examples)} "
            "numbers, one for each completion"
        )
    if len(found) != len(examples):
        raise KepoRewardError(
            f"rewards: {name!r} returned {len(found)} numbers; expected {len(examples)}, one for "
            "each completion"
        )
    checked: list[float | None] = []
    for value, example in zip(found, examples, strict=True):
        one = None if value is None else _number(value)
        if one is None and value is not None:
            raise KepoRewardError(
                f"rewards: {name!r} returned {_shown(value)} on example {example.id!r}; expected a "
                "finite number, or None to leave the completion out"
            )
        checked.append(one)
    return checked


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


def _number(value: Any) -> float | None:
    """Return ``value`` as a float; None if it is not one finite number."""
    if hasattr(value, "shape"):  # a NumPy or torch value
        if tuple(value.shape) != ():
            return None
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return None
    return number if math.isfinite(number) else None
