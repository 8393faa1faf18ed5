"""The teachers of a run, and which of them teaches what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kepo.data.example import Example
from kepo.errors import KepoConfigError
from kepo.models.vlm import VLM
from kepo.sections import TeacherConfig
from kepo.teachers.served import ServedTeacher

Teacher = VLM | ServedTeacher


@dataclass(frozen=True)
class Several:
    """Teachers of which each has its own examples."""

    each: tuple[Teacher, ...]
    """In the order of ``teachers``; `place_of` gives an example's place in it."""


Teachers = Teacher | Several | None
"""None, one or several."""


def each_of(teachers: Teachers) -> tuple[Teacher, ...]:
    """Return the teachers, in their order."""
    if isinstance(teachers, Several):
        return teachers.each
    return () if teachers is None else (teachers,)


def place_of(example: Example, config: TeacherConfig) -> int:
    """Return the place of the example's teacher among all of them.

    Raises KepoConfigError for an example without one; those of a run have been left out before.
    """
    if not config.teachers:
        return 0
    if (place := teacher_place(example.fields(), config)) is None:
        raise KepoConfigError(
            f"teachers: none for the {config.teacher_column} of example {example.id!r}"
        )
    return place


def teacher_place(fields: Mapping[str, object], config: TeacherConfig) -> int | None:
    """Return the place that the ``teacher_column`` of a record names; None if none has it."""
    values = [value for value, _ in config.teachers]
    value = str(fields.get(config.teacher_column))
    return values.index(value) if value in values else None
