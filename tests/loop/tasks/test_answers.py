"""Which options a record has, and which of them its answer means."""

import json
import unicodedata

import pytest
from datasets_on_disk import ROW, dataset, record, split_file
from toy import TASK, example, question_prompt

from kepo.data.example import LETTERS
from kepo.data.layouts import medr1
from kepo.data.load import load_examples, load_omnimedvqa
from kepo.data.records import BadRecord, right_letter
from kepo.evaluation.answers import Said
from kepo.evaluation.scores import judged

FIVE = ("CT", "MR", "X-ray", "PET", "Ultrasound")


def named(*options: str) -> dict[str, str]:
    return {f"option_{letter}": text for letter, text in zip(LETTERS, options, strict=False)}


# ---- the fields option_A, option_B ...


@pytest.mark.parametrize("count", [5, 26])
def test_every_option_of_a_record_is_asked_and_judged(tmp_path, count):
    options = tuple(f"finding {number}" for number in range(count))
    last = record(**named(*options), gt_answer=options[-1])
    (example,), report = load_examples(dataset(tmp_path, last))
    assert example.options == options and example.answer == LETTERS[count - 1]
    assert question_prompt(example).splitlines()[count].startswith(f"{example.answer}. finding")
    assert report.quirks == {"more than 4 options": 1}
    answer = judged(TASK, example, [Said(f"<answer>{example.answer.lower()}</answer>", [])])
    assert answer.right == (True,) and answer.chance == 1 / count


@pytest.mark.parametrize(
    "more",
    [
        {"option_D": "PET"},  # C is not there
        {"option_C": "PET", "option_e": "CT"},
        {"Option_C": "PET"},
        {"option_5": "PET"},
        {"optionC": "PET"},
        {"option_C ": "PET"},
        {"option_\uff23": "PET"},  # a wide C
        {"option_C": ""},
        {"option_C": float("nan")},  # as pandas writes what is missing
        {"option_C": ["PET"]},
        {"options": ["CT", "MR", "PET"]},
        {"options_C": "PET"},
        {"option_C.": "PET"},
        {"option_C1": "PET"},
        {"option_AA": "PET"},
        {"optionAA": "PET"},
        {"opt_C": "PET"},
        {"opt_C": 3},
        {"OptC": "PET"},
        {"choice_C": "PET"},
        {"choices": {"C": "PET"}},
        {"Choice 3": "PET"},
        {"distractor_1": "PET"},
        {"answer": "PET"},
        {"answer_C": "PET"},
        {"\uff4f\uff50\uff54ion_AA": "PET"},  # wide letters
    ],
)
def test_options_that_would_be_lost_make_a_bad_record(tmp_path, more):
    odd = record(option_C=None) | more
    root = dataset(tmp_path, record(question_id="fine"), odd)
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["fine"] and report.counts() == {"options": 1}
    assert "a.json[1]" in report.problems[0].where and "'q0'" in report.problems[0].message


def test_other_fields_about_options_are_no_options(tmp_path):
    extra = {"option_count": 3, "option_E": None, "options": None, "score": float("nan")}
    extra |= {"optical_density": "low", "answer_type": "closed", "num_choices": 3}
    (example,) = load_omnimedvqa(dataset(tmp_path, record(**extra) | extra))
    assert example.options == ("Nothing", "a  CYST", "A tumour")


def test_an_option_that_is_written_twice_is_a_bad_record(tmp_path):
    root = dataset(tmp_path, record(question_id="fine"))
    file = root / "QA_information" / "Open-access" / "a.json"
    twice = json.dumps(record()).replace('"option_B"', '"option_A"')
    file.write_text(f"[{json.dumps(record(question_id='fine'))}, {twice}]")
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["fine"] and report.counts() == {"field": 1}
    assert "['option_A'] more than once" in report.problems[0].message


def test_wrong_options_that_are_the_same_are_counted_the_right_one_is_refused(tmp_path):
    harmless = record(**named("a", "b", "B."), gt_answer="a")
    harmful = record(**named("a", "b", "B."), gt_answer="b", question_id="q1")
    examples, report = load_examples(dataset(tmp_path, harmless, harmful))
    assert [e.id for e in examples] == ["q0"] and report.counts() == {"answer": 1}
    assert report.quirks["two wrong options are the same"] == 1


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_answer_means_its_option_however_their_accents_are_written(tmp_path, forms):
    option, answer = (unicodedata.normalize(form, "Sjögren's syndrome") for form in forms)
    assert option != answer
    (example,) = load_omnimedvqa(dataset(tmp_path, record(option_B=option, gt_answer=answer)))
    assert example.answer == "B" and example.options[1] == option


