"""The comparison's bookkeeping, with runs that only pretend: what is run, kept, refused."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pretend_runs import RAN, PretendPool, answers_of_student, pretending, write_model

from experiments import starts
from experiments.analysis import Scores
from experiments.choose import Choice, choose
from experiments.choose import main as choose_main
from experiments.compare import Compare, Sweep, blocks_of, compare, runs_of
from experiments.controls import OtherDigits
from experiments.methods import FACTORIAL, METHODS, NEW, TUNED, config_of, method_of
from experiments.plan import BLOCKS, PLAN
from experiments.results import Results, Run
from experiments.settings import COMMON, SETTINGS
from kepo.errors import KepoConfigError, KepoDataError, KepoError

CHOSEN = {name: {"lr": 2e-4} for name in TUNED}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    return pretending(tmp_path, monkeypatch)


def runs(settings):
    return Results(Path(settings.out) / "cliff").runs


def test_every_method_runs_once_per_seed_and_never_again(settings, capsys):
    compare(settings)
    assert sorted(RAN) == [Run("test", s, m) for s in (1, 2, 3) for m in ("grpo", "kepo")]
    assert "6 runs are missing\nmaking 1 teachers and 3 students" in capsys.readouterr().out
    compare(settings)
    assert len(RAN) == 6
    compare(replace(settings, methods=("grpo", "kepo", "kepo@num_hinted=1")))
    assert RAN[6:] == [Run("test", seed, "kepo@num_hinted=1") for seed in (1, 2, 3)]
    assert not list(Path(settings.root).rglob("checkpoints"))


def test_the_splits_are_apart(settings):
    compare(settings)
    compare(replace(settings, split="validation"))
    assert {run.split for run in runs(settings)} == {"test", "validation"}
    data = {Sweep(settings, Choice(CHOSEN)).config("cliff", run).eval_data for run in RAN}
    assert {Path(folder).name for folder in data} == {"test", "validation"}


def test_other_settings_are_other_runs_in_place_of_the_old_ones(settings):
    compare(settings)
    other = replace(settings, steps=3)
    with pytest.raises(KepoConfigError, match="out has 'grpo' with the seed 1 on the test split"):
        compare(other)
    assert len(RAN) == 6
    other = replace(other, replace=True)
    compare(other)
    assert len(RAN) == 12 and len(runs(settings)) == 6
    Path(settings.chosen).write_text('{"methods": {"kepo": {"lr": 8e-4}, "grpo": {"lr": 4e-4}}}')
    compare(other)  # the choice decides runs as well
    assert RAN[12:] == [Run("test", seed, "kepo") for seed in (1, 2, 3)]


def test_a_row_has_what_a_run_cost_and_where_it_came_from(settings):
    compare(settings)
    row = runs(settings)[Run("test", 1, "kepo")]
    assert (row["seconds"], row["teacher_tokens"], row["hint_tokens"]) == ("8", "40", "12")
    assert row["sampled_completions"] == "512" and row["student"] and row["teacher"]
    assert runs(settings)[Run("test", 1, "grpo")]["teacher"] == ""
    teachers = (Path(settings.out) / "teachers.csv").read_text().splitlines()
    assert len(teachers) == 1 + 2 * 8 and teachers[1].endswith(",0.75," + "1110" * 10)
    questions = (Path(settings.out) / "questions.csv").read_text().splitlines()
    assert len(questions) == 1 + 2 * 8


def flipped(right: dict[str, str]) -> dict[str, str]:
    """Return the same answers but for one question."""
    return right | {"noisy": "10"[int(right["noisy"][0])] + right["noisy"][1:]}


def test_a_student_that_answers_one_question_otherwise_is_refused(settings, monkeypatch):
    compare(settings)

    def other(root, data, name, seed, questions):
        folder = starts.student_of(root, SETTINGS[name], questions, seed)
        write_model(folder, "other bits", flipped(answers_of_student(seed)))

    monkeypatch.setattr(starts, "make_student", other)
    with pytest.raises(KepoConfigError, match=r"seeds has 1, .* answers 1 questions otherwise"):
        compare(replace(settings, methods=("kepo@num_hinted=1",)))
    assert len(runs(settings)) == 6


def test_a_student_of_other_bits_that_answers_alike_is_the_same_start(settings, monkeypatch):
    compare(settings)

    def other(root, data, name, seed, questions):
        folder = starts.student_of(root, SETTINGS[name], questions, seed)
        write_model(folder, "other bits", answers_of_student(seed))

    monkeypatch.setattr(starts, "make_student", other)
    compare(replace(settings, methods=("kepo@num_hinted=1",)))
    assert len({row["student"] for row in runs(settings).values() if row["seed"] == "1"}) == 2


def test_a_teacher_that_answers_otherwise_is_refused(settings, monkeypatch):
    compare(settings)
    [teacher] = [path for path in Path(settings.root).glob("teachers/*") if path.is_dir()]
    before = (Path(settings.out) / "teachers.csv").read_text()
    right = starts.answers_of(teacher)["test"]
    monkeypatch.setattr(starts, "make_teacher", lambda *_: write_model(teacher, "other", right))
    compare(replace(settings, seeds=(4,)))  # other bits, the same answers
    assert (Path(settings.out) / "teachers.csv").read_text() == before
    other = flipped(right)
    monkeypatch.setattr(starts, "make_teacher", lambda *_: write_model(teacher, "other", other))
    with pytest.raises(KepoConfigError, match=r"teachers.csv, which answers 2 questions otherwise"):
        compare(replace(settings, seeds=(5,)))
    compare(replace(settings, seeds=(5,), methods=("grpo",)))  # who asks none


def test_results_on_other_questions_are_refused(settings, monkeypatch):
    compare(settings)
    monkeypatch.setattr(starts, "large_digits", lambda data: {"scanned": "01"})
    with pytest.raises(KepoConfigError, match="holds results on other questions"):
        compare(replace(settings, seeds=(4,)))


def test_a_run_that_fails_leaves_the_others_and_is_said_at_the_end(settings, monkeypatch):
    monkeypatch.setattr(PretendPool, "failing", ("grpo",))
    with pytest.raises(KepoError, match=r"methods: 3 runs failed, .*'grpo' .*: nothing worked"):
        compare(settings)
    assert {run.method for run in runs(settings)} == {"kepo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "steep"}, r"setting has \['steep'\]; known are cliff, "),
        ({"split": "train"}, r"split has \['train'\]"),
        ({"block": ("main", "all")}, r"block has \['all'\]"),
        ({"block": ("main",)}, r"block has \['main'\] beside methods=\['grpo', 'kepo'\]"),
        ({"methods": ()}, "split='test' is of methods, and none is named"),
        ({"methods": (), "split": "validation"}, r"seeds=\(1, 2, 3\) is of methods"),
        ({"methods": ("grpo", "ppo")}, r"methods has 'ppo'; expected one of grpo, "),
        ({"methods": ("kepo@lr",)}, "methods has 'kepo@lr'"),
        ({"methods": ("kepo@learning_rate=1",)}, "kepo@learning_rate=1: unknown keys"),
        ({"methods": ("sft",)}, "'sft', but no learning rate was chosen for 'sft'"),
        (
            {"methods": (), "block": ("new_on_test",), "split": "validation", "seeds": (11, 12)},
            "block asks for the best new method",
        ),
        ({"steps": 0}, "steps=0"),
        ({"minutes": float("nan")}, "minutes=nan"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_refused_by_name(settings, changes, message):
    with pytest.raises(KepoConfigError, match=message):
        compare(replace(settings, **changes))
    assert RAN == []


# ---- methods and plan ----


def test_methods_differ_in_nothing_they_should_share():
    configs = {
        name: asdict(config_of(name, CHOSEN, student="s", teacher="t", steps=100))
        for name in METHODS
    }
    shared = ("lr", "lr_end", "warmup_steps", "steps", "prompts_per_step", "num_generations")
    shared += ("max_completion_length", "sampling_temperature", "top_p", "temperature", "rewards")
    for name in shared:
        assert len({config[name] for config in configs.values()}) == 1, name
    assert configs["grpo"]["teacher"] is None and configs["grpo"]["distill_coef"] == 0.0
    assert configs["opd"]["beta"] == 0.5 and configs["opd_kl"]["beta"] == 1.0
    for name, method in METHODS.items():
        if method.preset == "kepo":
            different = {
                key for key, value in configs[name].items() if value != configs["kepo"][key]
            }
            assert different == set(method.changes), name


def test_the_cells_of_the_factorial_are_what_they_are_called():
    for (policy, gate, hints), name in FACTORIAL.items():
        config = config_of(name, CHOSEN)
        assert (config.policy_coef > 0, config.hint_trigger != "never") == (policy, hints), name
        closed = "none" if config.gate_reward is None else config.gate_side
        assert closed == gate and config.distill_coef == COMMON["distill_coef"], name
    assert len(FACTORIAL) == 12


def test_spelled_methods_and_what_was_chosen():
    chosen = {"kepo": {"lr": 1e-4, "distill_coef": 3.0}}
    plain = config_of("kepo", chosen)
    assert (plain.lr, plain.distill_coef, plain.num_hinted) == (1e-4, 3.0, 2)
    fewer = config_of("kepo@num_hinted=1", chosen)
    assert (fewer.lr, fewer.distill_coef, fewer.num_hinted) == (1e-4, 3.0, 1)
    point = config_of("kepo@lr=8e-4", chosen)  # of a grid: nothing that was chosen counts
    assert (point.lr, point.distill_coef) == (8e-4, COMMON["distill_coef"])
    assert config_of("hints_only", {"grpo": {"lr": 5e-4}}).distill_coef == 0.0
    assert method_of("opd@beta=0").changes == {"beta": "0"}


def test_every_block_of_the_plan_can_be_run():
    choice = Choice(CHOSEN, next(iter(NEW)))
    sweep = Sweep(Compare(), choice)
    planned = set()
    for block in PLAN:
        assert BLOCKS[block.name] is block and block.setting in SETTINGS, block.name
        for run in runs_of(block, choice):
            assert sweep.config(block.setting, run).seed == run.seed
            planned.add((block.setting, run))
    tuned = {run for _, run in planned if run.split == "validation"}
    assert {run.seed for run in tuned} == {11, 12}
    assert {run.seed for _, run in planned if run.split == "test"} == {*range(1, 9)}
    assert 240 <= len(planned) <= 400
    assert blocks_of(Compare()) == [BLOCKS["main"]]


def test_fingerprints_tell_runs_apart_and_nothing_else():
    one, run = Compare(), Run("test", 1, "kepo")

    def digest(settings=one, setting="cliff", run=run, chosen=CHOSEN):
        return Sweep(settings, Choice(chosen)).fingerprint(setting, run)

    same = replace(one, root="x", out="y", jobs=3, minutes=1.0, seeds=(4,))
    assert digest() == digest(same)
    others = [digest(run=Run("test", 2, "kepo")), digest(run=Run("test", 1, "opd"))]
    others += [digest(run=Run("validation", 1, "kepo")), digest(chosen={"kepo": {"lr": 1e-3}})]
    others += [digest(setting=name) for name in SETTINGS if name != "cliff"]
    others += [digest(replace(one, **{name: 7})) for name in ("steps", "data_seed", "eval_every")]
    assert len({digest(), *others}) == 1 + len(others)
    without = Run("test", 1, "grpo")  # of whom no teacher is asked
    assert digest(setting="weak_50", run=without) == digest(run=without)


def test_a_choice_is_the_best_of_a_whole_grid(settings):
    points = tuple(m for m in BLOCKS["tune"].methods if m.startswith(("kepo@", "grpo@")))
    part = replace(settings, split="validation", seeds=(11, 12), methods=points[:-1])
    compare(part)
    folder = Path(settings.out) / "cliff"
    found = choose(Scores(folder, "validation"))
    assert found.methods.keys() == {"grpo"} and found.best_new is None
    compare(replace(part, methods=(points[-1], *NEW)))
    scores = Scores(folder, "validation")
    found = choose(scores)
    of = {point: scores.accuracy(point, [11, 12]).mean() for point in points if "kepo" in point}
    best = config_of(max(of, key=lambda point: of[point]), {})
    assert found.methods["kepo"] == {"lr": best.lr} | (
        {} if best.distill_coef == COMMON["distill_coef"] else {"distill_coef": best.distill_coef}
    )
    assert found.best_new == max(NEW, key=lambda name: scores.accuracy(name, [11, 12]).mean())


def test_what_was_chosen_is_not_forgotten(settings, monkeypatch, capsys):
    """By a wrong folder, or one that lacks runs."""
    path = Path(settings.chosen)
    before = path.read_text()
    words = ["choose", "--results", settings.out, "--chosen", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(
        KepoConfigError, match="lacks runs of the validation split, by which grpo, "
    ):
        choose_main()
    compare(replace(settings, split="validation", seeds=(11, 12)))
    with pytest.raises(KepoConfigError, match="by which grpo, kepo would be chosen"):
        choose_main()
    assert path.read_text() == before
    path.unlink()
    with pytest.raises(KepoConfigError, match="by which a method would be chosen"):
        choose_main()
    for damaged in ("{", '{"method": {}}', "[]"):
        path.write_text(damaged)
        with pytest.raises(KepoDataError, match=r"chosen\.json is damaged; restore it"):
            compare(settings)


def test_other_digits_are_in_the_hint_of_a_control():
    task = OtherDigits()
    chats = [[{"role": "user", "content": f"question {n}"}] for n in range(50)]
    said = [task.with_hint(chat, "8 + 3")[-1]["content"] for chat in chats]
    assert len({text.rpartition("Hint: ")[2] for text in said}) > 20
    assert sum(text.endswith("8 + 3") for text in said) <= 3
    assert said[0].startswith("question 0\nHint: ")
    assert said[0] == task.with_hint(chats[0], "1 + 1")[-1]["content"]
    assert config_of("shuffled_hints", CHOSEN).task.endswith(":OtherDigits")
