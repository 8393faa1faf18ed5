"""Whether this environment has the TRL that the adapter is for."""

import pytest


def skip_without_trl() -> None:
    """Skip the calling module where TRL, or what it needs, cannot be imported."""
    pytest.importorskip("trl", exc_type=ImportError)
    pytest.importorskip("datasets")
    try:
        import trl
        from trl.trainer import distillation_trainer, grpo_trainer  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: how a lazy import fails
        pytest.skip(f"TRL cannot be imported: {error}", allow_module_level=True)
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"TRL is {trl.__version__}, not 1.16", allow_module_level=True)