# ---- the options in the text of a problem


@pytest.mark.parametrize(
    "problem",
    [
        "Which? A)CT, B)MR, C)X-ray, D)PET, E)Ultrasound",
        "Which?\nA. CT\nB. MR\nC. X-ray\nD. PET\nE. Ultrasound",
        "Which?\nA: CT\nB: MR\nC: X-ray\nD: PET\nE: Ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\nE)Ultrasound",
    ],
)
def test_a_fifth_option_in_the_same_style_is_read(problem):
    assert medr1.split_problem(problem) == ("Which?", FIVE)


@pytest.mark.parametrize(
    "problem",
    [
        "Which? A)CT, B)MR, C)X-ray, D)PET, E. Ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, E.Ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET E. Ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, e)ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET e. ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)infection by E. coli",  # who could tell?
        "Which? A)CT B)OCT (Optical C) X-ray",
        "Which? A)CT, B)MR, C)OCT (Optical d)PET",
        "Which? A)CT, B)lack (vitamin C) of (iron, D)PET",
        "Which? A)CT, B)MR, C)X-ray, D)OCT (Optical, e)ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET (e)ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET e) ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET/E)ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, (E) ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\ne. ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\nE: ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\uff0c\uff25\uff09ultrasound",  # in wide letters
        "Which?\nA. CT\nB. MR\nC. X-ray\nD. PET\nE.ultrasound",
        "Which?\nA. CT\nB. MR\nC. X-ray\nD. PET E. Ultrasound",
        "Which?\nA. CT\nB. MR\nC. X-ray\nD. PET\ne) ultrasound",
        "Which? A)CT, B)MR, c)X-ray, d)PET",
        "Which? a)CT, b)MR, c)X-ray",
        "Which? A)CT, B)MR, D)PET",
        "Which? A)CT, B), C)PET",
        "Which? A)CT, B)MR, C)X-ray, D)PET, [E] ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, E]ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET <E> ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, E ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, **E** ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\nE ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET\nE - ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, E-ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET E \u2013 ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET; 5) ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, (5) ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, v) ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET, \u0415)ultrasound",  # Cyrillic
        "Which? A)CT, B)MR, C)X-ray, D)PET, \u0395. ultrasound",  # Greek
        "Which? A)CT, B)MR, C)X-ray, D)PET,\u200b E\u200b ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PETscanE)ultrasound",
        "Which? A)CT, B)MR, C)X-ray, D)PET<br>E)ultrasound",
    ],
)
def test_an_option_is_never_part_of_another(problem):
    with pytest.raises(BadRecord, match="can be told apart") as caught:
        medr1.split_problem(problem)
    assert caught.value.kind == "options"


@pytest.mark.parametrize(
    "last",
    [
        *("E. coli", "lack of vitamin (or E) alone", "either, e.g. both", "type E", "type E."),
        *("sizes of 3, 5-7 cm", "size (2.5)", "segments (1, 3, 5)", "grade (5)", "IgA (not IgE)"),
        *(
            "dementia, Pick disease",
            "mild, i.e. early",
            "U.S. style",
            "right kidney (right)",
            "low T3, T4 and E2",
        ),
    ],
)
def test_letters_within_an_option_begin_no_other(last):
    problem = f"Which? A)CT, B)MR, C)X-ray, D){last}"
    assert medr1.split_problem(problem)[1] == ("CT", "MR", "X-ray", last)


def test_a_bracket_that_is_never_closed_ends_no_list():
    """As Med-R1's files have it."""
    for part in (", ", "; ", "\n", " / ", " "):
        problem = f"Which? A)CT{part}B)OCT (Optical Coherence Tomography{part}C)MR"
        assert medr1.split_problem(problem)[1] == ("CT", "OCT (Optical Coherence Tomography", "MR")


def test_options_in_a_list_of_dashes_are_read():
    for mark in "-*+\u2022":
        for letter in "{}) ", "{}. ", "{})":
            lines = [f"{mark} {letter.format(n)}{o}" for n, o in zip("ABC", FIVE, strict=False)]
            assert medr1.split_problem("\n".join(["Which?", *lines])) == ("Which?", FIVE[:3])


