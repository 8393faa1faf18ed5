"""Models from disk, held as the config says: whole, with adapters, sharded, quantised, offloaded.

Rank 0 reads a model and the other ranks receive it, so a node holds it once in host memory however
many GPUs it has. A quantised model is read by every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kepo.distributed import sharding
from kepo.distributed.processes import is_rank0, on_rank0, world_size
from kepo.errors import KepoConfigError
from kepo.models.adapters import with_adapters
from kepo.models.conventions import without_dropout
from kepo.models.encoding import Prompt
from kepo.models.families.family import layers_of
from kepo.models.families.registry import family_of
from kepo.models.reading import (
    NO_CODE,
    base_of,
    blank_model,
    load_encoder,
    read_model,
    resize_pictures,
)
from kepo.models.vlm import VLM
from kepo.rollout.sampler import Sampler
from kepo.sections import ModelsConfig, TeacherConfig
from kepo.teachers.first_words import Offer, check_law, check_sight, check_tokenizer, offer_of
from kepo.teachers.served import ServedTeacher
from kepo.teachers.several import Several, Teacher, Teachers
from kepo.teachers.transport import Server
from kepo.words import is_address

Prepare = Callable[[Any], Any]
"""A function that marks what is trained in a model; returns the wrapper to save adapters, or
None."""


def load_policy(
    config: ModelsConfig, device: torch.device, saved: Path | None = None, seed: int = 0
) -> VLM:
    """Load the student to train: ``config.student``, or what it has become in ``saved``, the policy
    folder of a checkpoint. All ranks call. seed: that of new adapters' weights."""
    if base_of(config.student) is not None:
        raise KepoConfigError(
            f"student={config.student!r} holds adapters and not a whole model; merge them into "
            "their model (peft's merge_and_unload), save that, and give its folder"
        )
    adapters = config.lora_rank > 0
    compute = getattr(torch, config.dtype)

    def prepare(model: Any) -> Any:
        if config.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name from v6 on
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        wrapper = None
        if adapters:
            wrapper = with_adapters(model, config.lora_rank, config.lora_alpha, seed, saved)
        elif config.freeze_vision:
            for module in family_of(model.config).vision(model):
                module.requires_grad_(False)
        dropped = without_dropout(model)
        if dropped and is_rank0():
            print(
                f"{config.student}: trained without its dropout ({', '.join(dropped)}), as "
                "log-probabilities must be those of the model that sampled; its config keeps it"
            )
        return wrapper

    path = config.student if adapters or saved is None else str(saved)
    if config.sharding == "fsdp2":
        policy = _load(path, torch.float32, device, config, prepare, sharded_in=compute)
        policy.gathers = config.rollout_gather
        return policy
    if config.student_bits is not None:
        policy = _load_quantised(path, config.student_bits, device, config, prepare)
    else:
        policy = _load(path, compute, device, config, prepare)
    policy.wrapper = sharding.replicate(policy.model)
    return policy


def load_teachers(
    config: ModelsConfig,
    taught_by: Mapping[str, str],
    device: torch.device,
    policy: VLM,
    shown: Sequence[Prompt | None] = (),
    distils: bool = True,
) -> Teachers:
    """Load the teachers that the run's own processes hold, and meet those behind servers. All ranks
    call.

    taught_by: folders, names or addresses of the teachers, by setting. shown: for each of them a
    question with pictures that it will be asked, or None. distils: its scores are asked for. Raises
    KepoConfigError or KepoTeacherError for a server that cannot teach the student.
    """
    found: list[Teacher] = []
    for place, (which, path) in enumerate(taught_by.items()):
        if is_address(path):
            seen = shown[place] if place < len(shown) else None
            found.append(_meet(Server(which, path, config), policy, config, seen, distils))
        else:
            found.append(load_teacher(config, device, path))
    return Several(tuple(found)) if config.teachers else next(iter(found), None)


def _meet(
    server: Server, policy: VLM, config: TeacherConfig, shown: Prompt | None, distils: bool
) -> ServedTeacher:
    """Return a teacher behind a server. Rank 0 asks it what it is."""
    rows = policy.head_rows

    def teacher(offer: Offer) -> ServedTeacher:
        encoder = replace(policy.encoder, positions=offer.positions)
        return ServedTeacher(server, offer.model, encoder, rows, config, offer.make)

    def asked() -> Offer:
        offer = offer_of(server, config)
        met = teacher(offer)
        if (note := check_tokenizer(met)) is not None:
            print(note)
        if distils:
            check_law(met, config.teacher_top_k)
            if shown is not None:
                check_sight(met, shown)
        server.taken()
        return offer

    return teacher(on_rank0(asked))


