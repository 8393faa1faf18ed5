"""What a resumed run must find again: every difference is seen, and named."""

import time
from dataclasses import asdict, replace

import pytest
from toy import example

from kepo.config import Config
from kepo.data import identity
from kepo.data.identity import (
    changed_questions,
    inputs_of,
    model_files,
    model_identity,
    records_identity,
    sha256,
)
from kepo.errors import KepoCheckpointError, KepoDataError

QUESTIONS = [example(name) for name in ("q1", "q2", "q3")]
PICTURES = {path: path.name for e in QUESTIONS for path in e.images}
CONFIG = Config()


def state_of(inputs, config=CONFIG):
    return {"config": asdict(config), "inputs": inputs}


def compare(before, now, examples, config=CONFIG, was=CONFIG):
    return changed_questions(config, state_of(before, was), now, examples)


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "B"},
        {"question": "another?"},
        {"options": ("no", "yes")},
        {"rationale": "because"},
        {"modality": "MR"},
        {"question_type": "y"},
        {"id": "other"},
    ],
)
def test_a_record_that_changed_is_named(change):
    now = [QUESTIONS[0], replace(QUESTIONS[1], **change), QUESTIONS[2]]
    before = {"train_data": records_identity(QUESTIONS, PICTURES)}
    after = {"train_data": records_identity(now, PICTURES)}
    name = now[1].id
    message = (
        r"train_data has a question that is new, or whose text, answer or image is not as it was "
        rf"when the run began: {name!r}\."
    )
    with pytest.raises(KepoDataError, match=message):
        compare(before, after, {"train_data": now})
    assert compare(before, before, {"train_data": QUESTIONS}) == set()


def test_a_picture_that_changed_changes_its_record(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"four")
    shown = [replace(QUESTIONS[0], images=(picture,))]
    # By content where the images were decoded, by path and size where they were not.
    one, other = ({picture: content} for content in ("x", "y"))
    assert records_identity(shown, one) != records_identity(shown, other)
    before = records_identity(shown, None)
    picture.write_bytes(b"more!")
    assert records_identity(shown, None) != before


def test_questions_that_are_gone_or_moved_are_counted():
    before = {"eval_data": records_identity(QUESTIONS, PICTURES)}
    for now, message in (
        (QUESTIONS[:2], r"eval_data has 2 usable questions where the run began with 3\."),
        (
            QUESTIONS[::-1],
            r"eval_data has the 3 questions that the run began with in another order",
        ),
        (
            [replace(e, answer="B") for e in QUESTIONS[:2]] + QUESTIONS[2:],
            r"eval_data has 2 questions \(of 3\) that are new, or whose text, answer or image is "
            r"not as it was when the run began: the first is 'q1'\.",
        ),
        (
            [replace(e, answer="B") for e in QUESTIONS[:2]],
            r"eval_data has 2 usable questions where the run began with 3; 2 of them are new, or "
            r"have another text, answer or image: the first is 'q1'\.",
        ),
    ):
        after = {"eval_data": records_identity(now, PICTURES)}
        with pytest.raises(KepoDataError, match=message):
            compare(before, after, {"eval_data": now})
    # A run may be asked for another number of them; not for others without a word.
    longer = replace(CONFIG, eval_limit=2)
    assert compare(before, after, {"eval_data": QUESTIONS[::-1]}, config=longer) == set()


def test_accepted_changes_are_said_and_their_hints_forgotten(capsys):
    accepts = replace(CONFIG, changed_inputs="accept")
    now = [replace(QUESTIONS[0], answer="B"), *QUESTIONS[1:]]
    before, after = (
        {"train_data": records_identity(records, PICTURES), "teacher": {"model.safetensors": name}}
        for records, name in ((QUESTIONS, "a"), (now, "b"))
    )
    assert compare(before, after, {"train_data": now}, config=accepts) == {"q1"}
    said = capsys.readouterr().out
    assert "accept: teacher has other files than the run began with: model.safetensors" in said
    assert "train_data has a question that is new" in said and "'q1'" in said
    with pytest.raises(KepoDataError, match=r"teacher .*; train_data .*changed_inputs: accept"):
        compare(before, after, {"train_data": now})


def test_a_checkpoint_of_an_earlier_version_is_taken_up_with_a_line(capsys):
    state = {"config": asdict(CONFIG)}
    now = {"train_data": records_identity(QUESTIONS, PICTURES)}
    assert changed_questions(CONFIG, state, now, {"train_data": QUESTIONS}) == set()
    (line,) = capsys.readouterr().out.splitlines()
    assert "no digests of teacher and questions" in line


def test_a_models_identity_is_all_bytes_of_what_is_read(tmp_path):
    contents = {"config.json": b"{}", "model-1.safetensors": b"x" * 10_000_000, "README.md": b"-"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    before = model_identity(str(tmp_path))
    assert set(before) == {"config.json", "model-1.safetensors"}
    assert before["model-1.safetensors"] == sha256(tmp_path / "model-1.safetensors")
    (tmp_path / "README.md").write_bytes(b"other")
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 9_999_999 + b"y")
    after = model_identity(str(tmp_path))
    assert {name for name in before if before[name] != after[name]} == {"model-1.safetensors"}
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(KepoCheckpointError, match=r"with: model-1\.safetensors, model-2\.safeten"):
        compare({"teacher": before}, {"teacher": model_identity(str(tmp_path))}, {})


def test_what_is_read_anew_at_a_resume_is_what_is_compared(monkeypatch):
    monkeypatch.setattr(identity, "model_identity", lambda name: {"of": name})
    whole = Config(student="s", teacher="t")
    assert set(inputs_of(whole.read_again, {"train_data": {}})) == {"train_data", "teacher"}
    for settings in (dict(lora_rank=4), dict(kl_coef=0.1)):  # base of adapters; reference
        assert inputs_of(replace(whole, **settings).read_again, {})["student"] == {"of": "s"}
    unused = replace(whole, distill_coef=0.0, hint_trigger="never")
    assert unused.read_again == {} == replace(whole, teacher=None).read_again


def test_an_interrupted_digest_does_not_read_the_rest(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.safetensors").write_bytes(b"x")
    finished = []

    def interrupted(file, told):
        if file.name.startswith("0"):
            raise SystemExit(130)
        for _ in range(200):
            told(0)
            time.sleep(0.005)
        finished.append(file)

    monkeypatch.setattr(identity, "sha256", interrupted)
    monkeypatch.setattr(identity, "READERS", 2)
    with pytest.raises(SystemExit):
        model_identity(str(tmp_path))
    assert not finished


def test_a_name_on_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    utils = pytest.importorskip("transformers.utils")
    inputs = []
    for revision in ("1a2b", "3c4d"):
        snapshot = tmp_path / "models--who--what" / "snapshots" / revision / "config.json"
        monkeypatch.setattr(utils, "cached_file", lambda name, file, at=snapshot: str(at))
        assert model_files("who/what") == f"revision {revision}"
        inputs.append({"teacher": model_identity("who/what")})
    with pytest.raises(KepoCheckpointError, match="began with: revision 1a2b, revision 3c4d"):
        compare(*inputs, {})

    def missing(name, file):
        raise OSError("who/nobody is no model")

    monkeypatch.setattr(utils, "cached_file", missing)
    assert model_files("who/nobody") == [] and model_identity("who/nobody") == {}
