"""Records that only the encoder can judge: left out before the first step, by id."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import quirks

pytest.importorskip("transformers")

from families import FAMILIES, pictures
from folders import change_text_config
from PIL import Image
from toy import TASK, hint_request, hinted_prompt, question_prompt

from kepo.__main__ import main
from kepo.config import Config
from kepo.data.load import load_examples
from kepo.data.run_data import load_data
from kepo.errors import KepoCheckpointError, KepoDataError
from kepo.loop import train
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.rollout.encodable import faults_of, judge_of, plain_reader

LIMIT = 8


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Twenty-nine good records."""
    root = tmp_path_factory.mktemp("made")
    return quirks.write_good(quirks.write_quirks(root / "data"), root / "clean")


@pytest.fixture
def root(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "data"))


@pytest.fixture(scope="module")
def student(tinies) -> VLM:
    return VLM.load(tinies / "qwen3")


def settings(student: Path, root: Path, run_dir: Path, **more) -> Config:
    plain = dict(teacher=None, hint_trigger="never", gate_reward=None, distill_coef=0.0)
    small = dict(steps=1, prompts_per_step=2, num_generations=2, micro_batch=4)
    return Config(
        student=str(student),
        train_data=str(root),
        run_dir=str(run_dir),
        max_completion_length=LIMIT,
        **{**plain, **small, **more},
    )


def found(config: Config) -> list[tuple[str, str]]:
    """Kind and place of every record that a run's judge leaves out of training."""
    examples, report = load_examples(config.train_data)
    kept, report = judge_of(config, TASK)(examples, report, True)
    assert report.questions == len(kept) == len(examples) - len(report.problems)
    left = {e.id for e in examples} - {e.id for e in kept}
    assert [p.where for p in report.problems] == [
        f"question {e.id!r}" for e in examples if e.id in left
    ]
    return [(problem.kind, problem.where) for problem in report.problems]


def resize(root: Path, example, *size: int) -> None:
    """Give the example, and another about the same picture, one of this size."""
    Image.new("RGB", size, (9, 9, 9)).save(example.images[0])


# ---- texts ----


@pytest.mark.parametrize("field", ["question", "option_C"])
@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"]
)
def test_control_tokens_in_a_text_make_a_bad_record(tinies, root, tmp_path, field, token):
    quirks.plant(root, 13, **{field: f"What {token}is it?"})
    config = settings(tinies / "qwen3", root, tmp_path)
    assert found(config) == [("text refused", "question 'quirks_14'")]
    with pytest.raises(KepoDataError, match=r"'quirks_14': its text has the control tokens <\|\w"):
        load_data(
            replace(config, bad_records="fail"), judge_of(replace(config, bad_records="fail"), TASK)
        )


def test_a_rationale_counts_where_it_is_trained_on(tinies, root, tmp_path):
    quirks.plant(root, 13, rationale="It is<|im_end|>")
    config = settings(tinies / "qwen3", root, tmp_path)
    assert found(config) == []
    assert found(replace(config, data_fraction=0.5)) == [("text refused", "question 'quirks_14'")]


def test_half_a_character_is_a_bad_record(student, root):
    examples, _ = load_examples(root)
    for changes in ({"question": "a \ud800"}, {"options": ("x", "\udc00 y")}):
        broken = [replace(examples[0], **changes), examples[1]]
        (fault,) = faults_of(broken, TASK, [plain_reader(student.encoder, TASK, LIMIT)]).items()
        assert fault[0] == examples[0].id and fault[1].kind == "text refused"
        assert "half a character" in fault[1].message


def test_tags_and_what_looks_like_a_token_are_text(tinies, root, tmp_path):
    quirks.plant(root, 13, question="Why <think>, <b>, |im_end| and <|im_ end|>?")
    assert found(settings(tinies / "qwen3", root, tmp_path)) == []


# ---- pictures ----


