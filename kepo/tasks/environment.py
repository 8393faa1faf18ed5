"""Environment: the task that a run asks about its examples, and the rewards of what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kepo.data.example import Example
from kepo.errors import KepoConfigError, KepoError, first_line
from kepo.named import found
from kepo.sections import RewardConfig, TaskConfig
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.open_answer import OpenAnswer
from kepo.tasks.rewards import OfOne, Reward, reward_name, rewards_of, scores
from kepo.tasks.task import Task

TASKS = {"multiple_choice": MultipleChoice, "open_answer": OpenAnswer}


@dataclass(frozen=True)
class Environment:
    """What completions are asked for, and how they are judged."""

    task: Task
    rewards: dict[str, Reward]
    """The reward functions by their names in gates and logs."""
    code: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The user's own code that is named, by setting: file.py:name or package.module:name."""

    def scores(
        self,
        examples: Sequence[Example],
        texts: Sequence[str],
        completion_ids: Sequence[list[int]],
    ) -> list[dict[str, float | None]]:
        """Return the rewards of each completion by name (`kepo.tasks.rewards.scores`)."""
        return scores(self.rewards, self.task, examples, texts, completion_ids)


def environment_of(
    config: RewardConfig,
    task: Task | None = None,
    rewards: Sequence[str | Reward] | None = None,
) -> Environment:
    """Return the environment that the config names; ``task`` and ``rewards``, where given, take the
    places of what it names."""
    given = config.rewards if rewards is None else rewards
    named = {"task": [config.task] if task is None else [], "rewards": given}
    own = {
        setting: tuple(name for name in names if isinstance(name, str) and ":" in name)
        for setting, names in named.items()
    }
    task = task_of(config) if task is None else task
    return Environment(task, rewards_of(given, task, config), own)


C = TypeVar("C", bound=RewardConfig)


def with_own(
    config: C, task: Task | str | None, rewards: Sequence[str | Reward] | str | Reward | None
) -> tuple[C, Environment]:
    """Return the environment of a run with a task and rewards from Python, and the config that
    names them, with a weight of 1 each if it says nothing else. None means what the config names.
    """
    if task is not None:
        config = replace(config, task=type(task).__name__)
    rewards = listed(rewards)
    if isinstance(task, str):
        config, task = replace(config, task=task), None
    if not (task is None or isinstance(task, Task)):
        raise KepoConfigError(f"task={task!r}; expected an object of kepo.Task, or its name")
    if rewards is not None:
        names = tuple(map(reward_name, rewards))
        weights = config.reward_weights
        if set(weights) == {1.0}:
            weights = (1.0,) * len(names)
        config = replace(config, rewards=names, reward_weights=weights)
    return config, environment_of(config, task, rewards)


def listed(rewards: Sequence[str | Reward] | str | Reward | None) -> Sequence[str | Reward] | None:
    """Return rewards as a list, which may come as one alone, as TRL takes it."""
    return [rewards] if isinstance(rewards, str | OfOne) or callable(rewards) else rewards


def task_of(config: TaskConfig) -> Task:
    """Return the task that the config names, one of `TASKS` or a class of the user's."""
    settings: dict = dict(
        system_prompt=config.system_prompt, prompt_template=config.prompt_template
    )
    if config.task == "open_answer":
        settings["answer_tolerance"] = config.answer_tolerance
    if config.task in TASKS:
        return TASKS[config.task](**settings)
    if ":" not in config.task:
        raise KepoConfigError(
            f"task={config.task!r}; expected one of {', '.join(TASKS)}, or a class of your own as "
            "package.module:Class or file.py:Class"
        )
    kind = found("task", config.task)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise KepoConfigError(f"task={config.task!r} is {kind!r}; expected a class of kepo.Task")
    try:
        return kind(**settings)
    except KepoError:
        raise
    except Exception as error:  # of code that is not ours
        raise KepoConfigError(
            f"task={config.task!r}: making it with {' and '.join(settings)} raised "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
