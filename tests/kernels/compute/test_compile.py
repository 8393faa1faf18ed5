"""torch.compile of a model that ends in a loss: one graph, the same bits, the same gradients."""

from contextlib import nullcontext

import pytest
import torch
from checks import make_problem
from loss_calls import LOSSES, OPTIONS, arguments, call_of, leaves
from torch.autograd import forward_ad

import kepo_kernels
from kepo_kernels import Head, LoRA, fused_grpo_loss, fused_kepo_loss
from kepo_kernels.compute.compiled import STUDENT

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEACHER = {"gated_kd": "gate completion_mask teacher_bias"}


class Model(torch.nn.Module):
    """A layer, a softcapped head with a LoRA, and a loss."""

    def __init__(self, loss: str, dtype: torch.dtype = torch.float32, **settings: object):
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.settings = loss, settings
        self.below = torch.nn.Linear(16, 16, dtype=dtype)
        self.head = torch.nn.Linear(16, 37, dtype=dtype)
        self.a = torch.nn.Parameter(torch.randn(4, 16, dtype=dtype))
        self.b = torch.nn.Parameter(torch.randn(37, 4, dtype=dtype))

    def forward(self, x: torch.Tensor, call: dict[str, object]):
        hidden = self.below(x).tanh()
        head = Head(self.head.weight, softcap=5.0, logit_scale=1.5, lora=LoRA(self.a, self.b, 0.5))
        function = getattr(kepo_kernels, f"fused_{self.loss}_loss")
        return function(hidden, head, bias=self.head.bias, **call, **self.settings)


def call_for(loss: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict]:
    problem = make_problem(length=5, dtype=dtype)
    options = TEACHER.get(loss, OPTIONS[loss].replace(" bias", ""))
    call = arguments(loss, problem, options, chunk_rows=4)
    return call.pop("hidden"), {name: x for name, x in call.items() if name not in STUDENT}


def run(model: torch.nn.Module, step: torch.nn.Module, x: torch.Tensor, call: dict) -> dict:
    model.zero_grad()
    result = step(x, call)
    loss, stats = result if isinstance(result, tuple) else (result, ())
    (-2.5 * loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    numbers = {f"stats {i}": number for i, number in enumerate(stats) if number is not None}
    return {"loss": loss.detach()} | gradients | numbers


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph(loss, return_stats):
    """fullgraph=True: nothing of the loss breaks it."""
    model = Model(loss, return_stats=return_stats)
    x, call = call_for(loss)
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, call)
    assert actual.keys() == expected.keys() and len(actual) == 7 + 3 * return_stats
    for name, number in expected.items():
        assert torch.allclose(actual[name], number, rtol=1e-6, atol=1e-7), name


PARTS = {  # what is taken out of a joint call, by leaving it out or by None
    "no teacher": ("teacher_hidden", "teacher_lm_head", "teacher_bias", "gate"),
    "no policy": ("targets", "advantages", "old_logprobs"),
    "no gate": ("gate",),
}


@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_one_graph_of_one_part(part, none):
    """Also where weights alone say whose states the teacher gave."""
    model = Model("kepo", return_stats=True)
    x, call = call_for("kepo")
    if part == "no gate":
        weights = torch.rand(3, 5) * torch.tensor([[1.0], [0.0], [2.0]])
        states = call["teacher_hidden"][[0, 2]]
        call |= {"distill_weights": weights, "teacher_hidden": states}
    call = {name: x for name, x in call.items() if name not in PARTS[part]}
    call |= dict.fromkeys(PARTS[part] * none)
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, call)
    assert actual.keys() == expected.keys() and len(actual) == 10
    for name, number in expected.items():
        assert torch.allclose(actual[name], number, rtol=1e-6, atol=1e-7), name
    assert expected["stats 1"].any() == (part != "no teacher")