@pytest.mark.parametrize(
    "after",
    [
        "\nAnswer: B",
        "\nNote: choose one.",
        "\n\nThe picture is a CT.",
        "\u2028Only one is right",
        ". Answer with the letter.",
        " (choose one)",
        ", please select one",
        ". The picture was taken lying down.",
    ],
)
def test_what_follows_the_last_option_is_no_part_of_it(tmp_path, after):
    problem = f"Which? A)CT, B)MR scan{after}"
    with pytest.raises(BadRecord, match="nothing after the last") as caught:
        medr1.split_problem(problem)
    assert caught.value.kind == "options"
    rows = [ROW | {"problem": problem}, ROW]
    examples, report = load_examples(split_file(tmp_path, "CT_train.json", *rows))
    assert len(examples) == 1 and "'CT_train[0]'" in report.problems[0].message


def test_options_that_are_sentences_alike_are_read():
    problem = "Which? A)It is bright. It is CT, B)It is dark. It is MR"
    assert medr1.split_problem(problem)[1] == ("It is bright. It is CT", "It is dark. It is MR")


# ---- what states the answer


@pytest.mark.parametrize(
    "told",
    [
        *("MR Answer: B", "MR - answer = B", "MR. Ans: B", "MR (correct)", "MR [correct]"),
        *("MR (the answer)", "MR. Correct answer is MR", "MR <- the correct option", "MR \u2713"),
        *("\u2705 MR", "MR Solution: B", "MR Key: B", "MR Answer\uff1a B", "*MR", "MR **"),
    ],
)
def test_an_option_that_states_the_answer_is_bad_in_every_layout(tmp_path, told):
    solved = ROW | {"problem": f"Which? A)CT, B){told}", "solution": "<answer>B</answer>"}
    split = split_file(tmp_path / "a", "CT_train.json", ROW, solved)
    odd = record(**named("CT", told), option_C=None, gt_answer="B")
    root = dataset(tmp_path / "b", record(question_id="fine"), odd)
    for path in (split, root):
        examples, report = load_examples(path)
        assert len(examples) == 1 and report.counts() == {"options": 1}
        assert "answer" in report.problems[0].message


@pytest.mark.parametrize(
    "told", ["Which? Answer: B", "Which? (ans = B)", "The answer is B. Which?"]
)
def test_a_question_that_states_the_answer_is_bad(tmp_path, told):
    root = dataset(tmp_path / "b", record(question_id="fine"), record(question=told))
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["fine"] and report.counts() == {"field": 1}


def test_words_about_answers_and_signs_state_none(tmp_path):
    options = named("Solution: 5% glucose", "right (right) kidney", "HLA-B* and *", "* Key finding")
    fine = record(**options, question="What is the answer? Answer:", gt_answer="B")
    more = fine | {"question_id": "q1", "question": "The answer is A matter of density. Which?"}
    assert len(load_omnimedvqa(dataset(tmp_path, fine, more))) == 2


@pytest.mark.parametrize("blank", ["\u200b", "\ufe0f", "\u034f", "\u17b4", "\ufffc", "\u0301", " "])
def test_a_text_that_shows_nothing_is_bad(tmp_path, blank):
    changes = [{"question": blank}, {"option_A": blank * 3}, {"gt_answer": blank}]
    odd = [record(question_id=f"q{n}", **change) for n, change in enumerate(changes)]
    root = dataset(tmp_path / "a", record(question_id="fine"), *odd)
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["fine"] and report.counts() == {
        kind: 1 for kind in ("field", "options", "answer")
    }
    if blank != " ":
        problems = (f"{blank} A)CT, B)X-ray", f"Which? A)CT, B){blank}")
        rows = [ROW, *(ROW | {"problem": problem} for problem in problems)]
        report = load_examples(split_file(tmp_path / "b", "CT_train.json", *rows))[1]
        assert report.counts() == {"field": 1, "options": 1}


# ---- the answer


