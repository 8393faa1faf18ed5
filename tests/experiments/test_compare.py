"""The comparison's bookkeeping, with runs that only pretend: what is run, kept, refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from experiments import compare as module
from experiments.compare import Compare, compare, fingerprint
from experiments.methods import ABLATIONS, MAIN, METHODS, SETTINGS, config_of
from experiments.report import WORDS, write_report
from experiments.results import Results
from kepo.digits.dataset import MODALITIES
from kepo.errors import KepoConfigError
from kepo.evaluation.statistics import Interval

ITEMS = 40
RAN: list[tuple[int, str]] = []
SKILL = {"grpo": 0.5, "kepo": 0.8, "opd": 0.5}


class PretendPool:
    """Writes the metrics that a run would have left; accuracy is that of SKILL."""

    def __init__(self, jobs):
        pass

    def close(self):
        pass

    def map(self, function, arguments):
        for _, seed, target, _ in arguments:
            target.mkdir(parents=True, exist_ok=True)
            (target / "model.safetensors").write_bytes(f"student {seed}".encode())

    def train_all(self, configs, steps, keep):
        for (seed, method), config in configs.items():
            RAN.append((seed, method))
            rng = np.random.default_rng((seed, len(method)))
            records = []
            for step in range(steps + 1):
                if step:
                    records.append({"step": step, "step_time": 2.0, "kepo/teacher_tokens": 10})
                skill = 0.3 if step == 0 else SKILL[method]
                items = {
                    name: "".join(str(int(x < skill)) for x in rng.random(ITEMS))
                    for name in MODALITIES
                }
                means = {name: text.count("1") / ITEMS for name, text in items.items()}
                records.append({"step": step, "eval": means, "eval_items": items})
            folder = module.Path(config.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(record) for record in records]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            keep((seed, method))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    def made(target, made_with, make):
        target.mkdir(parents=True, exist_ok=True)
        (target / "model.safetensors").write_bytes(b"teacher")
        return target

    monkeypatch.setattr(module, "Pool", PretendPool)
    monkeypatch.setattr(module, "cached", made)
    RAN.clear()
    return Compare(
        methods=("grpo", "kepo"),
        seeds=(1, 2, 3),
        steps=2,
        root=str(tmp_path / "root"),
        out=str(tmp_path / "out"),
    )


def test_every_method_runs_once_per_seed_and_never_again(settings, capsys):
    compare(settings)
    assert sorted(RAN) == [(s, m) for s in (1, 2, 3) for m in ("grpo", "kepo")]
    first = capsys.readouterr().out
    compare(settings)
    assert len(RAN) == 6
    assert capsys.readouterr().out == first.partition("warming up 3 students\n")[2]
    compare(replace(settings, methods=("grpo", "kepo", "opd")))
    assert RAN[6:] == [(1, "opd"), (2, "opd"), (3, "opd")]


def test_other_settings_are_other_runs(settings, capsys):
    compare(settings)
    compare(replace(settings, steps=3))
    assert len(RAN) == 12
    assert len(Results(module.Path(settings.out) / "cliff").runs) == 6  # in place of the old ones


def test_results_of_another_warm_up_are_dropped_with_their_seed(settings, monkeypatch, capsys):
    compare(settings)
    original = PretendPool.map

    def other_machine(self, function, arguments):
        original(self, function, arguments)
        for _, _, target, _ in arguments:
            (target / "model.safetensors").write_bytes(b"other bits")

    monkeypatch.setattr(PretendPool, "map", other_machine)
    compare(replace(settings, seeds=(1,), methods=("grpo", "kepo", "opd")))
    assert sorted(RAN[6:]) == [(1, "grpo"), (1, "kepo"), (1, "opd")]
    assert "seed 1, grpo: made from other models than these; dropped" in capsys.readouterr().out


def test_the_report_has_the_numbers_and_calls_the_claims(settings):
    compare(replace(settings, methods=("grpo", "kepo", "opd")))
    folder = module.Path(settings.out) / "cliff"
    report = (folder / "report.md").read_text()
    results = Results(folder)
    correct = results.correct("kepo", [1, 2, 3], 2, results.modalities()[1:])
    assert correct.shape == (3, 7, ITEMS)
    assert f"{100 * correct.mean():.1f} [" in report
    claims = [line for line in report.splitlines() if line.startswith("| better OOD accuracy")]
    assert len(claims) == 2 and all(line.endswith("| holds |") for line in claims)
    assert (folder / "report.png").stat().st_size > 10_000
    costs = results.runs[1, "kepo"]
    assert (costs["seconds"], costs["teacher_tokens"]) == ("4", "20")


def test_a_claim_without_evidence_is_undecided(settings):
    assert WORDS[Interval(0.1, -0.01, 0.2).sign] == "undecided"
    assert WORDS[Interval(-0.1, -0.2, -0.01).sign] == "does not hold"
    compare(replace(settings, methods=("grpo", "opd")))  # of the same skill, and without kepo
    assert "Needs `kepo`" in (module.Path(settings.out) / "cliff" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "steep"}, r"setting has \['steep'\]; known are cliff, mild"),
        ({"methods": ("grpo", "ppo")}, r"methods has \['ppo'\]"),
        ({"steps": 0}, "steps=0"),
        ({"seeds": ()}, r"seeds=\(\)"),
    ],
)
def test_refused_by_name(settings, changes, message):
    with pytest.raises(KepoConfigError, match=message):
        compare(replace(settings, **changes))


def test_methods_differ_in_nothing_they_should_share():
    setting = SETTINGS["cliff"]
    configs = {
        name: asdict(config_of(setting, method, student="s", teacher="t"))
        for name, method in METHODS.items()
    }
    shared = ("lr", "lr_end", "warmup_steps", "steps", "prompts_per_step", "num_generations")
    shared += ("max_completion_length", "sampling_temperature", "top_p", "temperature")
    for name in shared:
        assert len({config[name] for config in configs.values()}) == 1, name
    assert configs["grpo"]["teacher"] is None and configs["grpo"]["distill_coef"] == 0.0
    assert configs["kepo_official"]["gate_reward"] == "total"
    for name, method in ABLATIONS.items():
        if method.preset == "kepo":
            different = {
                key for key, value in configs[name].items() if value != configs["kepo"][key]
            }
            assert different == set(method.changes), name
    assert set(MAIN) == {"grpo", "opd", "kdpo_tau1", "kepo_official", "kepo"}


def test_fingerprints_tell_runs_apart_and_nothing_else():
    one = Compare()
    assert fingerprint(one, 1, "kepo") == fingerprint(replace(one, root="x", jobs=3), 1, "kepo")
    others = [fingerprint(one, 2, "kepo"), fingerprint(one, 1, "opd")]
    others += [fingerprint(replace(one, teacher_steps=1), 1, "kepo")]
    others += [fingerprint(replace(one, setting="mild"), 1, "kepo")]
    assert len({fingerprint(one, 1, "kepo"), *others}) == 5


def test_the_published_report_is_that_of_the_published_results(tmp_path):
    folder = module.Path(__file__).parents[2] / "docs" / "experiments" / "cliff"
    results, settings = Results(folder), Compare()
    for seed in settings.seeds:
        for method in MAIN:
            assert results.has((seed, method), fingerprint(settings, seed, method)), (seed, method)
    text = write_report(results, SETTINGS["cliff"], tmp_path / "cliff")
    assert text == (folder / "report.md").read_text(encoding="utf-8")
