"""A check that a run's `workspace_bytes` are enough for its heads: known from two config.json."""

from __future__ import annotations

import torch

from kepo.errors import KepoConfigError
from kepo.models.device import known_device
from kepo.models.reading import read_config
from kepo.sections import ModelsConfig, ObjectiveConfig
from kepo.words import is_address
from kepo_kernels.compute.chunks import chunking
from kepo_kernels.errors import KepoInputError


def check_workspace(models: ModelsConfig, config: ObjectiveConfig) -> None:
    """Raise KepoConfigError where the losses of a step would refuse ``workspace_bytes``.

    Reads nothing if it is None. A chunk has at least one row, so the number of rows does not
    matter.
    """
    if config.workspace_bytes is None:
        return
    student = read_config(models.student).get_text_config()
    sizes = dict(hidden_size=student.hidden_size, vocab=student.vocab_size, teacher_rows=0)
    asked = [sizes]
    for path in config.teacher_paths.values() if config.distils else ():
        if not is_address(path):  # of a server's law there is no product
            teacher = read_config(path).get_text_config()
            facts = dict(teacher_rows=1, teacher_vocab=teacher.vocab_size)
            asked.append(sizes | facts | dict(teacher_hidden_size=teacher.hidden_size))
    try:
        for one in asked:
            chunking(
                1,
                **one,
                dtype=getattr(torch, models.dtype),
                device=known_device(models.device).type,
                workspace_bytes=config.workspace_bytes,
                logits_dtype=config.logits_dtype and getattr(torch, config.logits_dtype),
                impl=config.impl,
                grad_tol=config.grad_tol,
            )
    except KepoInputError as error:
        raise KepoConfigError(f"workspace_bytes={config.workspace_bytes}: {error}") from error