@pytest.mark.parametrize(
    "answer",
    ["B", "b", " b. ", "B.", "(B)", "(b).", "B)", "B:", "B) MR", "b. mr", "(B) MR.", "MR", "mr."]
    + ["**B**", "`b`", "\\text{B}", "$\\mathbf{B}$", "**(B)** MR", "**B. MR**"],
)
def test_an_answer_is_read_as_a_completion_would_be(tmp_path, answer):
    """But for an option's text alone, which the parser of completions does not know."""
    assert right_letter(answer, ("CT", "MR", "PET")) == "B"
    read = TASK.answer_of(f"<answer>{answer}</answer>")
    assert read == (None if answer.casefold().startswith("mr") else "B")
    problem = "What is it? A)CT, B)MR, C)PET"
    solved = ROW | {"problem": problem, "solution": f"<answer>{answer}</answer>"}
    assert load_examples(split_file(tmp_path, "CT_train.json", solved))[0][0].answer == "B"
    root = dataset(tmp_path, record(**named("CT", "MR", "PET"), gt_answer=answer))
    assert load_omnimedvqa(root)[0].answer == "B"


CATS = ("dog", "cat", "vitamin C", "E. coli", "S. aureus")


@pytest.mark.parametrize(
    "said",
    ["B", "**B**", "B. cat", "(B)", "B)", "\\text{B}", "\\boxed{B}", "**B. Cat**", "**B.** cat"]
    + [
        "**(B)** cat.",
        "\\(B\\)",
        "$\\boxed{\\text{B}}$",
        "**\\boxed{B}**",
        "__B__: cat",
        "B) **cat**",
    ],
)
def test_a_letter_is_read_however_it_is_set(said):
    for right in "ABCDE":
        asked = example("q", options=CATS, answer=right)
        assert TASK.is_right(f"<answer>{said}</answer>", asked) == (right == "B")
    assert TASK.answer_of(f"<answer>{said}</answer>") == "B"
    assert TASK.is_formatted(f"<think>x</think><answer>{said}</answer>")


@pytest.mark.parametrize(
    "said",
    [
        "**A** **B**",
        "\\text{A}\\text{B}",
        "A, B",
        "A. dog B. cat",
        "B. cat or C",
        "(A)(B)",
        "A/B",
        "A. B.",
        "A) B",
    ]
    + ["B. cat, not C", "A. dog; B. cat", "**A** or **B**", "cat"],
)
def test_two_letters_or_none_are_no_answer(said):
    assert TASK.answer_of(f"<answer>{said}</answer>") is None
    for right in "ABCDE":
        asked = example("q", options=CATS, answer=right)
        assert not TASK.is_right(f"<answer>{said}</answer>", asked)


def test_a_letter_with_another_options_text_is_not_right():
    for said, letter in (("B. dog", "B"), ("E. coli", "E"), ("A. cat", "A"), ("D. coli", "D")):
        assert not TASK.is_right(
            f"<answer>{said}</answer>", example("q", options=CATS, answer=letter)
        )
    asked = example("q", options=CATS, answer="C")
    assert TASK.is_right("<answer>C. vitamin C</answer>", asked)
    assert TASK.is_right("<answer>D. E. coli</answer>", example("q", options=CATS, answer="D"))


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("B) CT", ("CT", "MR")),  # one letter, another's text
        ("C", ("CT", "MR")),
        ("C) MR", ("CT", "MR")),
        ("B", ("B", "C")),  # the text of A, the letter of B
        ("b.", ("B", "C")),
        ("A", ("CT", "ct.")),  # B is just as right
        ("A B", ("CT", "MR")),
        ("A cyst", ("cyst", "tumour")),  # a word, no letter
        ("A,B", ("CT", "MR")),
        ("\uff22", ("CT", "MR")),  # a wide B
        ("\u0412", ("CT", "MR")),  # a Cyrillic letter that looks like B
        ("\u0131", ("a", "b", "c", "d", "e", "f", "g", "h", "x")),  # upper() makes it I
        ("\u017f", tuple(f"option {n}" for n in range(26))),  # upper() makes it S
        ("\u212a", tuple(f"option {n}" for n in range(26))),  # lower() makes it k
        ("(B", ("CT", "MR")),
        ("BB", ("CT", "MR")),
    ],
)
def test_an_answer_that_means_none_or_two_is_bad(answer, options):
    with pytest.raises(BadRecord, match="of the options") as caught:
        right_letter(answer, options)
    assert caught.value.kind == "answer"


def test_a_letter_that_is_also_its_own_options_text_is_clear():
    assert right_letter("B", ("A", "B", "AB", "O")) == "B"
    assert right_letter("ab", ("A", "B", "AB", "O")) == "C"
    assert right_letter("E. coli", ("E. coli", "K. pneumoniae")) == "A"
