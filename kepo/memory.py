"""What a process of a run holds at once, phase by phase, in bytes: sums over the parts of the models.

    rollout     the student samples               cache and sampling, beside all that stays
    hints       the teacher writes, and samples with hints
    update      forward, teacher, loss, backward  activations, loss
    optimiser   AdamW

What stays from phase to phase are weights, gradients, AdamW's moments, teacher and reference. Each
phase goes through a few moments at any of which it may hold the most; `phases` returns that one.
Sizes of tensors come from the models (`kepo.anatomy`) and from `kepo_kernels.plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kepo.anatomy import Anatomy, anatomy
from kepo.config import Config
from kepo.errors import KepoConfigError
from kepo.hints import MAX_HINT_LENGTH
from kepo.held import Held, Machine, Standing, standing
from kepo.loss_memory import LossMemory, loss_memory

PHASES = ("rollout", "hints", "update", "optimiser", "evaluation")


@dataclass(frozen=True)
class Prompts:
    """How long they are; all alike, as if padded to the longest."""

    text_tokens: int = 160
    """Chat markup, question and options."""
    image_tokens: int | None = None
    """Of its image. None = of 384 x 384 pixels."""

    def image(self, model: Anatomy) -> int:
        tokens = self.image_tokens
        return model.default_image_tokens if tokens is None else tokens

    def length(self, model: Anatomy) -> int:
        return self.text_tokens + self.image(model)

    def patches(self, model: Anatomy) -> int:
        return self.image(model) * model.patches_per_token


class Moment(NamedTuple):
    """One instant of a phase."""

    name: str
    held: Held


@dataclass(frozen=True)
class Phase:
    """A phase at its fullest."""

    name: str
    moment: str
    held: Held

    @property
    def total(self) -> int:
        return sum(self.held.values())


def phases(config: Config, machine: Machine, prompts: Prompts) -> list[Phase]:
    """The phases of a step of this run, each at the moment when it holds most."""
    run = _Run.of(config, machine, prompts)
    found = {"rollout": run.rollout(), "update": run.update(), "optimiser": run.optimiser()}
    if config.hints:
        found["hints"] = run.hints()
    if config.eval_data is not None or config.eval_share:
        found["evaluation"] = run.evaluation()
    fullest = {name: max(moments, key=_total) for name, moments in found.items()}
    return [Phase(name, *fullest[name]) for name in PHASES if name in fullest]


def peak(config: Config, machine: Machine, prompts: Prompts) -> Phase:
    """The fullest phase."""
    return max(phases(config, machine, prompts), key=lambda phase: phase.total)


def _total(moment: Moment) -> int:
    return sum(moment.held.values())


def completions_per_process(config: Config, machine: Machine) -> int:
    """Of a step."""
    questions = config.prompts_per_step * config.num_generations
    return -(-questions // machine.gpus)


def student_of(config: Config, machine: Machine) -> Anatomy:
    return anatomy(
        config.student,
        config.dtype,
        machine.device,
        config.attn_implementation,
        config.lora_rank,
        config.freeze_vision,
    )


def teacher_of(config: Config, machine: Machine) -> Anatomy | None:
    if not (config.distils or config.hints):
        return None
    return anatomy(config.teacher, config.dtype, machine.device, config.attn_implementation)


@dataclass(frozen=True)
class _Run:
    config: Config
    machine: Machine
    prompts: Prompts
    student: Anatomy
    teacher: Anatomy | None
    stays: Standing

    @classmethod
    def of(cls, config: Config, machine: Machine, prompts: Prompts) -> _Run:
        student, teacher = student_of(config, machine), teacher_of(config, machine)
        if config.sharding == "none" and config.lora_rank == 0 and config.dtype != "float32":
            raise KepoConfigError(
                f"dtype={config.dtype!r} with sharding='none' would train 16-bit weights; set "
                "sharding to fsdp2, or lora_rank"
            )
        loss = _loss(config, machine, student, teacher)
        return cls(
            config,
            machine,
            prompts,
            student,
            teacher,
            standing(config, machine, student, teacher, loss.pages),
        )

    # ---- phases ----

    def rollout(self) -> Iterator[Moment]:
        """Sampling, and with an engine beside the models what that engine takes."""
        if self.config.engine == "vllm":
            share = int(self.config.vllm_memory * self.machine.gpu_bytes)
            yield self._moment("vLLM", Held(cache=share))
            return
        whole = self.stays.gathered if self.config.rollout_gather else self.stays.two_layers
        extra = Held(weights=whole)
        sequences = self._at_once(self.config.num_generations)
        yield from self._sampling(self.student, sequences, self.prompts, extra, "sampling")

    def hints(self) -> Iterator[Moment]:
        questions = -(-self.config.prompts_per_step // self.machine.gpus)
        longest = min(MAX_HINT_LENGTH, self.config.max_completion_length)
        extra = Held(teacher=self.stays.teacher_at_work)
        at_once = min(questions, self.config.rollout_batch)
        yield from self._generating(
            self.teacher, at_once, self.prompts, longest, 0.0, extra, "teacher writes"
        )
        if self.config.engine == "transformers":
            hinted = Prompts(self.prompts.text_tokens + longest, self.prompts.image_tokens)
            whole = self.stays.gathered if self.config.rollout_gather else self.stays.two_layers
            sequences = self._at_once(self.config.num_hinted)
            held = Held(weights=whole)
            yield from self._sampling(self.student, sequences, hinted, held, "hinted sampling")

    def evaluation(self) -> Iterator[Moment]:
        if self.config.engine == "vllm":
            yield from self.rollout()
            return
        whole = self.stays.gathered if self.config.rollout_gather else self.stays.two_layers
        yield from self._generating(
            self.student,
            self.config.eval_batch,
            self.prompts,
            self.config.max_completion_length,
            0.0,
            Held(weights=whole),
            "answering",
        )

    def optimiser(self) -> Iterator[Moment]:
        """AdamW's temporaries: sqrt(v) and what it is divided by.

        On a GPU torch works on all parameters in one go (foreach) and holds one such tensor for
        each; on a CPU on one after another, and holds two of the largest.
        """
        counts, width = self.student.counts, self.stays.trained_bytes
        if self.machine.device == "cpu":
            temporary = 2 * counts.largest_trained * width // self.stays.shards
        else:
            temporary = counts.trained * width // self.stays.shards
        yield self._moment("AdamW", Held(optimiser=temporary))

    def update(self) -> Iterator[Moment]:
        """One micro-batch, in the order of its forward and backward."""
        config, student, teacher = self.config, self.student, self.teacher
        rows = min(config.micro_batch, completions_per_process(config, self.machine))
        length = self.prompts.length(student) + config.max_completion_length
        patches = self.prompts.patches(student)
        states = rows * length * student.hidden * student.dtype.itemsize
        loss = _loss(config, self.machine, student, teacher)

        vision = self._vision(rows, patches)
        text = _text(student, rows, length, config.gradient_checkpointing)
        kept = vision.kept + text.kept
        ref = states if config.kl_coef > 0 else 0
        unsharded = self.stays.two_layers
        yield self._update("student's vision tower", vision.forward, unsharded)
        yield self._update("student's forward", vision.kept + text.forward, unsharded)
        if config.kl_coef > 0:
            frozen = _inference(student, rows, length, rows, patches)
            yield self._update("reference's forward", kept + frozen, unsharded)
        teacher_states = 0
        if teacher is not None and config.distils:
            long = self.prompts.length(teacher) + config.max_completion_length
            run = _inference(teacher, rows, long, rows, self.prompts.patches(teacher))
            moment = self._update("teacher's forward", kept + ref + run, unsharded)
            moment.held["teacher"] += self.stays.teacher_at_work
            yield moment
            teacher_states = rows * long * teacher.hidden * teacher.dtype.itemsize
        yield self._update("loss", kept + ref + teacher_states, 0, loss.forward)
        yield self._update("loss's backward", kept, 0, loss.backward)

        # From here a head's gradient is its parameter's, or waits for the embedding's.
        waiting = loss.head_gradient if student.tied or not self.stays.gradients else 0
        shards = self.stays.shards > 1 or config.sharding == "fsdp2"
        counts, width = student.counts, student.dtype.itemsize
        reduced = counts.layer * (width + 4) if shards else 0  # whole gradients, and fp32 to send
        yield self._update(
            "last layer's backward",
            kept + states + text.backward,
            unsharded,
            waiting,
            reduced,
        )
        if self.student.trains_vision:
            formed = 0 if self.stays.gradients else self._formed_gradients()
            yield self._update(
                "vision tower's backward",
                vision.kept + vision.backward + states,
                unsharded,
                waiting if student.tied else 0,
                reduced + formed,
            )
        if student.trains_head:
            formed = 0 if self.stays.gradients else self._formed_gradients()
            embedding = student.vocab * student.hidden * width
            root = counts.root * (width + 4) if shards else 0
            yield self._update(
                "embedding's backward",
                states,
                0,
                waiting if student.tied else 0,
                max(embedding, root) + formed,
            )

    # ---- their parts ----

    def _formed_gradients(self) -> int:
        """Those of all layers, late in the backward of a step's only micro-batch."""
        return self.student.counts.trained * self.stays.trained_bytes // self.stays.shards

    def _update(
        self, name: str, activations: int, unsharded: int, loss: int = 0, gradients: int = 0
    ) -> Moment:
        return self._moment(
            name,
            Held(activations=activations, weights=unsharded, loss=loss, gradients=gradients),
            pages=loss == 0,
        )

    def _vision(self, images: int, patches: int) -> _Kept:
        model, train = self.student, self.student.trains_vision
        pixels = images * patches * model.patch_values * 4
        embedded = model.patch_embedding(images * patches, train)
        block = model.block(images, patches, train)
        mergers = model.mergers(images * patches, train)
        tokens = sum(merger.kept for merger in mergers)
        most = max(block.forward, *(merger.forward for merger in mergers))
        if not train:
            return _Kept(pixels + tokens, pixels + tokens + block.kept + most, 0)
        kept = pixels + embedded.kept + len(model.blocks) * block.kept + tokens
        backward = max(block.backward, *(merger.backward for merger in mergers))
        return _Kept(kept, kept + block.forward - block.kept, backward)

    def _at_once(self, per_question: int) -> int:
        """Sequences that a process samples in one go: whole groups, as `rollout._portions`."""
        config = self.config
        questions = -(-config.prompts_per_step // self.machine.gpus)
        at_once = max(1, config.rollout_batch // per_question)
        if config.rollout_tokens is not None:
            longest = self.prompts.length(self.student) + config.max_completion_length
            at_once = min(at_once, max(1, config.rollout_tokens // (per_question * longest)))
        return min(questions, at_once) * per_question

    def _sampling(
        self, model: Anatomy, sequences: int, prompts: Prompts, extra: Held, name: str
    ) -> Iterator[Moment]:
        longest, temperature = self.config.max_completion_length, self.config.sampling_temperature
        yield from self._generating(
            model, sequences, prompts, longest, temperature, extra, name
        )

    def _generating(
        self,
        model: Anatomy,
        sequences: int,
        prompts: Prompts,
        new_tokens: int,
        temperature: float,
        extra: Held,
        name: str,
    ) -> Iterator[Moment]:
        """transformers' generate: the prompts at once, then token after token."""
        length = prompts.length(model)
        patches = prompts.patches(model)
        pixels = sequences * patches * model.patch_values * 4  # stay with the inputs to the end
        cache = sequences * model.cache_bytes_per_token
        first = _inference(model, sequences, length, sequences, patches)
        yield self._moment(f"{name}: prompts", extra + Held(cache=cache * length, activations=first))
        longest = length + new_tokens - 1
        logits = sequences * model.vocab * model.dtype.itemsize
        draws = logits + model.drawing(sequences, temperature, self.config.top_p)
        appended = model.decoding_layer(sequences, longest)
        at_end = extra + Held(cache=cache * longest, activations=pixels)
        yield self._moment(f"{name}: last token", at_end + Held(cache=appended))
        yield self._moment(f"{name}: last draw", at_end + Held(sampling=draws))

    def _moment(self, name: str, held: Held, pages: bool = True) -> Moment:
        return Moment(name, self.stays.beside(held, pages))


class _Kept(NamedTuple):
    kept: int
    """From forward to backward."""
    forward: int
    """Most during forward."""
    backward: int
    """Most during backward, above what was kept."""


def _text(model: Anatomy, rows: int, length: int, checkpointing: bool) -> _Kept:
    """The language model with gradients."""
    layer, norm = model.layer(rows, length, True), model.norm(rows, length, True)
    states = rows * length * model.hidden * model.dtype.itemsize
    shared = states + _shared(model, rows, length)
    last = norm.kept
    if not checkpointing:
        kept = shared + len(model.layers) * layer.kept + last
        return _Kept(kept, kept - last + layer.forward - layer.kept, layer.backward)
    kept = shared + len(model.layers) * states + last
    forward = kept - last + model.layer(rows, length, False).forward
    return _Kept(kept, forward, layer.kept + layer.backward)


def _shared(model: Anatomy, rows: int, length: int) -> int:
    """What all layers read: the mask, sines and cosines."""
    mask = rows * length * length if model.masks else 0
    head_dim = model.cache_bytes_per_token // (2 * len(model.layers) * model.text.num_key_value_heads)
    return mask + 2 * rows * length * head_dim


def _inference(model: Anatomy, rows: int, length: int, images: int, patches: int) -> int:
    """Most at a time in a forward without gradients, from pixels to states."""
    block = model.block(images, patches, False)
    mergers = model.mergers(images * patches, False)
    pixels = images * patches * model.patch_values * 4
    tokens = sum(merger.kept for merger in mergers)
    most = max(block.forward, *(merger.forward for merger in mergers))
    states = rows * length * model.hidden * model.dtype.itemsize
    text = states + _shared(model, rows, length) + model.layer(rows, length, False).forward
    return pixels + tokens + max(block.kept + most, text)


def _loss(
    config: Config, machine: Machine, student: Anatomy, teacher: Anatomy | None
) -> LossMemory:
    completions = completions_per_process(config, machine)
    return loss_memory(
        config,
        machine.device,
        min(config.micro_batch, completions) * config.max_completion_length,
        completions > config.micro_batch,
        student,
        teacher if config.distils else None,
    )
