"""The planner: sizes of released models, what a setting takes, the search; and that a layer on the
meta device holds what a real one does."""

from dataclasses import replace

import pytest
import torch

from kepo.config import Config
from kepo.errors import KepoConfigError
from kepo.planner import plan as plan_module
from kepo.planner.known_models import KNOWN, known_model
from kepo.planner.memory import Phase, Prompts, Setup, moments, peak, phases
from kepo.planner.model_sizes import model_sizes, read_config
from kepo.planner.plan import advice, largest, plan
from kepo.planner.plot import plot_plan
from kepo.planner.standing import GIB, Held, Machine, standing
from kepo.planner.trace import LiveBytes, trace_inference, trace_training

pytest.importorskip("transformers")
TOTALS = {  # billions, as published
    "Qwen3-VL-2B": 2.13,
    "Qwen3-VL-4B": 4.44,
    "Qwen3-VL-8B": 8.77,
    "Qwen3-VL-32B": 33.4,
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.5,
    "Qwen2.5-VL-72B": 73.4,
    "InternVL3-1B-hf": 0.938193024,
    "InternVL3-2B-hf": 2.088957440,
    "InternVL3-8B-hf": 7.944373760,
    "InternVL3-14B-hf": 15.1,
    "Qwen3-0.6B": 0.596049920,
    "Qwen3-1.7B": 1.720574976,
    "Qwen3-4B": 4.022468096,
    "Qwen3-8B": 8.190735360,
    "Llama-3.2-1B": 1.235814400,
    "Llama-3.2-3B": 3.212749824,
    "SmolLM2-135M": 0.134515008,
    "SmolLM2-360M": 0.361821120,
    "SmolLM2-1.7B": 1.711376384,
}
TIED = {"Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen2.5-VL-3B", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B"}
TIED |= {"Llama-3.2-1B", "Llama-3.2-3B", "SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B"}
PICTURE = {"Qwen3-VL": 144, "Qwen2.5-VL": 196, "InternVL3": 258}
"""Tokens of a picture of 384 x 384 pixels, by the beginning of the name; 0 of any other."""
SMALL = Config(
    student="Qwen3-VL-2B-Instruct",
    dtype="bfloat16",
    sharding="fsdp2",
    gradient_checkpointing=True,
    micro_batch=4,
    max_completion_length=256,
    hint_trigger="never",
    gate_reward=None,
    distill_coef=0.0,
)
TEACHER = dict(teacher="Qwen3-VL-8B-Instruct", distill_coef=1.0)


# ---- models ----


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_released_models(name):
    model = model_sizes(name, "bfloat16", "cuda")
    short = name.split("/")[1].removesuffix("-Instruct")
    exact = len(str(TOTALS[short])) > 5
    assert model.counts.total == pytest.approx(TOTALS[short] * 1e9, rel=1e-9 if exact else 0.02)
    assert model.tied == (short in TIED) and known_model(name.split("/")[1]) is KNOWN[name]
    family = next((family for family in PICTURE if short.startswith(family)), None)
    assert model.default_image_tokens == PICTURE.get(family, 0)
    assert model.shares_prompts(SMALL)


@pytest.mark.parametrize(
    "name", ["InternVL3-1B-hf", "Qwen3-0.6B", "Llama-3.2-1B-Instruct", "SmolLM2-135M-Instruct"]
)
def test_a_run_of_each_family_is_planned_to_its_end(name):
    setup = Setup(replace(SMALL, student=name, eval_share=0.1), Machine(2, 80 * GIB))
    found = {phase.name: phase.held for phase in phases(setup)}
    assert {"rollout", "update", "evaluation"} <= found.keys()
    width = 4 * model_sizes(name, "bfloat16", "cuda").counts.total // 2  # fp32, on two GPUs
    assert found["optimiser"]["weights"] == width


def test_parts_add_up():
    model = model_sizes("Qwen3-VL-8B-Instruct", "bfloat16", "cuda")
    counts = model.counts
    block = sum(p.numel() for p in model.blocks[0].parameters())
    whole = counts.root + counts.layer * len(model.layers) + block * len(model.blocks)
    assert whole == counts.total == counts.trained
    assert known_model("Qwen3-VL-8B-Instruct") is KNOWN["Qwen/Qwen3-VL-8B-Instruct"]


@pytest.mark.filterwarnings("error")  # peft's would stand above the table
def test_what_is_trained():
    pytest.importorskip("peft")
    adapted = model_sizes("Qwen3-VL-2B-Instruct", "bfloat16", "cuda", None, 16, False)
    # Seven matrices of 28 layers, each beside 16 x (rows + columns): q, k, v, o, gate, up, down.
    shapes = [(2048, 2048), (2048, 1024), (2048, 1024), (2048, 2048), *[(2048, 6144)] * 3]
    assert adapted.counts.trained == 28 * 16 * sum(map(sum, shapes)) == adapted.counts.adapters
    assert not adapted.trains_head and not adapted.trains_vision
    frozen = model_sizes("Qwen3-VL-2B-Instruct", "bfloat16", "cuda", None, 0, True)
    assert frozen.trains_head and not frozen.trains_vision


def test_unknown_model():
    with pytest.raises(KepoConfigError, match=r"^/nowhere/model: its config cannot be read"):
        read_config("/nowhere/model")


def test_model_of_another_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(KepoConfigError, match=r"of type 'llava'.*expected one of qwen3_vl"):
        read_config(str(tmp_path))


def test_items_are_known():
    with pytest.raises(AssertionError):
        Held(weights=1) + Held(weight=1)


# ---- the meta device against memory ----


@pytest.mark.parametrize("masked", [True, False])
def test_layer_holds_what_it_would(made, masked):
    """Storages of a real decoder layer on the CPU, counted as they come and go, and traced."""
    from kepo.models.vlm import VLM

    real = VLM.load(made / "student").model.model.language_model.layers[0].train()
    traced = model_sizes(str(made / "student"), "float32", "cpu", None if masked else "flash")
    rows, length, hidden = 3, 40, traced.hidden
    x = torch.randn(rows, length, hidden, requires_grad=True)
    rotary = (torch.randn(rows, length, 24), torch.randn(rows, length, 24))
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril() if masked else None
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes("cpu") as live:
        out = real(x, position_embeddings=rotary, attention_mask=mask)
        kept, forward = live.now, live.peak
        upstream = torch.ones_like(out)
        live.peak = live.now
        out.backward(upstream)
    found = traced.layer(rows, length, True, False)
    assert found.kept == pytest.approx(kept, rel=0.02)
    assert found.forward == pytest.approx(forward, rel=0.05)
    assert found.backward == pytest.approx(live.peak - kept, rel=0.1)


def test_live_bytes():
    """Views share, what is freed is gone, what was there before does not count."""
    before = torch.empty(100, device="meta")
    weight = torch.nn.Parameter(torch.empty(10, 10, device="meta"))

    def call():
        twice = before * 2  # 400 bytes, gone before the next
        half = twice[:50] + 1  # 200
        del twice
        return half.view(5, 10) @ weight  # 200

    found = trace_inference(call, "cpu")
    assert (found.kept, found.forward) == (200, 600)
    trained = trace_training(call, [weight], "cpu")
    assert trained.kept == 400  # the product's operand too
    assert weight.grad is not None


# ---- phases ----


def test_each_setting_takes_or_saves():
    """What a setting is for, seen in the item it is about."""
    machine = Machine(4, 80 * GIB)

    def held(name, item, **change):
        found = phases(Setup(replace(SMALL, **change), machine))
        return next(phase for phase in found if phase.name == name).held[item]

    width = 2 * 2127532032  # bytes of a whole copy in bf16
    assert held("optimiser", "weights") == pytest.approx(2 * width / 4)
    assert held("update", "gradients", kl_coef=0.1) >= 2 * width / 4
    assert held("rollout", "weights") == pytest.approx(2 * width / 4 + width)
    assert held("rollout", "weights", rollout_gather=False) < 2 * width / 4 + width / 2
    whole = held("rollout", "teacher", **TEACHER)
    assert whole == 2 * 8767123696
    shared = held("rollout", "teacher", teacher_placement="fsdp2", **TEACHER)
    offloaded = held("rollout", "teacher", teacher_placement="offload", **TEACHER)
    assert offloaded < shared < whole / 2
    four, eight = (held("rollout", "teacher", teacher_bits=bits, **TEACHER) for bits in (4, 8))
    assert four < eight < whole
    # What the teacher said waits in host memory, or on the device until the update is over.
    states = 2 * 4096 * 32 * 256  # of a process's 32 completions
    stays = TEACHER | dict(scores_on="device")
    for name in ("update", "optimiser"):
        assert held(name, "teacher", **stays) == held(name, "teacher", **TEACHER) + states
    assert held("rollout", "teacher", **stays) == held("rollout", "teacher", **TEACHER) == whole
    before = held("scoring", "teacher", **stays) - whole  # the last micro-batch's are to come
    assert states // 2 < before < states
    alone = held("update", "activations", share_prompts=False)
    assert alone > 1.5 * held("update", "activations")
    unmasked = held("update", "activations", attn_implementation="flash_attention_2")
    assert unmasked == pytest.approx(alone, rel=0.01)
    assert held("update", "activations", micro_tokens=1000) < 0.8 * held("update", "activations")
    together = held("scoring", "activations", teacher_placement="offload", **TEACHER)
    assert together > 3 * held("scoring", "activations", **TEACHER)
    share = int(0.3 * 80 * GIB)
    assert held("rollout", "cache", sampler="vllm") == share
    assert held("evaluation", "cache", sampler="vllm", eval_share=0.1) == share
    hinted = TEACHER | dict(hint_trigger="always")
    assert (
        held("hints", "cache", sampler="vllm", **hinted) > share
    )  # it is awake beside the teacher
    assert held("rollout", "cache", rollout_batch=16) < held("rollout", "cache")
    assert held("rollout", "cache", rollout_tokens=8000) < held("rollout", "cache")
    plain = held("update", "activations", gradient_checkpointing=False)
    assert plain > 3 * held("update", "activations")


def test_a_plan_is_for_the_named_machine_whatever_is_here(monkeypatch):
    setup = Setup(replace(SMALL, device="cuda"), Machine(4, 80 * GIB))
    truth = phases(setup)
    for here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert phases(setup._replace(config=replace(SMALL, device="auto"))) == truth


def test_mini_batches_are_planned_as_they_are_laid_out():
    """A step in four parts is as four steps of a quarter of the questions, but for what the
    teacher said of all of them."""
    machine = Machine(1, 80 * GIB)
    config = replace(SMALL, **TEACHER, scores_on="device", rollout_batch=8, micro_batch=64)
    quarter = replace(config, prompts_per_step=config.prompts_per_step // 4)

    def update(config):
        return next(p for p in phases(Setup(config, machine)) if p.name == "update").held

    parts, alone = update(replace(config, mini_batches=4)), update(quarter)
    assert all(parts[item] == alone[item] for item in parts if item not in ("teacher", "reserve"))
    assert parts["activations"] < update(config)["activations"]
    states = 2 * 4096 * 256 * quarter.prompts_per_step * config.num_generations
    assert parts["teacher"] - alone["teacher"] == 3 * states


def test_moments_of_8_bits_and_a_student_of_4_take_less():
    def held(**change):
        return phases(Setup(replace(SMALL, **change), Machine(4, 80 * GIB)))[0].held

    trained = model_sizes(SMALL.student, "bfloat16", "cuda").counts.trained
    assert held()["optimiser"] == 2 * 4 * trained // 4
    eight = held(optimizer="adamw_8bit")["optimiser"]
    assert eight == pytest.approx(2 * (1 + 4 / 256) * trained / 4, rel=1e-6)
    adapters = dict(lora_rank=16, sharding="none", kl_coef=0.1)
    counts = model_sizes(SMALL.student, "bfloat16", "cuda", lora_rank=16).counts
    whole, four = held(**adapters), held(**adapters, student_bits=4)
    saved = counts.linear * (2 - 4.5 / 8)
    unpacked = 2 * counts.largest_linear
    assert whole["weights"] - four["weights"] == pytest.approx(saved - unpacked, rel=1e-6)
    assert whole["reference"] - four["reference"] == pytest.approx(saved, rel=1e-6)


def test_the_loss_takes_more_with_a_teacher():
    def loss(**change):
        found = moments(Setup(replace(SMALL, **change), Machine(4, 80 * GIB)))["update"]
        return next(moment.held["loss"] for moment in found if moment.name == "loss")

    assert loss(**TEACHER) > loss() > 0


def test_more_takes_more():
    """In the phase that a setting is about."""
    machine = Machine(1, 80 * GIB)
    config = replace(SMALL, rollout_batch=1024, eval_share=0.1)

    def total(phase, **change):
        found = phases(Setup(replace(config, **change), machine))
        return next(p.total for p in found if p.name == phase)

    for phase, name in (
        ("update", "micro_batch"),
        ("update", "max_completion_length"),
        ("rollout", "max_completion_length"),
        ("rollout", "prompts_per_step"),
        ("evaluation", "eval_batch"),
    ):
        one, two, four = (total(phase, **{name: n * getattr(config, name)}) for n in (1, 2, 4))
        assert one < two < four, (phase, name)


@pytest.mark.parametrize("gpus, micro_batch, sets", [(1, 128, 0), (1, 4, 1), (4, 32, 1), (4, 4, 2)])
def test_gradients_beside_the_buckets(gpus, micro_batch, sets):
    """DDP's buckets are one set; the sum over earlier micro-batches is another."""
    config = replace(SMALL, sharding="none", dtype="float32", micro_batch=micro_batch)
    machine = Machine(gpus, 80 * GIB)
    student = model_sizes(config.student, "float32", "cuda")
    stays = standing(
        config,
        config,
        machine,
        student,
        (),
        pages=0,
        several=micro_batch < 128 // gpus,
        penalised=False,
    )
    assert stays.earlier_gradients == sets * 4 * student.counts.trained
    update = next(p for p in phases(Setup(config, machine)) if p.name == "update")
    assert update.held["gradients"] >= sets * 4 * student.counts.trained


def test_reference_is_held_as_the_policy():
    counts = model_sizes("Qwen3-VL-2B-Instruct", "bfloat16", "cuda").counts

    def held(**change):
        config = replace(SMALL, kl_coef=0.1, **change)
        return phases(Setup(config, Machine(4, 80 * GIB)))[0].held["reference"]

    assert held() == 2 * counts.total // 4 + 2 * counts.root
    assert held(sharding="none", dtype="float32") == 4 * counts.total


def test_weights_reach_vllm_one_at_a_time():
    config = replace(SMALL, sampler="vllm", rollout_gather=False)
    counts = model_sizes(config.student, "bfloat16", "cuda").counts
    assert counts.largest == 151936 * 2048  # the embedding, which is most of the root in bf16
    shared = 4 * counts.total // 4
    found = phases(Setup(config, Machine(4, 80 * GIB)))[0].held["weights"] - shared
    assert found == max(4 * counts.largest, 2 * counts.root)


# ---- the command ----


@pytest.mark.parametrize("limit, most", [(0, 9), (1, 9), (5, 9), (8, 9), (9, 9), (40, 9), (6, 1)])
def test_largest(limit, most):
    assert largest(lambda n: n <= limit, most) == min(limit, most)


def test_largest_tries_all_at_once():
    assert largest(lambda n: n <= 3 or n == 9, 9) == 9


def test_no_completion_is_longer_than_the_student_has_positions_for(tinies):
    """A run would leave every question out as too long."""
    config = Config(student=str(tinies / "qwen3"), hint_trigger="never", gate_reward=None)
    config = replace(config, distill_coef=0.0, prompts_per_step=2, micro_batch=1)
    machine, prompts = Machine(1, 80 * GIB), Prompts(text_tokens=100, image_tokens=200)
    assert plan(Setup(config, machine, prompts)).max_completion_length == 3792  # 4096 positions
    long = replace(config, max_completion_length=3797)
    with pytest.raises(KepoConfigError, match=r"^max_completion_length=3797: .* for 3796 tokens"):
        plan(Setup(long, machine, prompts))


@pytest.mark.slow
def test_largest_settings_fit_and_no_larger():
    machine = Machine(1, 60 * GIB)
    config = replace(SMALL, prompts_per_step=64, rollout_batch=64)
    found = plan(Setup(config, machine))
    assert 0 < found.micro_batch < 512 and found.max_completion_length > 0

    def fits(**change):
        return peak(Setup(replace(config, **change), machine)).total <= 0.97 * 60 * GIB

    assert fits(micro_batch=found.micro_batch) and not fits(micro_batch=found.micro_batch + 1)
    longest = found.max_completion_length
    assert fits(max_completion_length=longest) and not fits(max_completion_length=longest + 16)


def test_advice_is_what_it_says():
    machine = Machine(2, 20 * GIB)
    now = peak(Setup(SMALL, machine)).total
    found = advice(Setup(SMALL, machine))
    assert [c.peak for c in found] == sorted(c.peak for c in found)
    lora = next(change for change in found if change.setting == "lora_rank: 16")
    assert lora.peak == peak(Setup(replace(SMALL, lora_rank=16), machine)).total < now


def test_advice_is_not_refused():
    machine = Machine(2, 20 * GIB)

    def settings(**change):
        found = advice(Setup(replace(SMALL, **change), machine))
        return {found.setting.split(":")[0] for found in found}

    assert {"lora_rank", "rollout_batch"} <= settings()
    assert "rollout_batch" not in settings(rollout_batch=8)  # a question's completions, at least
    sampler = settings(sampler="vllm", vllm_memory=0.6)
    assert "vllm_memory" in sampler and "lora_rank" not in sampler
    assert "eval_batch" in settings(eval_share=0.1, eval_batch=512)
    many = dict(prompts_per_step=256, rollout_batch=1024, rollout_tokens=300000)
    assert "rollout_tokens" in settings(**many)
    large = dict(rollout_batch=8, micro_batch=64, micro_tokens=20000)
    assert "micro_tokens" in settings(**large, gradient_checkpointing=False)
    assert "share_prompts" in settings(**large, share_prompts=False)
    long = TEACHER | dict(rollout_batch=8, max_completion_length=4096)
    assert "scores_on" in settings(**long, scores_on="device")


def test_what_train_refuses_is_not_planned():
    with pytest.raises(KepoConfigError, match="dtype='bfloat16' would keep"):
        plan(Setup(replace(SMALL, sharding="none"), Machine(1, 80 * GIB)))
    with pytest.raises(KepoConfigError, match="too little for a chunk of one row"):
        plan(Setup(replace(SMALL, workspace_bytes=1000), Machine(1, 80 * GIB)))


def test_command(capsys, tmp_path):
    recipe = tmp_path / "1x60gb_small.yaml"
    recipe.write_text(
        "student: Qwen3-VL-2B-Instruct\ndtype: bfloat16\nsharding: fsdp2\nhint_trigger: never\n"
        "gate_reward: null\ndistill_coef: 0.0\n"
    )

    def run(*words):
        code = plan_module.main([str(word) for word in words])
        return code, capsys.readouterr().out

    picture = tmp_path / "plan.png"
    code, out = run(recipe, "--micro-batch", "2", "--plot", picture)
    assert code == 0 and ": fits" in out and "1 x 60 GB" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out = run(recipe, "--micro-batch", "2", "--gpu-gb", "30")
    assert code == 1 and "does not fit" in out and "lora_rank: 16" in out
    with pytest.raises(KepoConfigError, match="give --gpus and --gpu-gb"):
        run("dr_grpo", "--student", "Qwen3-VL-2B-Instruct")
    with pytest.raises(KepoConfigError, match="student is not set"):
        run("dr_grpo", "--gpus", "1", "--gpu-gb", "24")


def test_picture(tmp_path):
    held = Held(weights=GIB, cache=2 * GIB)
    plot_plan([Phase("rollout", "x", held)], Machine(1, 4 * GIB), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("gpu_gb", x) for x in ("nan", "inf", "-5", "0", "1e300")),
        *(("gpus", x) for x in ("0", "-3")),
        *(("prompt_tokens", "0"), ("image_tokens", "-1"), ("prompt_images", "0")),
    ],
)
def test_numbers_of_a_machine_and_prompts_that_cannot_be_are_refused(flag, value):
    words = {"gpus": "1", "gpu_gb": "80", flag: value}
    flags = [x for name, word in words.items() for x in (f"--{name.replace('_', '-')}", word)]
    with pytest.raises(KepoConfigError, match=f"{flag} is .*; expected a number"):
        plan_module.main(["grpo", "--student", "Qwen3-VL-2B-Instruct", *flags])


def test_a_teacher_behind_a_server_takes_no_memory_and_several_take_theirs():
    name, far = TEACHER["teacher"], "http://host:1/v1"

    def teachers_bytes(**change):
        config = replace(SMALL, **{**TEACHER, **change})
        made = phases(Setup(config, Machine(1, 80 * GIB)))
        return {phase.name: phase.held["teacher"] for phase in made}

    one = teachers_bytes()
    assert set(teachers_bytes(teacher=far).values()) == {0}
    assert teachers_bytes(teacher=None, teachers={"CT": name, "MR": far}) == one
    both = teachers_bytes(teacher=None, teachers={"CT": name, "MR": name})
    weights = 2 * model_sizes(name, SMALL.dtype, "cuda").counts.total
    assert {both[phase] - one[phase] for phase in one} == {weights}
    assert plan_module._teacher(replace(SMALL, teacher=far)) == "on a server"
    assert plan_module._teacher(SMALL) == "–"