@pytest.mark.parametrize("loss", ["gated_kd", "kepo"])
def test_one_graph_of_a_teacher_of_tokens(loss):
    model = Model(loss, return_stats=True)
    x, call = call_for(loss)
    ids = torch.rand(3, 5, 37).topk(4).indices
    logprobs = torch.randn(3, 5, 5).log_softmax(-1)[..., :4]
    call = {name: y for name, y in call.items() if not name.startswith("teacher_")}
    call["teacher_hidden"] = kepo_kernels.TopK(ids, logprobs)
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, call)
    assert actual.keys() == expected.keys() and expected["stats 1"].any()
    for name, number in expected.items():
        assert torch.allclose(actual[name], number, rtol=1e-6, atol=1e-7), name


@pytest.mark.slow
def test_parts_that_do_not_belong_together_are_refused_as_in_eager_mode():
    for missing in (
        ("teacher_lm_head",),
        ("targets",),
        (*PARTS["no policy"], *PARTS["no teacher"]),
    ):
        call = {name: x for name, x in call_of("kepo").items() if name not in missing}
        errors = []
        for step in (fused_kepo_loss, torch.compile(fused_kepo_loss, backend="eager")):
            with pytest.raises(kepo_kernels.KepoInputError) as found:
                step(**call)
            errors.append(str(found.value))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("settings", [{"grad_tol": 1e-3}, {"logits_dtype": torch.float32}], ids=str)
def test_engine_settings(settings):
    model = Model("grpo", torch.bfloat16, return_stats=True, **settings)
    x, call = call_for("grpo", torch.bfloat16)
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, call)
    assert actual.keys() == expected.keys()
    for name, number in expected.items():
        assert torch.equal(actual[name], number), name


def test_one_graph_for_all_lengths():
    """A second length makes it dynamic; a third is not compiled again."""
    model, compiles = Model("grpo"), []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=counting)
    for length in (5, 6, 9, 11):
        call = arguments("grpo", make_problem(length=length), "completion_mask old_logprobs")
        x = call.pop("hidden")
        call.pop("lm_head")
        assert torch.allclose(step(x, call), model(x, call), rtol=1e-6)
    assert len(compiles) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "too many", "twice", "list"])
def test_wrong_calls_are_refused_as_in_eager_mode(fault):
    call = call_of("grpo")
    names = ("hidden", "lm_head", "targets", "advantages")
    args = [call.pop(name) for name in names]
    if fault == "missing":
        args.pop()
    if fault == "too many":
        args.append(call.pop("completion_mask"))
    if fault == "twice":
        call["targets"] = args[2]
    if fault == "list":
        call["temperature"] = [0.5]
    errors = []
    for step in (fused_grpo_loss, torch.compile(fused_grpo_loss, backend="eager")):
        with pytest.raises((TypeError, kepo_kernels.KepoInputError)) as found:
            step(*args, **call)
        errors.append((found.type, str(found.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual"])
def test_transforms_of_a_compiled_loss_are_refused(transform):
    """torch would compute the loss, and lose the tangents of forward mode without a word."""
    call = call_of("grpo")
    hidden = call.pop("hidden")

    def loss(x):
        return fused_grpo_loss(x, **call)

    def transformed(x):
        if transform == "grad":
            return torch.func.grad(loss)(x)
        return torch.func.jvp(loss, (x,), (x,)) if transform == "jvp" else loss(x)

    step = torch.compile(transformed, backend="eager")
    with forward_ad.dual_level() if transform == "dual" else nullcontext():
        x = forward_ad.make_dual(hidden, hidden) if transform == "dual" else hidden
        with pytest.raises(kepo_kernels.KepoInputError, match=r"torch\.autograd\.grad"):
            step(x)


def test_double_backward_of_a_compiled_loss_is_refused():
    call = leaves(call_of("grpo"))
    loss = torch.compile(fused_grpo_loss, backend="eager")(**call)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, call["hidden"], create_graph=True)


def test_autocast_in_the_graph():
    model = Model("grpo")
    x, call = call_for("grpo")

    def step(x, call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x, call)

    expected = run(model, step, x, call)
    actual = run(model, torch.compile(step, fullgraph=True, backend="aot_eager"), x, call)
    for name, number in expected.items():
        assert torch.allclose(actual[name], number, rtol=2**-7, atol=1e-5), name
        assert actual[name].dtype == torch.float32


def test_a_callable_breaks_the_graph_and_says_why():
    model = Model(
        "grpo", policy_loss=lambda logprobs, log_ratio, advantages: -advantages * logprobs
    )
    x, call = call_for("grpo")
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, backend="aot_eager"), x, call)
    assert all(torch.allclose(actual[k], expected[k], rtol=1e-6, atol=1e-7) for k in expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Python callable runs outside"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x, call)


@pytest.mark.parametrize("open_call", ["logprobs", "loss"])
def test_open_calls_break_the_graph_and_say_why(open_call):
    """They run eagerly between two graphs."""
    problem = make_problem(length=5)
    below = torch.nn.Linear(16, 16)

    def step(x):
        hidden = below(x).tanh()
        given = hidden, problem.lm_head, problem.targets
        if open_call == "logprobs":
            result = -kepo_kernels.fused_linear_logprobs(*given).mean()
        else:
            result = kepo_kernels.fused_linear_loss(*given, lambda stats, _: -stats.logprobs) / 15
        result.backward()
        gradient, below.weight.grad = below.weight.grad, None
        return result.detach() * 2, gradient

    expected = step(problem.hidden)
    actual = torch.compile(step, backend="aot_eager")(problem.hidden)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(actual, expected, strict=True))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"fused_linear_{open_call}.* outside"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(problem.hidden)


