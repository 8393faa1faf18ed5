"""The memory that a process of a run holds at once, phase by phase, in bytes.

    rollout     the student samples               cache and sampling, beside all that stays
    hints       the teacher writes hints, and the student samples with them
    update      forward, teacher, loss, backward  activations, loss
    optimiser   AdamW                             its temporaries
    evaluation  the student answers               cache and sampling

Weights, gradients, AdamW's moments, teacher and reference stay from phase to phase. Each phase
goes through a few moments, and any of them may hold the most; `phases` returns the fullest one.
Sizes of tensors come from the models (`kepo.planner.anatomy`) and `kepo_kernels.compute.chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from kepo.config import Config
from kepo.planner.anatomy import Anatomy, anatomy
from kepo.planner.held import Held, Machine, Standing, completions_per_process, standing
from kepo.planner.loss_memory import LossMemory, loss_memory
from kepo.planner.towers import Kept, image_bytes, inference, text_training, vision_training
from kepo.rollout.hints import MAX_HINT_LENGTH
from kepo.sections import ModelsConfig

PHASES = ("rollout", "hints", "update", "optimiser", "evaluation")


@dataclass(frozen=True)
class Prompts:
    """The length of the prompts; all have the same, as if padded to the longest."""

    text_tokens: int = 160
    """Tokens of chat markup, question and options."""
    image_tokens: int | None = None
    """Tokens of an image. None = those of 384 x 384 pixels."""
    images: int = 1
    """Images of a prompt."""

    def image(self, model: Anatomy) -> int:
        tokens = self.image_tokens
        return model.default_image_tokens if tokens is None else tokens

    def length(self, model: Anatomy) -> int:
        return self.text_tokens + self.images * self.image(model)

    def patches(self, model: Anatomy) -> int:
        return self.image(model) * model.patches_per_token


class Setup(NamedTuple):
    """A run's config, its machine, and the length of its prompts."""

    config: Config
    machine: Machine
    prompts: Prompts = Prompts()


class Moment(NamedTuple):
    """One moment of a phase, and the bytes held then."""

    name: str
    held: Held


@dataclass(frozen=True)
class Phase:
    """A phase at the moment when it holds most."""

    name: str
    moment: str
    held: Held

    @property
    def total(self) -> int:
        return sum(self.held.values())


def phases(setup: Setup) -> list[Phase]:
    """Return the phases of a step of this run, each at the moment when it holds most."""
    found = moments(setup)
    return [Phase(name, *max(found[name], key=_total)) for name in PHASES if name in found]


def moments(setup: Setup) -> dict[str, list[Moment]]:
    """Return the moments of each phase, in the order in which they happen."""
    config, run = setup.config, _Run.of(setup)
    found = {"rollout": run.rollout(), "update": run.update(), "optimiser": run.optimiser()}
    if config.hints:
        found["hints"] = run.hints()
    if config.eval_data is not None or config.eval_share:
        found["evaluation"] = run.evaluation()
    return {name: list(each) for name, each in found.items()}


def peak(setup: Setup) -> Phase:
    """Return the phase that holds most."""
    return max(phases(setup), key=lambda phase: phase.total)


def _total(moment: Moment) -> int:
    return sum(moment.held.values())


def student_of(config: ModelsConfig, machine: Machine) -> Anatomy:
    return anatomy(
        config.student,
        config.dtype,
        machine.device,
        config.attn_implementation,
        config.lora_rank,
        config.freeze_vision,
    )


def teacher_of(setup: Setup) -> Anatomy | None:
    config = setup.config
    if config.taught_by is None:
        return None
    return anatomy(config.taught_by, config.dtype, setup.machine.device, config.attn_implementation)


