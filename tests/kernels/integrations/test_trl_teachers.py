"""TRL's trainers with our losses: teachers that cannot teach, and models that have two trainers."""

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

import torch
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, GRPOConfig, GRPOTrainer

from benchmarks.trl.tiny_models import length, prompts, tokenizer, write_model
from kepo_kernels import KepoInputError
from kepo_kernels.integrations.trl import KepoDistillationTrainer, KepoGRPOTrainer, fuse_head
from kepo_kernels.integrations.trl.teacher_of import PADDING

pytestmark = pytest.mark.slow
QUIET = dict(
    max_completion_length=6,
    max_steps=2,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    write_model(made / "student")
    write_model(made / "teacher", seed=1, hidden=48)
    return made


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def grpo(model, out, kind=KepoGRPOTrainer, temperature=1.0, **more):
    how = dict(num_generations=4, per_device_train_batch_size=4, logging_steps=1, seed=0)
    settings = GRPOConfig(output_dir=str(out), temperature=temperature, **how, **QUIET)
    words = tokenizer()
    given = dict(args=settings, train_dataset=prompts(), processing_class=words)
    return kind(model, length, **given, **more)


def distillation(model, out, teacher, **more):
    settings = DistillationConfig(
        output_dir=str(out), per_device_train_batch_size=4, **QUIET, **more
    )
    given = dict(args=settings, train_dataset=prompts(), processing_class=tokenizer())
    return KepoDistillationTrainer(model, teacher, **given)


MAKERS = {"GRPO": lambda m, out, t: grpo(m, out, teacher_model=t), "Distillation": distillation}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


# ---- one model, two trainers ----


@pytest.mark.parametrize("first", [KepoGRPOTrainer, GRPOTrainer], ids=["ours", "TRL's, fused"])
def test_a_second_trainer_of_a_model_has_its_own_loss(folder, tmp_path, first):
    """A cell of a notebook that is run again: the forward of the newest trainer counts, with its
    own temperature."""

    def losses(model):
        made = grpo(model, tmp_path, temperature=0.7, teacher_model=loaded(folder / "teacher"))
        made.train()
        return [(x["loss"], x["kepo/divergence"]) for x in made.state.log_history if "loss" in x]

    fresh = losses(loaded(folder / "student"))
    model = loaded(folder / "student")
    before = grpo(model, tmp_path, kind=first)
    if first is GRPOTrainer:
        fuse_head(before)
    assert losses(model) == fresh and len(fresh) == 2


def test_an_older_trainer_of_a_model_says_so(folder, tmp_path):
    model = loaded(folder / "student")
    older = grpo(model, tmp_path)
    GRPOTrainer(
        model, length, args=older.args, train_dataset=prompts(), processing_class=tokenizer()
    )
    with pytest.raises(KepoInputError, match="another trainer was made with the same model"):
        older.train()


# ---- teachers ----


def test_the_student_itself_is_refused(folder, tmp_path, make):
    model = loaded(folder / "student")
    with pytest.raises(KepoInputError, match="is the student itself"):
        make(model, tmp_path, model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_teacher_is_left_trainable(folder, tmp_path, make):
    """It may be a student elsewhere."""
    teacher = loaded(folder / "teacher")
    made = make(loaded(folder / "student"), tmp_path, teacher)
    made.train()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (3, "teacher_model is a int; expected a model"),
        ("http://host:8000/v1", "is the address .*teachers on a server are for"),
        ("no/such/folder", r"teacher_model is 'no/such/folder', and no model can be loaded"),
    ],
)
def test_what_is_no_model_is_refused(folder, tmp_path, make, teacher, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KepoInputError, match=words):
        make(loaded(folder / "student"), tmp_path, teacher)


def test_a_backbone_is_refused(folder, tmp_path, make):
    with pytest.raises(KepoInputError, match="head"):
        make(loaded(folder / "student"), tmp_path, loaded(folder / "teacher").model)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (95, "a vocabulary of 95, and processing_class has 96 tokens"),
        (96 + PADDING + 1, "at most 1024 rows of padding"),
        (96 + PADDING, None),
    ],
)
def test_other_vocabularies_are_refused_but_padded_ones(folder, tmp_path, make, rows, words):
    teacher = loaded(write_model(tmp_path / "other", vocabulary=rows))
    if words is None:
        make(loaded(folder / "student"), tmp_path, teacher).train()
        return
    with pytest.raises(KepoInputError, match=words):
        make(loaded(folder / "student"), tmp_path, teacher)


def test_another_tokenizer_is_refused(folder, tmp_path, make):
    other = write_model(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    text = text.replace('"w5":', '"w5_":').replace('"w6":', '"w5":').replace('"w5_":', '"w6":')
    (tmp_path / "other" / "tokenizer.json").write_text(text)
    with pytest.raises(KepoInputError, match="id 7 is 'w6' where it is 'w5' for the student"):
        make(loaded(folder / "student"), tmp_path, other)


@pytest.mark.parametrize("dtype", [torch.float32, "float32"], ids=str)
def test_a_teacher_is_loaded_in_the_dtype_that_was_asked_for(folder, tmp_path, dtype):
    how = dict(teacher_model_init_kwargs={"dtype": dtype})
    made = distillation(loaded(folder / "student"), tmp_path, str(folder / "teacher"), **how)
    assert made.teacher_model.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(gate_threshold=None), "gate_threshold is None; expected a finite number"),
        (dict(gate_threshold="1"), "gate_threshold is '1'; expected a finite number"),
        (dict(distill_beta=2), r"distill_beta is 2; expected a number in \[0, 1\]"),
        (dict(distill_coef=-1.0), r"distill_coef is -1.0; expected a number >= 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(folder, tmp_path, settings, words):
    with pytest.raises(KepoInputError, match=words):
        grpo(loaded(folder / "student"), tmp_path, **settings)


def test_two_rewards_of_one_name_cannot_be_the_gate(folder, tmp_path):
    def twice(model, _rewards, **given):
        return KepoGRPOTrainer(model, [length, length], **given)

    with pytest.raises(KepoInputError, match=r"gate_reward is 'length'; .* and 2 are called so"):
        grpo(loaded(folder / "student"), tmp_path, kind=twice, gate_reward="length")


def test_every_reason_for_a_fallback_is_named(folder, tmp_path, caplog):
    def both(model, rewards, args, **given):
        args.loss_type, args.off_policy_mask_threshold = "vespo", 0.5
        return KepoGRPOTrainer(model, rewards, args=args, **given)

    grpo(loaded(folder / "student"), tmp_path, kind=both)
    assert "loss_type='vespo', off_policy_mask_threshold=0.5 is not part of" in caplog.text
