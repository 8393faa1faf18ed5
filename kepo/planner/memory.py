"""The memory that a process of a run holds at once, phase by phase, in bytes.

    rollout     the student samples         cache and sampling, beside all that stays
    hints       the teacher writes hints, and the student samples with them
    scoring     teacher and reference read  activations; the teacher's states, kept to the update
    update      forward, loss, backward     activations, loss
    optimiser   AdamW                       its temporaries
    evaluation  the student answers         cache and sampling

Weights, gradients, AdamW's moments, teacher and reference stay from phase to phase. Each phase
goes through a few moments, and any of them may hold the most; `phases` returns the fullest one.
Sizes of tensors come from the models (`kepo.planner.model_sizes`) and from
`kepo_kernels.compute.chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from kepo.config import Config
from kepo.planner.activations import (
    Kept,
    inference,
    placed_bytes,
    state_bytes,
    text_training,
    vision_training,
)
from kepo.planner.generating import Generating, generating
from kepo.planner.loss_memory import LossMemory, loss_memory, scoring_workspace
from kepo.planner.model_sizes import ModelSizes, model_sizes
from kepo.planner.shapes import Shape, Share, share_of
from kepo.planner.standing import Held, Machine, Standing, standing
from kepo.rollout.hints import MAX_HINT_LENGTH
from kepo.sections import ModelsConfig, TeacherConfig

PHASES = ("rollout", "hints", "scoring", "update", "optimiser", "evaluation")


@dataclass(frozen=True)
class Prompts:
    """The length of the prompts; all have the same, as if padded to the longest."""

    text_tokens: int = 160
    """Tokens of chat markup, question and options."""
    image_tokens: int | None = None
    """Tokens of an image. None = those of 384 x 384 pixels, or of min_pixels or max_pixels where
    these do not let it be as large."""
    images: int = 1
    """Images of a prompt."""

    def image(self, model: ModelSizes) -> int:
        if model.tower is None:
            return 0
        tokens = self.image_tokens
        return model.default_image_tokens if tokens is None else tokens

    def all_images(self, model: ModelSizes) -> int:
        """Return the tokens of all images of a prompt."""
        return self.images * self.image(model)

    def length(self, model: ModelSizes) -> int:
        return self.text_tokens + self.all_images(model)

    def patches(self, model: ModelSizes) -> int:
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
    return [Phase(name, *max(found[name], key=_total)) for name in PHASES if found.get(name)]


def moments(setup: Setup) -> dict[str, list[Moment]]:
    """Return the moments of each phase, in the order in which they happen."""
    config, run = setup.config, _Run.of(setup)
    found = {"rollout": run.rollout(), "update": run.update(), "optimiser": run.optimiser()}
    if config.distils or config.kl_coef > 0:
        found["scoring"] = run.scoring()
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


def student_of(config: ModelsConfig, machine: Machine) -> ModelSizes:
    return model_sizes(
        config.student,
        config.dtype,
        machine.device,
        config.attn_implementation,
        config.lora_rank,
        config.freeze_vision,
        (config.min_pixels, config.max_pixels),
    )


def teachers_of(setup: Setup) -> list[ModelSizes]:
    """Return the teachers that the processes hold, the largest first; those of servers are none."""
    config = setup.config
    found = [
        model_sizes(
            path,
            config.dtype,
            setup.machine.device,
            config.attn_implementation,
            pixels=(config.min_pixels, config.max_pixels),
        )
        for path in config.local_teachers.values()
    ]
    return sorted(found, key=lambda one: -one.counts.total)


@dataclass(frozen=True)
class _Run:
    config: Config
    machine: Machine
    prompts: Prompts
    student: ModelSizes
    teacher: ModelSizes | None
    share: Share
    loss: LossMemory
    stays: Standing
    scores: int
    """Bytes of the teacher's states of a step, from scoring to the end of the update."""

    @classmethod
    def of(cls, setup: Setup) -> _Run:
        config, machine, prompts = setup
        student, teachers = student_of(config, machine), teachers_of(setup)
        teacher = next(iter(teachers), None)
        share = share_of(
            config, config, machine, prompts.length(student), student.shares_prompts(config)
        )
        several = share.micros > 1
        loss = loss_memory(
            config,
            machine.device,
            share.micro.completions * config.max_completion_length,
            several,
            student,
            teacher if config.distils else None,
        )
        stays = standing(
            config,
            config,
            machine,
            student,
            teachers,
            pages=loss.pages,
            several=several,
            penalised=config.kl_coef > 0,
        )
        scores = _kept_scores(setup, teacher, share.whole)
        return cls(config, machine, prompts, student, teacher, share, loss, stays, scores)

    @property
    def _longest_hint(self) -> int:
        return min(MAX_HINT_LENGTH, self.config.max_completion_length)

    # ---- phases ----

    def rollout(self) -> Iterator[Moment]:
        """Yield the moments of sampling; with vLLM one, with the memory that vLLM takes."""
        if self.config.sampler == "vllm":
            yield self._moment("vLLM", self._ready_to_sample())
            return
        yield from self._sampling(self.config.num_generations, self.prompts, "sampling")

    def hints(self) -> Iterator[Moment]:
        questions = -(-self.config.prompts_per_step // self.machine.gpus)
        longest = self._longest_hint
        at_once = min(questions, self.config.rollout_batch)
        temperature = self.config.hint_temperature if self.config.hint_retries else 0.0
        if self.teacher is not None:  # else a server writes them
            what = self._asked(self.teacher, at_once, 1, self.prompts)
            what = what._replace(new_tokens=longest, temperature=temperature, top_p=1.0)
            at_work = Held(teacher=self.stays.teacher_at_work)
            yield from self._generating("the teacher's hint", self.teacher, what, at_work)
        if self.config.sampler == "transformers" and self.config.samples_again:
            hinted = replace(self.prompts, text_tokens=self.prompts.text_tokens + longest)
            yield from self._sampling(self.config.num_hinted, hinted, "sampling with it")

    def evaluation(self) -> Iterator[Moment]:
        """Yield the moments of greedy answering, which uses the same sampler as a rollout."""
        if self.config.sampler == "vllm":
            yield self._moment("vLLM", self._ready_to_sample())
            return
        what = self._asked(self.student, self.config.eval_batch, 1, self.prompts)
        yield from self._generating("answering", self.student, what._replace(temperature=0.0))

    def scoring(self) -> Iterator[Moment]:
        """Yield the moments of teacher and reference, which are asked about one micro-batch after
        another; a teacher in host memory about all at once."""
        config, student, teacher, micro = self.config, self.student, self.teacher, self.share.micro
        # A sharded student that was not gathered keeps its root from the rollout.
        kept, root = self.scores, 0 if config.rollout_gather else self.stays.root
        if teacher is not None and config.distils:
            asked = self.share.whole if config.teacher_placement == "offload" else micro
            earlier = kept - kept * asked.completions // self.share.whole.completions
            held = Held(weights=root, teacher=earlier + self.stays.teacher_at_work)
            told = self._longest_hint if config.hints and config.hint_for == "teacher" else 0
            asked = asked._replace(length=asked.length + self._longer(teacher) + told)
            run = self._reading(teacher, asked)
            yield self._moment("teacher's forward", held + Held(activations=run))
        if config.kl_coef > 0:
            held = Held(weights=root, teacher=kept, reference=self.stays.reference_at_work)
            run = self._reading(student, micro)
            yield self._moment("reference's forward", held + Held(activations=run))
            tokens = micro.completions * config.max_completion_length
            states = state_bytes(student, 1, tokens) + self._read_from(student, micro)
            work = scoring_workspace(config, self.machine.device, tokens, student)
            held = Held(weights=root, teacher=kept, activations=states, loss=work)
            yield self._moment("reference's log-probabilities", held, idle=False)

    def optimiser(self) -> Iterator[Moment]:
        """Yield the moment of AdamW's step, with its temporaries: sqrt(v) and its quotient.

        On a GPU, torch updates all parameters at once (foreach) and holds one such tensor for each
        of them; on a CPU it updates one after another, and holds two of the largest. With moments
        in 8 bits a GPU needs none, and a CPU five in fp32, gradient and moments among them.
        """
        counts = self.student.counts
        temporary = self.stays.gradients
        if self.machine.device == "cpu":
            temporary = 2 * self.stays.gradients * counts.largest_trained // counts.trained
        if self.config.optimizer == "adamw_8bit":
            shards = self.machine.gpus if self.stays.sharded else 1
            temporary = 5 * 4 * counts.largest_trained // shards
            temporary *= self.machine.device == "cpu"
        held = Held(optimiser=temporary, teacher=self.scores)
        yield self._moment("AdamW", held, gradients=self.stays.gradients)

    def update(self) -> Iterator[Moment]:
        """Yield the moments of one micro-batch, in the order of its forward and backward."""
        config, student, stays = self.config, self.student, self.stays
        micro, checkpointing = self.share.micro, config.gradient_checkpointing
        images, patches = micro.questions * self.prompts.images, self.prompts.patches(student)
        vision = vision_training(student, images, patches, checkpointing)
        packed = student.shares_prompts(config)
        text = text_training(student, micro.rows, micro.length, checkpointing, packed)
        states = state_bytes(student, micro.rows, micro.length)
        tokens = micro.completions * config.max_completion_length
        own = state_bytes(student, 1, tokens)  # the states that the loss reads
        brought, flat = self._teacher_states(tokens)

        at_work = Held(
            weights=stays.root + stays.two_layers,
            gradients=stays.earlier_gradients,
            teacher=self.scores,
        )

        def moment(name: str, idle: bool = True, **held: int) -> Moment:
            return self._moment(name, at_work + Held(held), idle, gradients=0)

        yield moment("student's vision tower", activations=vision.forward + brought)
        forward = text.forward + placed_bytes(student, micro.rows, self.prompts.all_images(student))
        yield moment("student's forward", activations=vision.kept + forward + brought)
        kept = vision.kept + text.kept - states  # backward does not read the last states
        read = kept + own + self._read_from(student, micro) + brought + flat
        yield moment("loss", idle=False, activations=read, loss=self.loss.forward)
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

    def _reading(self, model: ModelSizes, shape: Shape) -> int:
        """Return the most bytes of a forward that keeps nothing."""
        images, patches = shape.questions * self.prompts.images, self.prompts.patches(model)
        placed = placed_bytes(model, shape.rows, self.prompts.all_images(model))
        packed = model.shares_prompts(self.config)
        return inference(model, shape.rows, shape.length, images, patches, packed) + placed

    def _read_from(self, model: ModelSizes, shape: Shape) -> int:
        """Return the bytes of states beside the copy that a loss reads: those of the prompts are
        part of the same tensor, unless a packed row has been gathered from."""
        if model.shares_prompts(self.config):
            return 0
        return state_bytes(model, shape.rows, shape.length)

    def _longer(self, teacher: ModelSizes) -> int:
        """Return the tokens by which the teacher's prompts are longer than the student's."""
        return self.prompts.length(teacher) - self.prompts.length(self.student)

    def _teacher_states(self, tokens: int) -> tuple[int, int]:
        """Return the bytes of the teacher's states of a micro-batch that are brought to the device
        for it, and of those that its loss copies because they are part of whole rows."""
        if self.teacher is None or not self.config.distils:
            return 0, 0
        states = state_bytes(self.teacher, 1, tokens)
        if not _scores_stay(self.config, self.machine):
            return states, 0
        return 0, 0 if self.teacher.shares_prompts(self.config) else states

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
        what = self._asked(self.student, self._at_once(per_question), per_question, prompts)
        yield from self._generating(name, self.student, what)

    def _asked(
        self, model: ModelSizes, questions: int, per_question: int, prompts: Prompts
    ) -> Generating:
        """Return a rollout of these questions."""
        return Generating(
            questions=questions,
            completions=per_question,
            prompt_tokens=prompts.length(model),
            images=questions * prompts.images,
            patches=prompts.patches(model),
            image_tokens=prompts.all_images(model),
            new_tokens=self.config.max_completion_length,
            temperature=self.config.sampling_temperature,
            top_p=self.config.top_p,
        )

    def _generating(
        self, name: str, model: ModelSizes, what: Generating, beside: Held | None = None
    ) -> Iterator[Moment]:
        ready = self._ready_to_sample() + (beside or Held())
        for moment, held in generating(model, what):
            yield self._moment(f"{name}: {moment}", ready + held)

    def _moment(
        self, name: str, held: Held, idle: bool = True, gradients: int | None = None
    ) -> Moment:
        """Return the moment of ``held`` and all that stays.

        idle: the pages of the loss are idle. gradients: None = those that exist while nothing
        trains.
        """
        there = self.stays.idle_gradients if gradients is None else gradients
        return Moment(name, self.stays.beside(held, idle) + Held(gradients=there))


def _kept_scores(setup: Setup, teacher: ModelSizes | None, whole: Shape) -> int:
    """Return the bytes of a step's states of the teacher, every gate open, while they wait for the
    update; 0 if they wait in host memory.

    Without packed rows they are part of whole rows, which stay with them.
    """
    config, machine, prompts = setup
    if teacher is None or not config.distils or not _scores_stay(config, machine):
        return 0
    longest = config.max_completion_length
    length = longest if teacher.shares_prompts(config) else prompts.length(teacher) + longest
    return state_bytes(teacher, whole.completions, length)


def _scores_stay(config: TeacherConfig, machine: Machine) -> bool:
    """Return whether the teacher's states stay on the device until the update."""
    return config.scores_on == "device" or machine.device == "cpu"
