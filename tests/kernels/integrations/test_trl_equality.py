"""TRL's losses by our adapters: loss, gradients and metrics are those of TRL's own code."""

import logging

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from trl import GRPOTrainer

from benchmarks.trl import distillation_equality, grpo_equality
from benchmarks.trl.grpo_equality import CASES, Case, difference, inputs_of, outcome, trainer
from benchmarks.trl.tiny_models import VOCABULARY, write_model
from kepo_kernels import KepoInputError, head_of, reference
from kepo_kernels.compute import gemm
from kepo_kernels.integrations.trl import (
    KepoDistillationTrainer,
    KepoGRPOTrainer,
    fuse_head,
    grpo_options,
    grpo_trainer,
    head_in_forward,
)

TOLERANCE = 1e-5  # of losses, sums of cancelling terms in fp32
OF_GRADIENTS = 2e-6
pytestmark = pytest.mark.slow
BF16 = {"bf16": True}
ALL_CLOSED = {"kepo_gate": torch.zeros(4), "kepo_open_tokens": torch.tensor(0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trl")


def assert_small(found, rounding=0.0):
    assert found.loss <= TOLERANCE and found.metrics <= TOLERANCE, found
    assert found.gradient <= OF_GRADIENTS + rounding, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grpo_is_that_of_trl(case, folder):
    found = grpo_equality.differences(case, folder)
    for _, each in found.values():
        assert_small(each, case.rounding)
    way, _ = found["KepoGRPOTrainer"]
    assert way == ("fallback" if case.falls_back else "joint loss")


def test_logits_in_fp32_of_states_in_bf16_are_nearer_to_those_of_fp32(folder, monkeypatch):
    """Of the same head, whose weights are values of bf16; the states' rounding is left."""
    monkeypatch.setattr(gemm, "default_logits_dtype", lambda *_: torch.float32)
    rounded, upcast = Case("bf16", BF16), Case("fp32", BF16 | {"cast_lm_head_to_fp32": True})

    def made(case, kind):
        made = trainer(case, kind, folder)
        weight = made.model.lm_head.weight
        weight.data = weight.data.bfloat16().to(weight.dtype)
        return made

    exact = made(upcast, GRPOTrainer)
    given = inputs_of(upcast, exact)
    expected = outcome(exact, given)
    theirs = difference(outcome(made(rounded, GRPOTrainer), given), expected)
    ours = (fuse_head(made(rounded, GRPOTrainer)), given)
    joint = (made(rounded, KepoGRPOTrainer), given | ALL_CLOSED)
    for each in (ours, joint):
        assert difference(outcome(*each), expected).loss < theirs.loss / 10


@pytest.mark.parametrize("case", distillation_equality.CASES, ids=lambda case: case.name)
def test_distillation_is_that_of_trl(case, folder):
    for _, found in distillation_equality.differences(case, folder).values():
        assert_small(found)


# ---- planted faults: the comparison sees them ----


def twice(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


FAULTS = {
    "weights": ("policy_weights", twice(grpo_options.policy_weights)),
    "epsilon_high": (
        "settings_of",
        lambda made: grpo_options.settings_of(made) | {"epsilon_high": 1.0},
    ),
    "correction": (
        "settings_of",
        lambda made: grpo_options.settings_of(made) | {"kl_bias_correction": False},
    ),
    "entropy": ("entropy_of", lambda made, mask: {}),
    "states": ("_before", lambda hidden, mask: hidden[:, -mask.size(1) :]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_joint_loss_is_seen(fault, folder, monkeypatch):
    case = Case(fault, {"beta": 0.1, "entropy_coef": 0.1})
    monkeypatch.setattr(grpo_trainer, *FAULTS[fault])
    _, found = grpo_equality.differences(case, folder)["KepoGRPOTrainer"]
    assert found.gradient > 1e-3


def test_a_fault_in_the_head_is_seen(folder, monkeypatch):
    scores = head_in_forward._scores

    def detached(*args):
        fields = scores(*args)
        return fields | {"entropy": fields["entropy"].detach()}

    monkeypatch.setattr(head_in_forward, "_scores", detached)
    case = Case("entropy", {"entropy_coef": 0.1})
    _, found = grpo_equality.differences(case, folder)["fuse_head"]
    assert found.gradient > 1e-3 and found.loss <= TOLERANCE


# ---- the teacher ----

GATE = torch.tensor([1.0, 0.0, 1.0, 0.0])


def taught(case, folder, **more):
    """The outcome of a trainer with a teacher, the inputs, and the trainer."""
    if not (folder / "knowing").exists():
        write_model(folder / "knowing", seed=7, hidden=48)
    made = trainer(case, KepoGRPOTrainer, folder, teacher_model=str(folder / "knowing"), **more)
    given = inputs_of(case, made)
    mask = given["completion_mask"] * given.get("tool_mask", 1)
    opened = GATE.unsqueeze(1) * mask
    given |= {"kepo_gate": GATE, "kepo_open_tokens": 3 * opened.sum()}  # of a larger batch
    return outcome(made, given), given, made, opened


@pytest.mark.parametrize(
    "case",
    [
        Case("dapo"),
        Case("on-policy", {"loss_type": "grpo", "temperature": 0.8}, old=False),
        Case("GSPO", grpo_equality.GSPO, tools=True),
        Case("vespo", {"loss_type": "vespo"}, falls_back=True),
    ],
    ids=lambda case: case.name,
)
def test_the_joint_loss_is_trls_and_the_teachers(case, folder):
    """TRL's loss, and the oracle's divergence on whole logits where the gate is open."""
    how = dict(distill_coef=0.7, distill_beta=0.3)
    found, given, made, opened = taught(case, folder, **how)
    theirs = trainer(case, GRPOTrainer, folder)
    theirs.model.zero_grad()
    loss = theirs._compute_loss(theirs.model, given)
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    length = opened.size(1)

    def states(model):
        hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
        return hidden[:, -length - 1 : -1]

    with torch.no_grad():
        of_teacher = states(made.teacher_model)
    heads = head_of(theirs.model), of_teacher, head_of(made.teacher_model)
    accumulated = grpo_equality.ACCUMULATED / theirs.args.steps_per_generation
    loss = loss + 0.7 * reference.gated_kd_loss(
        states(theirs.model),
        *heads,
        weights=opened / (given["kepo_open_tokens"] * accumulated),
        beta=0.3,
        temperature=theirs.temperature,
    ).to(loss.dtype)
    loss.backward()
    gradients = [p.grad.flatten() for p in theirs.model.parameters() if p.grad is not None]
    expected = grpo_equality.Outcome(float(loss.detach()), torch.cat(gradients).double(), {})
    assert_small(difference(found, expected))
    assert found.metrics["kepo/open_share"] == [0.5]
    assert 0.0 < found.metrics["kepo/divergence"][0] < 0.7


def test_the_teacher_runs_on_open_completions_alone(folder):
    _, given, made, _ = taught(Case("dapo"), folder)
    seen = []
    made.teacher_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    outcome(made, given)
    assert torch.equal(seen[0][:, 5:], given["completion_ids"][GATE.bool()]) and len(seen) == 1
    outcome(made, given | ALL_CLOSED)
    assert len(seen) == 1
    assert made._metrics["train"]["kepo/open_share"][-1] == 0.0


def test_a_gate_opens_by_the_named_reward(folder):
    how = dict(gate_reward="length", gate_threshold=3.0)
    _, _, made, _ = taught(Case("dapo"), folder, **how)
    nan = float("nan")
    assert made._gate(torch.tensor([[2.9], [3.0], [nan], [7.0]])).tolist() == [0, 1, 0, 1]
    with pytest.raises(KepoInputError, match=r"gate_reward is 'lenght'; expected.*length"):
        trainer(Case("dapo"), KepoGRPOTrainer, folder, gate_reward="lenght")


# ---- a LoRA on the head, which TRL refuses ----


def with_lora(case, kind, folder, **more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return kind(case, folder=folder, peft_config=config, **more)


def test_a_lora_on_the_head_is_trained(folder):
    """The loss is that of a model whose head has the LoRA merged, by TRL's own trainer; gradients
    of the two factors are that of their product times the other."""
    import trl.trainer.grpo_trainer as of_trl

    class_before = of_trl.BaseTunerLayer
    case = Case("LoRA on the head", {"beta": 0.0})
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        with_lora(case, lambda *a, **k: trainer(a[0], GRPOTrainer, **k), folder)
    made = with_lora(case, lambda *a, **k: trainer(a[0], KepoGRPOTrainer, **k), folder)
    assert of_trl.BaseTunerLayer is class_before
    theirs = trainer(case, GRPOTrainer, folder)
    layer = made.model.get_base_model().lm_head
    with torch.no_grad():
        for name, x in theirs.model.named_parameters():
            ours = made.model.get_base_model().get_submodule(name.rpartition(".")[0])
            delta = ours.get_delta_weight("default") if hasattr(ours, "lora_A") else 0.0
            x.copy_(getattr(ours, "base_layer", ours).weight + delta)
    given = inputs_of(case, theirs) | ALL_CLOSED
    expected, found = outcome(theirs, given), outcome(made, given)
    assert abs(found.loss - expected.loss) <= TOLERANCE * abs(expected.loss)
    whole = theirs.model.lm_head.weight.grad * layer.scaling["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for part, right in ((a, b.T @ whole), (b, whole @ a.T)):
        assert float((part.grad - right.detach()).norm() / right.norm().detach()) <= OF_GRADIENTS


def test_a_lora_on_the_head_in_distillation(folder):
    case = distillation_equality.Case(0.5)

    def make(case, **more):
        return distillation_equality.trainer(case, KepoDistillationTrainer, **more)

    made = with_lora(case, make, folder)
    distillation_equality.outcome(made, case)
    assert made.model.get_base_model().lm_head.lora_B["default"].weight.grad.norm() > 0


def test_a_lora_on_a_head_that_is_cast_is_refused(folder):
    case = Case("cast", {"cast_lm_head_to_fp32": True})
    with pytest.raises(KepoInputError, match="cast_lm_head_to_fp32=True is given with an adapter"):
        with_lora(case, lambda *a, **k: trainer(a[0], KepoGRPOTrainer, **k), folder)


# ---- vocabularies, and what is refused ----


def test_vocabularies_of_different_padding(folder):
    """Rows of the teacher's head beyond the student's have no share in the divergence."""
    write_model(folder / "padded", seed=5, hidden=48, vocabulary=VOCABULARY + 32)
    case = distillation_equality.Case(0.5)
    more = dict(teacher_model=str(folder / "padded"))
    padded = distillation_equality.trainer(case, KepoDistillationTrainer, folder, **more)
    exact = distillation_equality.trainer(case, KepoDistillationTrainer, folder)
    weights = padded.teacher_model.state_dict()
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    weights |= {name: weights[name][:VOCABULARY] for name in cut}
    exact.teacher_model.load_state_dict(weights)
    found, expected = (distillation_equality.outcome(x, case) for x in (padded, exact))
    assert_small(difference(found, expected))


def test_a_fallback_is_named_once(folder, caplog):
    with caplog.at_level(logging.WARNING, "kepo_kernels.integrations.trl.grpo_trainer"):
        made = trainer(Case("vespo", {"loss_type": "vespo"}), KepoGRPOTrainer, folder)
        given = inputs_of(Case("vespo"), made) | ALL_CLOSED
        for _ in range(2):
            outcome(made, given)
        trainer(Case("dapo"), KepoGRPOTrainer, folder)
    assert [r.getMessage().startswith("loss_type='vespo'") for r in caplog.records] == [True]


def test_trainers_whose_head_is_not_ours(folder):
    with pytest.raises(KepoInputError, match="has no fused head of TRL's"):
        case = distillation_equality.Case(0.5)
        fuse_head(distillation_equality.trainer(case, KepoDistillationTrainer, folder))
    made = trainer(Case("dapo"), GRPOTrainer, folder)
    assert fuse_head(fuse_head(made)) is made
    with pytest.raises(KepoInputError, match="without a model"):
        fuse_head(object())


def test_a_head_that_computes_more_is_refused(folder):
    from trl import SFTConfig, SFTTrainer

    from benchmarks.trl.tiny_models import prompts

    settings = dict(output_dir=str(folder / "sft"), use_cpu=True, bf16=False, report_to="none")
    data = prompts().map(lambda row: {"text": row["prompt"]}, remove_columns="prompt")
    write_model(folder / "sft-model")
    made = SFTTrainer(str(folder / "sft-model"), SFTConfig(**settings), train_dataset=data)
    with pytest.raises(KepoInputError, match=r"SFTTrainer, whose head also computes is_top1;"):
        fuse_head(made)
