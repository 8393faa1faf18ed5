"""A tiny run with a teacher, hints and evaluations, and the page about it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ended(made, tmp_path_factory):
    """The folder of a run that did its three steps; some answers are right, some hints accepted."""
    for name in ("transformers", "jinja2", "plotly"):
        pytest.importorskip(name)
    from small import config_of, rigged

    from kepo.loop import train

    config = config_of(
        made,
        tmp_path_factory.mktemp("ended") / "run",
        eval_data=str(made / "data" / "test"),
        steps=3,
        hint_trigger="always",
        lr=1e-6,
        seed=2,  # one in which a hint is accepted
        eval_every=1,
        log_completions_every=1,
    )
    with rigged():
        assert train(config).exit_code == 0
    return Path(config.run_dir)


@pytest.fixture(scope="session")
def page_file(ended, tmp_path_factory):
    from kepo.report.command import ReportFlags, write_report

    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([ended], ReportFlags(out=str(out)))