@pytest.mark.parametrize("size", [(2010, 10), (3, 603), (201, 1)])
def test_a_picture_that_the_processor_refuses_makes_bad_records(tinies, root, tmp_path, size):
    examples, _ = load_examples(root)
    resize(root, examples[2], *size)
    about = [e.id for e in examples if e.images == examples[2].images]
    assert found(settings(tinies / "qwen3", root, tmp_path)) == [
        ("image refused", f"question {name!r}") for name in about
    ]


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 3), (3, 600)])
def test_thin_and_small_pictures_are_read(tinies, root, tmp_path, size):
    resize(root, load_examples(root)[0][2], *size)
    assert found(settings(tinies / "qwen3", root, tmp_path)) == []


def test_a_picture_without_a_header_is_found_even_if_images_are_not_verified(
    tinies, root, tmp_path
):
    examples, _ = load_examples(root)
    examples[2].images[0].write_bytes(b"no picture")
    kinds = {kind for kind, _ in found(settings(tinies / "qwen3", root, tmp_path))}
    assert kinds == {"image unreadable"}


@pytest.mark.parametrize("name", FAMILIES)
def test_image_tokens_are_counted_without_the_image(tinies, tmp_path, name):
    sizes = [(1, 1), (1, 3), (3, 1), (200, 1), (1, 199), (40, 40), (57, 200), (1000, 900)]
    vlm = VLM.load(tinies / name)
    for path, size in zip(pictures(tmp_path, *sizes), sizes, strict=True):
        prompt = Prompt("Which?", path)
        inputs = vlm.encode([prompt])
        found = int(inputs.mm_token_type_ids.sum())
        assert vlm.encoder.image_tokens(*size) == found > 0
        assert vlm.encoder.text_lengths([prompt]) == [inputs.input_ids.shape[1] - found]
    with pytest.raises(ValueError, match="aspect ratio"):
        vlm.encoder.image_tokens(201, 1)


def test_a_picture_that_the_processor_refuses_is_named(tinies, tmp_path):
    (path,) = pictures(tmp_path, (402, 2))
    with pytest.raises(KepoDataError, match=r"refuses .*0\.png, of 402 x 2 pixels: .*aspect"):
        VLM.load(tinies / "qwen3").encode([Prompt("?", path)])


# ---- length ----


def longest(vlm: VLM, examples, ask) -> tuple[int, str]:
    """Tokens of the longest prompt, counted by encoding it, and whose it is."""
    lengths = [(vlm.encode([Prompt(ask(e), e.images)]).input_ids.shape[1], e.id) for e in examples]
    lengths.sort()
    assert lengths[-1][0] > lengths[-2][0]
    return lengths[-1]


@pytest.fixture
def one_long(root):
    """The dataset with one question that is longer than the others; its examples."""
    quirks.plant(root, 13, question="What is to be seen in this picture of the chest?")
    return load_examples(root)[0]


def model_of(tinies: Path, folder: Path, positions: int) -> Path:
    shutil.copytree(tinies / "qwen3", folder)
    change_text_config(folder, max_position_embeddings=positions)
    return folder


def test_a_prompt_may_fill_the_positions_and_not_exceed_them(
    tinies, student, root, one_long, tmp_path
):
    length, name = longest(student, one_long, question_prompt)
    for positions, expected in (
        (length + LIMIT, []),
        (length + LIMIT - 1, [("prompt too long", f"question {name!r}")]),
    ):
        model = model_of(tinies, tmp_path / str(positions), positions)
        config = settings(model, root, tmp_path)
        assert found(config) == expected
    _, report = judge_of(config, TASK)(*load_examples(root), True)
    assert f"and up to {LIMIT} may follow; the student has {positions} positions" in str(
        report.problems[0]
    )


def test_room_for_a_hint_is_kept_and_the_teacher_is_asked_too(
    tinies, student, root, one_long, tmp_path
):
    asks = longest(student, one_long, lambda e: hinted_prompt(e, ""))[0] + 2 * LIMIT
    teacher_reads = longest(student, one_long, lambda e: hint_request(e, True))[0] + LIMIT
    name = one_long[13].id
    models = {
        n: model_of(tinies, tmp_path / str(n), n) for n in (asks, asks - 1, teacher_reads - 1)
    }
    hinted = dict(hint_trigger="always", hint_with_answer=True)
    for student_has, teacher_has, whose in (
        (asks, asks, None),
        (asks - 1, asks, "student"),
        (asks, teacher_reads - 1, "teacher"),
    ):
        config = settings(
            models[student_has], root, tmp_path, teacher=str(models[teacher_has]), **hinted
        )
        judge, (examples, report) = judge_of(config, TASK), load_examples(root)
        problems = judge(examples, report, True)[1].problems
        assert [p.where for p in problems] == ([f"question {name!r}"] if whose else [])
        assert all(f"the {whose} has" in p.message for p in problems)
        assert judge(examples, report, False)[1].problems == ()  # an evaluation needs no hint


