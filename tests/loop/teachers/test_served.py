"""A teacher behind a server: what it says is what the model says, and what is wrong is seen."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from served_model import Gone, serving

from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.errors import KepoConfigError, KepoTeacherError
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.teachers import transport
from kepo.teachers.first_words import check_law, check_sight, check_tokenizer, known_text, offer_of
from kepo.teachers.served import ServedTeacher
from kepo.teachers.transport import KEY, Refused, Server

TASK = MultipleChoice()
CONFIG = Config(teacher="t", teacher_top_k=7, teacher_timeout=5.0, teacher_retries=2)


@pytest.fixture(scope="module")
def teacher(made):
    return VLM.load(made / "teacher")


@pytest.fixture
def server(teacher):
    with serving(teacher) as one:
        yield one


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.02)


def client(server, teacher, config=CONFIG):
    rows = teacher.head.weight.shape[0]
    return ServedTeacher(
        Server("teacher", server.url, config), server.name, teacher.encoder, rows, config
    )


@pytest.fixture
def examples(made):
    return load_omnimedvqa(made / "data" / "train")[:3]


def law_of(vlm, prompt, tokens):
    """(T, V) log-probabilities of a local model at the tokens."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        states = vlm.completion_hidden(vlm.encode([prompt]), ids, torch.ones_like(ids).bool())
    return (states[0] @ vlm.head.weight.T).log_softmax(-1)


# ---- what it says ----


@pytest.mark.parametrize("pictures", ["one", "two", "none"])
def test_it_says_what_the_local_model_says(server, teacher, examples, pictures, tmp_path):
    prompts = [prompt_of(TASK, example) for example in examples]
    if pictures == "two":  # of different sizes, and a turn before them
        for number, size in enumerate([(64, 96), (160, 64)]):
            Image.new("RGB", size, (200 * number, 80, 9)).save(tmp_path / f"{number}.png")
        both = tuple(tmp_path / f"{number}.png" for number in range(2))
        turns = (("system", "Look."),)
        prompts = [replace(prompt, images=both, earlier=turns) for prompt in prompts]
    if pictures == "none":
        prompts = [replace(prompt, images=()) for prompt in prompts]
    completions = [[5, 17, 300, 2], [40], [7, 7, 9]]
    found = client(server, teacher).say(prompts, completions)
    for said, prompt, tokens in zip(found, prompts, completions, strict=True):
        law = law_of(teacher, prompt, tokens)
        best = law.topk(7)
        assert said.ids.shape == (len(tokens), 7)
        torch.testing.assert_close(said.logprobs, best.values, rtol=1e-5, atol=1e-5)
        assert torch.equal(said.ids, best.indices)
        own = law.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(said.own, own, rtol=1e-5, atol=1e-5)
    paths = {path for path, _ in server.asked}
    assert paths == {"/v1/completions" if pictures == "none" else "/inference/v1/generate"}


def test_sglang_says_it_by_its_own_interface(server, teacher, examples):
    server.owner = "sglang"
    offer = offer_of(Server("teacher", server.url, CONFIG), CONFIG)
    assert offer == ("tiny", 4095, "sglang")
    vllm, sglang = client(server, teacher), client(server, teacher)
    sglang.make = offer.make
    prompts, completions = [Prompt("3 + 5?"), Prompt("7?")], [[5, 17, 300, 2], [40]]
    for one, other in zip(
        vllm.say(prompts, completions), sglang.say(prompts, completions), strict=True
    ):
        torch.testing.assert_close(one, other)
    check_law(sglang, 7)
    with pytest.raises(KepoConfigError, match="is SGLang's, which takes no token ids"):
        check_sight(sglang, prompt_of(TASK, examples[0]))
    server.script = lambda path, body, answer: (200, {"meta_info": {}})
    with pytest.raises(KepoTeacherError, match=r"^teacher=\S+ answers /generate without its laws"):
        sglang.say(prompts, completions)