def load_teacher(config: ModelsConfig, device: torch.device, path: str | None = None) -> VLM:
    """Load a frozen teacher, ``config.teacher`` or another, where, and in how many bits, the config
    says. All ranks call."""
    path = path or config.teacher
    assert path is not None, "only a run that is taught loads a teacher"
    if config.teacher_bits is not None:
        return _load_quantised(path, config.teacher_bits, device, config, _freeze)
    dtype = getattr(torch, config.dtype)
    placed = config.teacher_placement
    return _load(
        path,
        dtype,
        device,
        config,
        _freeze,
        sharded_in=None if placed == "copy" else dtype,
        offload=placed == "offload",
    )


def load_sampler(config: ModelsConfig, policy: VLM) -> Sampler:
    """Return the policy's sampler: the policy itself, or vLLM. All ranks call."""
    if config.sampler == "transformers":
        return policy
    from kepo.rollout.vllm import VllmSampler

    return VllmSampler(
        policy.encoder,
        config.student,
        device=policy.device,
        dtype=config.dtype,
        memory_share=config.vllm_memory,
        never_sampled=policy.never_sampled(),
        weights=policy.weights,
    )


def load_reference(config: ModelsConfig, device: torch.device) -> VLM:
    """Load the frozen start point for the KL penalty, held as the policy is. All ranks call."""
    if config.student_bits is not None:
        return _load_quantised(config.student, config.student_bits, device, config, _freeze)
    dtype = getattr(torch, config.dtype)
    sharded_in = dtype if config.sharding == "fsdp2" else None
    return _load(config.student, dtype, device, config, _freeze, sharded_in=sharded_in)


def _load(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    config: ModelsConfig,
    prepare: Prepare,
    *,
    sharded_in: torch.dtype | None = None,
    offload: bool = False,
) -> VLM:
    attention = config.attn_implementation
    if config.liger_layers:
        use_liger_layers(path)
    read: list[Any] = []
    on_rank0(lambda: read.append(read_model(path, dtype, attn_implementation=attention)))
    model = read[0] if read else blank_model(path, dtype, attn_implementation=attention)
    adapters = prepare(model)
    source = None
    if is_rank0() and world_size() > 1:
        # Other tensors over the same memory: sharding moves the model's own to the device.
        named = [*model.named_parameters(), *model.named_buffers()]
        source = {name: tensor.detach() for name, tensor in named}
    encoder = resize_pictures(load_encoder(path, model), config, path)
    vlm = VLM(model.eval(), encoder, device, adapters=adapters)
    vlm.share_prompts = config.share_prompts and vlm.why_not_packed is None
    if sharded_in is None:
        model.to(device)
    else:
        vlm.wrapper = sharding.shard(
            model, layers_of(vlm.family, model), device, sharded_in, offload=offload
        )
        vlm.sharded = True
    if world_size() > 1:
        sharding.fill(model, source, device)
    return vlm


def _load_quantised(
    path: str, bits: int, device: torch.device, config: ModelsConfig, prepare: Prepare
) -> VLM:
    """Load a model whose layers, but not its head, are quantised while they are read. All ranks
    call, and each reads it."""
    dtype = getattr(torch, config.dtype)
    model = read_model(
        path,
        dtype,
        attn_implementation=config.attn_implementation,
        quantization_config=_quantization(bits, dtype),
        device_map={"": device},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs it would round weights of 4 bits to bfloat16 to sample, but not to train,
            # and fail where a width is no multiple of 64.
            module.support_avx512bf16_for_cpu = False
    adapters = prepare(model)
    encoder = resize_pictures(load_encoder(path, model), config, path)
    vlm = VLM(model.eval(), encoder, device, adapters=adapters)
    vlm.share_prompts = config.share_prompts and vlm.why_not_packed is None
    return vlm


def _freeze(model: Any) -> None:
    model.requires_grad_(False)


def _quantization(bits: int, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def use_liger_layers(path: str) -> None:
    """Build models of the family of the model at ``path`` from Liger's norms, rotary embedding and,
    if it has one, MLP from now on; their losses stay ours.

    Raises KepoConfigError where Liger lacks the family, or does not fit this transformers.
    """
    from liger_kernel.transformers import monkey_patch
    from transformers import AutoConfig

    family = AutoConfig.from_pretrained(path, **NO_CODE).model_type
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    if patch is None:
        raise KepoConfigError(f"liger_layers: liger-kernel has none for {family!r}")
    try:
        patch(cross_entropy=False, fused_linear_cross_entropy=False)
    except ImportError as error:
        versions = ", ".join(f"{name} {version(name)}" for name in ("liger-kernel", "transformers"))
        raise KepoConfigError(
            f"liger_layers: {versions} do not fit together for {family!r}: {error}; install "
            "versions that do, or leave liger_layers out"
        ) from error
