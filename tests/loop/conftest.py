"""A tiny student, its teacher and a few questions, made once for all tests of the whole loop."""

import pytest
import torch
from toy import TASK

from kepo.run import milestones


@pytest.fixture(scope="session", autouse=True)
def draw_curves():
    """Runs draw no picture, which takes as long as three steps. The fixture is what would draw it,
    for a test that looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        real = milestones.plot_curves
        patch.setattr(milestones, "plot_curves", lambda *_, **__: None)
        yield real


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with `student`, `teacher` and `data`; the student ends after a few tokens or many."""
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    from kepo.data.load import load_omnimedvqa
    from kepo.digits.dataset import write_digits
    from kepo.digits.tiny import build_tiny
    from kepo.models.sampling import SamplingParams
    from kepo.models.vlm import VLM
    from kepo.rollout.prompts import prompt_of

    root = tmp_path_factory.mktemp("made")
    write_digits(root / "data", train=6, test=1, seed=0)
    for size in ("student", "teacher"):
        build_tiny(root / size, size=size, seed=1)

    # Untrained, it ends one time in hundreds, and a completion cut off is never a success.
    student = VLM.load(root / "student")
    asked = load_omnimedvqa(root / "data" / "train")[:8]
    inputs = student.encode([prompt_of(TASK, example) for example in asked])
    torch.manual_seed(0)
    ids, mask, _ = student.generate(inputs, SamplingParams(max_tokens=8, temperature=1.0))
    with torch.no_grad():
        states = student.completion_hidden(inputs, ids, mask)[mask]
        towards = states.mean(0)
        head = student.head.weight
        head[student.tokenizer.eos_token_id] = towards * 5.0 / towards.square().sum()
    student.save(root / "student")
    return root


@pytest.fixture(scope="session")
def tinies(tmp_path_factory):
    """Folder with a tiny student of each of `families.FAMILIES`."""
    pytest.importorskip("transformers")
    import families

    return families.build(tmp_path_factory.mktemp("tinies"))