def test_hints_are_the_texts_of_the_local_model(server, teacher, examples):
    prompts = [hint_prompt(TASK, example, with_answer=False) for example in examples]
    assert prompts[0].images
    for params, seeds in (
        (SamplingParams(max_tokens=6, temperature=0.0), None),
        (SamplingParams(max_tokens=6, temperature=0.9), [3, 4, 5]),
    ):
        ids, mask, _ = teacher.sample(prompts, params, seeds)
        written = client(server, teacher).write(prompts, params, seeds)
        assert [one.text for one in written] == teacher.decode(ids, mask)
        assert [one.tokens for one in written] == mask.sum(-1).tolist()


def test_earlier_turns_and_an_opening_are_part_of_a_hint(server, teacher):
    prompt = Prompt("3 + 5?", earlier=(("system", "Be brief."),))
    params = SamplingParams(max_tokens=3, temperature=0.0)
    [(text, _)] = client(server, teacher).write([prompt], params, None)
    ids, mask, _ = teacher.sample([prompt], params)
    assert [text] == teacher.decode(ids, mask)
    opened = client(server, teacher)
    opened.encoder = replace(teacher.encoder, opened="<think>\n")
    assert [one.text for one in opened.write([prompt], params, None)] == ["<think>\n" + text]


def test_tokens_that_a_server_does_not_count_are_counted_in_the_text(server, teacher):
    server.script = lambda *_: (200, {"choices": [{"message": {"content": "3 + 5"}}]})
    params = SamplingParams(max_tokens=9, temperature=0.0)
    [one] = client(server, teacher).write([Prompt("3 + 5?")], params, None)
    assert one == ("3 + 5", len(teacher.tokenizer("3 + 5")["input_ids"])) and one.tokens >= 3


def test_requests_go_out_a_few_at_once(server, teacher):
    gate = threading.Barrier(4, timeout=5)

    def wait(path, body, answer):
        gate.wait()
        return answer()

    server.script = wait
    served = client(server, teacher, replace(CONFIG, teacher_at_once=4))
    served.say([Prompt("3 + 5?")] * 8, [[5]] * 8)
    assert server.most_at_once == 4
    assert served.server.taken() == (8, 0) and served.server.taken() == (0, 0)


def test_a_key_is_sent_if_there_is_one(server, teacher, monkeypatch):
    server.script = lambda path, body, answer: (401, {"error": "Unauthorized"})
    with pytest.raises(Refused, match="401, Unauthorized; set KEPO_TEACHER_KEY"):
        client(server, teacher).server.ask("/v1/models")
    seen = []
    monkeypatch.setattr(
        transport.http.client.HTTPConnection,
        "request",
        lambda self, method, path, content, headers: seen.append(headers) or 1 / 0,
    )
    monkeypatch.setenv(KEY, "k1")
    with pytest.raises(ZeroDivisionError):
        client(server, teacher).server.ask("/v1/models")
    assert seen[0]["Authorization"] == "Bearer k1"


# ---- what passes, and what does not ----


def failing(times, how):
    """A script that fails so often, and then answers."""
    left = [times]

    def script(path, body, answer):
        if left[0]:
            left[0] -= 1
            return how()
        return answer()

    return script


def gone():
    raise Gone


@pytest.mark.parametrize(
    "how",
    [lambda: (503, {"error": "busy"}), lambda: (429, b"slow down"), gone],
    ids=["503", "429", "gone"],
)
def test_what_passes_is_tried_again(server, teacher, how):
    server.script = failing(2, how)
    served = client(server, teacher)
    assert len(served.say([Prompt("3 + 5?")], [[5]])) == 1
    assert served.server.taken() == (3, 2)
    server.script = failing(3, how)  # teacher_retries + 1
    with pytest.raises(KepoTeacherError, match=r"^teacher='http.*tried 3 times.*run the same"):
        served.say([Prompt("3 + 5?")], [[5]])