def test_bad_input_is_refused_when_the_graph_runs():
    model = Model("grpo")
    x, call = call_for("grpo")
    call["targets"] = call["targets"] + 1000
    with pytest.raises(kepo_kernels.KepoInputError, match="fused_grpo_loss: targets holds"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x, call)


@pytest.mark.parametrize("kind", ["meta states", "meta head", "mkldnn head", "sparse head"])
def test_what_has_no_plain_memory_is_refused_as_in_eager_mode(kind):
    """A graph would take meta tensors, and hand out what happens to stand in memory."""
    call = call_of("grpo")
    name = "hidden" if kind == "meta states" else "lm_head"
    make = {"meta": lambda x: x.to("meta"), "mkldnn": torch.Tensor.to_mkldnn}
    call[name] = make.get(kind.split()[0], torch.Tensor.to_sparse)(call[name])
    said = []
    for function in (fused_grpo_loss, torch.compile(fused_grpo_loss, backend="eager")):
        with pytest.raises(kepo_kernels.KepoInputError, match=f"{name}.* (meta|strided)") as caught:
            function(**call)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_opcheck_of_the_loss():
    problem = make_problem(length=5)
    constants = "{'lm_head.softcap': None, 'return_stats': True}"
    names = "targets advantages completion_mask; temperature lm_head.logit_scale; chunk_rows"
    student = (problem.hidden, problem.lm_head, problem.bias)
    others = [problem.targets, problem.advantages, problem.completion_mask]
    floats = [torch.tensor(x, dtype=torch.float64) for x in (0.7, 1.5)]
    arguments = (*(x.requires_grad_() for x in student), None, None, others, floats, [4])
    arguments = ("fused_grpo_loss", constants, names, *arguments, [True, True, True, False, False])
    torch.library.opcheck(torch.ops.kepo_kernels.fused_loss, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_inductor(loss):
    model = Model(loss)
    x, call = call_for(loss)
    expected = run(model, model, x, call)
    actual = run(model, torch.compile(model, fullgraph=True), x, call)
    for name, number in expected.items():
        assert torch.allclose(actual[name], number, rtol=1e-5, atol=1e-6), name