@dataclass(frozen=True)
class _Run:
    config: Config
    machine: Machine
    prompts: Prompts
    student: Anatomy
    teacher: Anatomy | None
    loss: LossMemory
    stays: Standing

    @classmethod
    def of(cls, setup: Setup) -> _Run:
        config, machine, prompts = setup
        student, teacher = student_of(config, machine), teacher_of(setup)
        loss = _loss(setup, student, teacher)
        stays = standing(
            config,
            machine,
            student,
            teacher,
            pages=loss.pages,
            several=completions_per_process(config, machine) > config.micro_batch,
            penalised=config.kl_coef > 0,
        )
        return cls(config, machine, prompts, student, teacher, loss, stays)

    # ---- phases ----

    def rollout(self) -> Iterator[Moment]:
        """Yield the moments of sampling; with vLLM one, with the memory that vLLM takes."""
        if self.config.sampler == "vllm":
            yield self._moment("vLLM", self._ready_to_sample())
            return
        yield from self._sampling(self.config.num_generations, self.prompts, "sampling")

    def hints(self) -> Iterator[Moment]:
        assert self.teacher is not None, "hints need a teacher"
        questions = -(-self.config.prompts_per_step // self.machine.gpus)
        longest = min(MAX_HINT_LENGTH, self.config.max_completion_length)
        at_once = min(questions, self.config.rollout_batch)
        extra = self._ready_to_sample() + Held(teacher=self.stays.teacher_at_work)
        yield from self._generating(
            self.teacher, at_once, 1, self.prompts, longest, 0.0, extra, "the teacher's hint"
        )
        if self.config.sampler == "transformers":
            hinted = replace(self.prompts, text_tokens=self.prompts.text_tokens + longest)
            yield from self._sampling(self.config.num_hinted, hinted, "sampling with it")

    def evaluation(self) -> Iterator[Moment]:
        """Yield the moments of greedy answering, which uses the same sampler as a rollout."""
        if self.config.sampler == "vllm":
            yield self._moment("vLLM", self._ready_to_sample())
            return
        longest, at_once = self.config.max_completion_length, self.config.eval_batch
        extra = self._ready_to_sample()
        yield from self._generating(
            self.student, at_once, 1, self.prompts, longest, 0.0, extra, "answering"
        )

    def optimiser(self) -> Iterator[Moment]:
        """Yield the moment of AdamW's step, with its temporaries: sqrt(v) and its quotient.

        On a GPU, torch updates all parameters at once (foreach) and holds one such tensor for each
        of them; on a CPU it updates one after another, and holds two of the largest.
        """
        counts = self.student.counts
        temporary = self.stays.gradients
        if self.machine.device == "cpu":
            temporary = 2 * self.stays.gradients * counts.largest_trained // counts.trained
        held = Held(optimiser=temporary)
        yield self._moment("AdamW", held, gradients=self.stays.gradients)

    def update(self) -> Iterator[Moment]:
        """Yield the moments of one micro-batch, in the order of its forward and backward."""
        config, student, teacher, stays = self.config, self.student, self.teacher, self.stays
        rows = min(config.micro_batch, completions_per_process(config, self.machine))
        length = self.prompts.length(student) + config.max_completion_length
        states = rows * length * student.hidden * student.dtype.itemsize
        # An image is seen once for all completions of its question, and a micro-batch may begin and
        # end in the middle of a group.
        questions = min(rows, -(-(rows - 1) // config.num_generations) + 1)
        images = questions * self.prompts.images
        patches, checkpointing = self.prompts.patches(student), config.gradient_checkpointing
        vision = vision_training(student, images, patches, checkpointing)
        text = text_training(student, rows, length, checkpointing)
        placed = self._placed(student, rows)

        at_work = Held(weights=stays.root + stays.two_layers, gradients=stays.earlier_gradients)

        def moment(name: str, idle: bool = True, **held: int) -> Moment:
            return self._moment(name, at_work + Held(held), idle, gradients=0)

        yield moment("student's vision tower", activations=vision.forward)
        yield moment("student's forward", activations=vision.kept + text.forward + placed)
        kept = vision.kept + text.kept
        other = 0
        if config.kl_coef > 0:
            run = inference(student, rows, length, images, patches) + placed
            yield moment(
                "reference's forward", activations=kept + run, reference=stays.reference_at_work
            )
            other += states
        if teacher is not None and config.distils:
            long = self.prompts.length(teacher) + config.max_completion_length
            run = inference(teacher, rows, long, images, self.prompts.patches(teacher))
            run += self._placed(teacher, rows)
            yield moment(
                "teacher's forward", activations=kept + other + run, teacher=stays.teacher_at_work
            )
            other += rows * long * teacher.hidden * teacher.dtype.itemsize
        yield moment("loss", idle=False, activations=kept + other, loss=self.loss.forward)
        yield moment("loss's backward", idle=False, activations=kept, loss=self.loss.backward)
        yield from self._backward(states, vision, text, moment)

    def _backward(
        self,
        states: int,
        vision: Kept,
        text: Kept,
        moment: Callable[..., Moment],
    ) -> Iterator[Moment]:
        """Yield the moments of backward through both towers.

        Gradients of parameters appear as activations go. Sharded ones are whole until the last of
        their group is there, and are sent in fp32.
        """
        counts, width, stays = self.student.counts, self.student.dtype.itemsize, self.stays
        tied = self.student.tied
        # The head's gradient is added to its parameter's at once, unless it has to wait for the
        # embedding's gradient or for the others of its group.
        waits = tied or stays.sharded or not stays.earlier_gradients
        waiting = self.loss.head_gradient if waits else 0
        sent = counts.layer_trained * (width + 4) if stays.sharded else 0
        yield moment(
            "last layer's backward",
            activations=vision.kept + text.kept + states + text.backward,
            gradients=waiting + sent,
        )
        formed = max(0, stays.gradients - stays.earlier_gradients)
        waiting = self.loss.head_gradient if tied or stays.sharded else 0
        if self.student.trains_vision:
            yield moment(
                "vision tower's backward",
                activations=vision.kept + states + vision.backward,
                gradients=formed + waiting + sent,
            )
        if self.student.trains_head:
            embedding = self.student.vocab * self.student.hidden * width
            if tied and self.machine.device == "cpu":
                embedding *= 2  # the sum is a new tensor: torch does not add in place to our pages
            if stays.sharded:
                embedding, waiting = max(embedding, counts.root_trained * (width + 4)), 0
            yield moment(
                "embedding's backward", activations=states, gradients=formed + waiting + embedding
            )

    # ---- their parts ----

    def _ready_to_sample(self) -> Held:
        """Return the memory of the sampler while it is awake: from the first sample to the last
        hint."""
        if self.config.sampler == "vllm":
            # vLLM's own weights and cache; the student's are made whole one fp32 tensor at a time.
            share = int(self.config.vllm_memory * self.machine.gpu_bytes)
            tensor = 4 * self.student.counts.largest if self.stays.sharded else 0
            return Held(cache=share, weights=max(self.stays.root, tensor))
        return Held(weights=self._gathered())

    def _gathered(self) -> int:
        if self.config.rollout_gather:
            return self.stays.whole
        return self.stays.root + self.stays.two_layers

    def _placed(self, model: Anatomy, rows: int) -> int:
        """Return the bytes of the images' features, copied into every row that shows them."""
        tokens = rows * self.prompts.images * self.prompts.image(model)
        return tokens * model.hidden * model.dtype.itemsize * model.features

    def _at_once(self, per_question: int) -> int:
        """Return how many questions a process samples at once, as `rollout._portions` does."""
        config = self.config
        questions = -(-config.prompts_per_step // self.machine.gpus)
        at_once = max(1, config.rollout_batch // per_question)
        if config.rollout_tokens is not None:
            longest = self.prompts.length(self.student) + config.max_completion_length
            at_once = min(at_once, max(1, config.rollout_tokens // (per_question * longest)))
        return min(questions, at_once)

    def _sampling(self, per_question: int, prompts: Prompts, name: str) -> Iterator[Moment]:
        yield from self._generating(
            self.student,
            self._at_once(per_question),
            per_question,
            prompts,
            self.config.max_completion_length,
            self.config.sampling_temperature,
            self._ready_to_sample(),
            name,
        )

    def _generating(
        self,
        model: Anatomy,
        questions: int,
        per_question: int,
        prompts: Prompts,
        new_tokens: int,
        temperature: float,
        extra: Held,
        name: str,
    ) -> Iterator[Moment]:
        """Yield the moments of transformers' generate: all prompts at once, then token by token."""
        length, patches = prompts.length(model), prompts.patches(model)
        sequences, images = questions * per_question, questions * prompts.images
        pictures = image_bytes(model, images, patches)  # they stay with the inputs to the end
        cache = sequences * model.cache_bytes_per_token
        first = inference(model, sequences, length, images, patches)
        first += self._placed(model, sequences)
        yield self._moment(
            f"{name}: prompts", extra + Held(cache=cache * length, activations=first)
        )
        longest = length + new_tokens - 1
        logits = sequences * model.vocab * model.dtype.itemsize
        draws = logits + model.drawing(sequences, temperature, self.config.top_p)
        appended = model.decoding_layer(sequences, longest)
        at_end = extra + Held(cache=cache * longest, activations=pictures)
        yield self._moment(f"{name}: last token", at_end + Held(cache=appended))
        yield self._moment(f"{name}: last draw", at_end + Held(sampling=draws))

    def _moment(
        self, name: str, held: Held, idle: bool = True, gradients: int | None = None
    ) -> Moment:
        """Return the moment of ``held`` and all that stays.

        idle: the pages of the loss are idle. gradients: None = those that exist while nothing
        trains.
        """
        there = self.stays.idle_gradients if gradients is None else gradients
        return Moment(name, self.stays.beside(held, idle) + Held(gradients=there))


def _loss(setup: Setup, student: Anatomy, teacher: Anatomy | None) -> LossMemory:
    config, machine = setup.config, setup.machine
    completions = completions_per_process(config, machine)
    return loss_memory(
        config,
        machine.device,
        min(config.micro_batch, completions) * config.max_completion_length,
        completions > config.micro_batch,
        student,
        teacher if config.distils else None,
    )