def test_a_server_that_is_not_there_is_named_with_its_setting(teacher):
    with serving(teacher) as server:
        served = client(server, teacher)
    with pytest.raises(KepoTeacherError, match=rf"^teacher='{served.server.url}' does not answer"):
        served.say([Prompt("3 + 5?")], [[5]])


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_stalls_is_left(server, teacher, drip):
    over, waited_for = threading.Event(), []

    def stall(path, body, answer):
        if drip:
            return 200, iter(lambda: b" " * (not over.wait(0.02)), b"")
        if not over.wait(60):
            waited_for.append(body)
        raise Gone

    server.script = stall
    served = client(server, teacher, replace(CONFIG, teacher_timeout=0.1, teacher_retries=1))
    with pytest.raises(KepoTeacherError, match=r"no answer within teacher_timeout=0\.1 s"):
        served.say([Prompt("3 + 5?")] * 20, [[5]] * 20)
    assert waited_for == []
    over.set()


def test_the_first_error_ends_the_others(server, teacher):
    over, waited_for = threading.Event(), []

    def script(path, body, answer):
        if body["prompt"][-1] == 5:
            return 400, {"error": {"message": "bad"}}
        if not over.wait(60):
            waited_for.append(body)
        raise Gone

    server.script = script
    with pytest.raises(Refused, match="400, bad"):
        client(server, teacher).say([Prompt("3 + 5?")] * 3, [[5], [6], [7]])
    assert waited_for == []
    over.set()