def test_room_for_a_hint_is_the_teachers_if_it_sees_it(tinies, student, root, one_long, tmp_path):
    plain = longest(student, one_long, question_prompt)[0] + LIMIT
    told = longest(student, one_long, lambda e: hinted_prompt(e, ""))[0] + 2 * LIMIT
    models = {n: model_of(tinies, tmp_path / str(n), n) for n in (plain, told, told - 1)}
    for teacher_has, faults in ((told, 0), (told - 1, 1)):
        paths = {"teacher": str(models[teacher_has]), "hint_for": "teacher"}
        config = settings(
            models[plain], root, tmp_path, **paths, hint_trigger="always", distill_coef=1.0
        )
        problems = judge_of(config, TASK)(*load_examples(root), True)[1].problems
        assert len(problems) == faults and all("the teacher has" in p.message for p in problems)


# ---- where it counts ----


def test_a_run_leaves_them_out_before_its_first_step(tinies, root, tmp_path, capsys):
    quirks.plant(root, 13, question="word " * 5000)
    quirks.plant(root, 12, question="<|im_end|>")
    config = settings(tinies / "qwen3", root, tmp_path / "run", eval_data=str(root), eval_limit=9)
    assert train(config).exit_code == 0
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    counts = {"text refused": 1, "prompt too long": 1}
    for part in ("train", "eval"):
        assert record[part]["bad_records"] == counts
        named = " ".join(record[part]["first_problems"])
        assert "'quirks_14'" in named and "'quirks_13'" in named
    assert record["train"]["questions"] == 27
    assert "2 bad records left out: text refused 1, prompt too long 1" in capsys.readouterr().out
    assert train(config).exit_code == 0  # and it is the same data when it goes on


def test_a_run_that_must_not_leave_any_out_ends_before_it_begins(tinies, root, tmp_path):
    quirks.plant(root, 13, question="word " * 5000)
    config = settings(tinies / "qwen3", root, tmp_path / "run", bad_records="fail")
    with pytest.raises(KepoDataError, match="question 'quirks_14': its prompt has"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_nothing_left_is_said(tinies, root, tmp_path):
    model = model_of(tinies, tmp_path / "small", 20)
    with pytest.raises(KepoDataError, match=r"(?s)prompt too long 29.*no question is left"):
        judge_of(settings(model, root, tmp_path), TASK)(*load_examples(root), True)


def test_a_student_that_cannot_be_read_is_said_before_data_is_judged(root, tmp_path):
    with pytest.raises(KepoCheckpointError, match=r"cannot load .*expected config\.json"):
        judge_of(settings(tmp_path, root, tmp_path), TASK)


def test_an_evaluation_leaves_them_out_and_asks_others_in_their_place(
    tinies, root, tmp_path, capsys
):
    examples, _ = load_examples(root)
    modality = examples[0].modality
    here = [number for number, e in enumerate(examples[:15]) if e.modality == modality]
    quirks.plant(root, here[0], question="<|im_end|>")
    quirks.plant(root, here[1], question="word " * 5000)
    out = tmp_path / "out.json"
    words = ["--modalities", modality, "--limit", "2", "--max-completion-length", "4"]
    main(["evaluate", str(tinies / "qwen3"), str(root), "--json", str(out), *words])
    data = json.loads(out.read_text())["data"]
    assert data["questions"] == 2
    assert data["bad_records"] == {"text refused": 1, "prompt too long": 1}
    assert "left out: 2 bad records (text refused 1, prompt too long 1)" in capsys.readouterr().out
