"""The record of a run's questions: held against those that a resumed run meets."""

import json

import pytest

from kepo.data.run_data import RunData, write_record
from kepo.errors import KepoDataError

RECORD = {"train": {"ids_sha256": "x", "questions": 1}, "share": float("nan")}
DATA = RunData([], [], RECORD, "summary")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\0", b"{", b"[]", b"null", b'{"train": 1}', b'{"train": {}}', b"\xff\xfe"],
)
def test_an_empty_or_torn_record_is_said_and_written_anew(tmp_path, content, capsys):
    (tmp_path / "data.json").write_bytes(content)
    write_record(DATA, tmp_path, resuming=True)
    assert capsys.readouterr().out.count("data.json is damaged and written anew") == 1
    assert json.loads((tmp_path / "data.json").read_text()) == RECORD | {"share": None}
    write_record(DATA, tmp_path, resuming=True)
    assert capsys.readouterr().out == ""


def test_other_questions_are_refused_and_the_record_stays(tmp_path):
    write_record(DATA, tmp_path, resuming=False)
    before = (tmp_path / "data.json").read_bytes()
    other = RunData([], [], {"train": {"ids_sha256": "y", "questions": 2}}, "summary")
    with pytest.raises(KepoDataError, match=r"2 good questions, but .* begun with 1 .*remove it"):
        write_record(other, tmp_path, resuming=True)
    assert (tmp_path / "data.json").read_bytes() == before
    write_record(other, tmp_path, resuming=False)
    assert json.loads((tmp_path / "data.json").read_text())["train"]["questions"] == 2
