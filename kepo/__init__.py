"""Readable training of vision-language models with KEPO: GRPO, gated distillation, hints."""
