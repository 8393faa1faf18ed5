"""A small checkpoint, and the least that can be wrong with it."""

import torch
from safetensors.torch import save_file

from kepo.run.checkpoint import save_checkpoint


def write(root, step, keep=3):
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()

    def policy(folder):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")

    names = dict(model.named_parameters())
    return (
        save_checkpoint(root, step, policy, names, optimizer, {"step": step}, keep),
        names,
        optimizer,
    )


def flip(folder):
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