@pytest.mark.parametrize("url", ["http://", "http://host:port/v1", "http://:80/v1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(KepoConfigError, match="no address; expected http://host:port/v1"):
        Server("teacher", url, CONFIG)


# ---- lies ----


def changed(change):
    """A script that changes the log-probabilities in a true answer."""

    def script(path, body, answer):
        code, said = answer()
        if path in ("/v1/completions", "/inference/v1/generate") and code == 200:
            inner = said["choices"][0] if "choices" in said else said
            change(inner)
        return code, said

    return script


def each(change):
    def over(said):
        for place in said["prompt_logprobs"][1:]:
            change(place)

    return over


LIES = {
    "short": (lambda s: s["prompt_logprobs"].__delitem__(slice(1, None)), "expected more than"),
    "none": (lambda s: s.pop("prompt_logprobs"), "gives no prompt_logprobs"),
    "nan": (each(lambda p: p[min(p)].update(logprob=math.nan)), "have its weights been lost"),
    "null": (each(lambda p: p[min(p)].update(logprob=None)), "as log-probabilities of a place"),
    "above one": (each(lambda p: p[min(p)].update(logprob=0.0)), "those of no law"),
    "fewer": (each(lambda p: [p.pop(n) for n in [*p][1:]]), "log-prob|says nothing"),
    "another's ids": (each(lambda p: p.update({"99999": {"logprob": -30.0}})), "token 99999"),
    "shifted ids": (
        lambda s: s.update(prompt_logprobs=[None, *s["prompt_logprobs"][:-1]]),
        "says nothing of token",
    ),
    "read otherwise": (lambda s: s["prompt_token_ids"].reverse(), "other token ids"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error(server, teacher, lie):
    change, words = LIES[lie]
    server.script = changed(change)
    prompt, tokens = Prompt("3 + 5?"), [5, 17, 300]
    with pytest.raises(KepoTeacherError, match=rf"^teacher='{server.url}'.*({words})"):
        client(server, teacher).say([prompt], [tokens])
    server.script = changed(lambda said: None)
    client(server, teacher).say([prompt], [tokens])


def test_an_answer_that_is_no_json_is_an_error(server, teacher):
    server.script = lambda path, body, answer: (200, b"<html>")
    with pytest.raises(KepoTeacherError, match="with no JSON: '<html>'"):
        client(server, teacher).say([Prompt("3 + 5?")], [[5]])
    server.script = lambda path, body, answer: (200, {"choices": []})
    with pytest.raises(KepoTeacherError, match="without a choice"):
        client(server, teacher).say([Prompt("3 + 5?")], [[5]])


# ---- at the start ----


def test_a_true_server_passes_the_checks(server, teacher, examples):
    served = client(server, teacher)
    assert offer_of(served.server, CONFIG) == ("tiny", 4095, "vllm")
    assert check_tokenizer(served) is None
    check_law(served, 7)
    check_sight(served, prompt_of(TASK, examples[0]))


def test_the_known_text_has_all_of_the_vocabulary_in_it(teacher):
    text = known_text(teacher.tokenizer)
    assert all(token in text for token in teacher.tokenizer.get_added_vocab())
    ids = teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len({*ids}) > len(teacher.tokenizer) // 4


@pytest.mark.parametrize("models", [0, 2])
def test_which_of_several_models_must_be_said(server, models):
    listed = [{"id": f"m{n}"} for n in range(models)]
    server.script = lambda path, body, answer: (200, {"data": listed})
    with pytest.raises(KepoConfigError, match=rf"^teacher_model is not set.*offers {models}"):
        offer_of(Server("teacher", server.url, CONFIG), CONFIG)
    with pytest.raises(KepoConfigError, match=r"^teacher_model='m9'"):
        offer_of(Server("teacher", server.url, CONFIG), replace(CONFIG, teacher_model="m9"))
    if models:
        found = offer_of(Server("teacher", server.url, CONFIG), replace(CONFIG, teacher_model="m1"))
        assert found == ("m1", None, "vllm")


def test_a_server_without_a_list_is_told_the_name(server):
    server.script = lambda path, body, answer: (404, {"detail": "Not Found"})
    with pytest.raises(KepoTeacherError, match="404, Not Found"):
        offer_of(Server("teacher", server.url, CONFIG), CONFIG)
    named = replace(CONFIG, teacher_model="m")
    assert offer_of(Server("teacher", server.url, named), named) == ("m", None, "vllm")


def test_another_tokenizer_is_refused(server, teacher):
    def other(path, body, answer):
        code, said = answer()
        if "tokens" in said and "prompt" in body:
            said["tokens"][12] += 1
        return code, said

    server.script = other
    with pytest.raises(KepoTeacherError, match=r"^teacher=.*another tokenizer.*number 12 is"):
        check_tokenizer(client(server, teacher))


def test_another_template_is_said(server, teacher):
    def other(path, body, answer):
        code, said = answer()
        return code, ({"tokens": said["tokens"][1:]} if "messages" in body else said)

    server.script = other
    assert "another chat template" in check_tokenizer(client(server, teacher))
    server.script = lambda path, body, answer: (404, {})
    assert "no /tokenize" in check_tokenizer(client(server, teacher))


def test_more_than_the_server_gives_is_refused(server, teacher):
    config = replace(CONFIG, teacher_top_k=21)
    with pytest.raises(KepoConfigError, match=r"^teacher_top_k=21.*max allowed: 20.*--max-logp"):
        check_law(client(server, teacher, config), 21)


def uniform(said):
    for place in said["prompt_logprobs"][1:]:
        for facts in place.values():
            facts["logprob"] = -math.log(500)


def test_a_model_that_lost_its_weights_is_refused(server, teacher):
    server.script = changed(uniform)
    with pytest.raises(KepoTeacherError, match=r"uniform law does \(-ln of 500 tokens\)"):
        check_law(client(server, teacher), 7)


def test_weights_lost_after_the_start_are_noticed(server, teacher, examples):
    """Any answer that is long enough shows it, not the first alone."""
    asked = client(server, teacher), [prompt_of(TASK, examples[0])]
    tokens = list(range(40, 45))
    whole = asked[0].say(asked[1], [tokens])
    server.script = changed(uniform)
    with pytest.raises(KepoTeacherError, match=r"uniform law.*Restart it"):
        asked[0].say(asked[1], [tokens])
    [one] = asked[0].say(asked[1], [tokens[:1]])  # too few to tell
    assert len(one.own) == 1 and len(whole[0].own) == 5


def test_a_server_that_does_not_look_is_refused(server, teacher, examples):
    first = []

    def blind(path, body, answer):
        first.append(answer())
        return first[0]

    prompt = prompt_of(TASK, examples[0])
    server.script = blind
    with pytest.raises(KepoTeacherError, match="does not see them"):
        check_sight(client(server, teacher), prompt)
    server.script = lambda path, body, answer: (404, {"detail": "Not Found"})
    with pytest.raises(KepoTeacherError, match="--enable-scale-out"):
        check_sight(client(server, teacher), prompt)
