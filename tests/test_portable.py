"""Any locale, any terminal, and a Python that is too old: it runs, or says so in one sentence."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kepo.terminal import any_terminal

ROOT = Path(__file__).resolve().parents[1]


# ---- files


def opened_without_encoding(source: str) -> list[int]:
    """Lines that open a text file in the locale's encoding, which is not the same everywhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        opens = name == "open" or name.endswith((".open", ".read_text", ".write_text"))
        if not opens or name in ("os.open", "Image.open"):
            continue
        words = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
        binary = name.endswith("open") and any(w in ("rb", "wb", "ab", "r+b") for w in words)
        if not binary and not any(keyword.arg == "encoding" for keyword in node.keywords):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["kepo", "kepo_kernels", "benchmarks", "tools", "setup.py"])
def test_text_files_are_utf8_in_every_locale(folder):
    files = [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in opened_without_encoding(file.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_an_encoding_left_out_is_noticed():
    source = 'open("a")\nPath("a").read_text()\npath.open("w")\nopen("a", "rb")\nos.open("a", 0)\n'
    source += 'path.write_text("é", encoding="utf-8")\nwith zip.open("a", encoding="utf-8"): pass\n'
    assert opened_without_encoding(source) == [1, 2, 3]


# ---- terminals


@pytest.mark.parametrize(
    ("encoding", "arrives"),
    [
        ("ascii", b"\\u8d85 \\xe9 \\udc80 a"),
        ("latin-1", b"\\u8d85 \xe9 \\udc80 a"),
        ("utf-8", "超 é \\udc80 a".encode()),
    ],
)
def test_what_a_terminal_lacks_is_escaped(monkeypatch, encoding, arrives):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UnicodeEncodeError):
        print("超 é \udc80 a", flush=True)
    any_terminal()
    print("超 é \udc80 a", end="", flush=True)
    assert stream.buffer.getvalue() == arrives


def test_a_stream_that_is_missing_leads_nowhere_and_a_replaced_one_is_left_alone(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw, or after `>&-`
    monkeypatch.setattr(sys, "stderr", own)
    any_terminal()
    assert sys.stdout.name == os.devnull and sys.stderr is own
    sys.stdout.write("超 \udc80"[:1])
    sys.stdout.close()
    any_terminal()
    print("and after it was closed", flush=True)


COMMANDS = {
    "help": ((), 0),
    "no such command": (("nope",), 2),
    "help of train": (("train", "--help"), 0),
    "train": (("train", "--student", "s", "--train-data", "/nowhere"), 1),
    "unknown flag": (("train", "--nope"), 2),
    "evaluate": (("evaluate", "/nowhere", "/nowhere"), 1),
    "plan": (("plan", "grpo"), 1),
    "demo": (("demo", "--steps", "-1"), 1),
    "data check": (("data", "check", "/nowhere"), 1),
}


SEVERAL = """
import gc, json, os, runpy, sys
import kepo.digits.demo, kepo.evaluation.report, kepo.loop, kepo.planner.plan
import kepo.rollout.check_command
gc.freeze()  # a process ends five times as fast if nothing of this is collected
codes = []
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        for stream in json.loads(sys.argv[2]):
            try:
                os.fstat(stream)
            except OSError:
                continue
            os._exit(99)
        sys.argv = ["kepo", *words]
        sys.modules.pop("kepo.__main__", None)
        runpy.run_module("kepo", run_name="__main__", alter_sys=True)
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
with open(sys.argv[3], "w", encoding="utf-8") as file:
    json.dump(codes, file)
"""
"""Commands one after another, each in a process whose streams are closed as they were at the start
of Python; what they import, which takes seconds, is imported once for all of them."""


@pytest.mark.parametrize(
    ("closed", "names"),
    [
        (">&- 2>&-", list(COMMANDS)),
        (">&-", ["data check", "train"]),
        ("2>&-", ["data check", "train"]),
        ("<&- >&- 2>&-", ["data check"]),
    ],
)
def test_commands_end_as_they_should_without_standard_streams(closed, names, tmp_path):
    words, ends = zip(*(COMMANDS[name] for name in names), strict=True)
    streams = [number for number, sign in ((0, "<"), (1, " >"), (2, "2>")) if sign in f" {closed}"]
    told = [json.dumps(words), json.dumps(streams), tmp_path / "codes"]
    shell = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", SEVERAL, *map(str, told)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((tmp_path / "codes").read_text())
    assert dict(zip(names, codes, strict=True)) == dict(zip(names, ends, strict=True)), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    if "2>&-" not in closed:
        assert done.stderr.count("error: ") == ends.count(1)


CLOSED = """
import os, sys
from kepo.terminal import any_terminal
any_terminal()
file = open(sys.argv[1], "w", encoding="utf-8")
assert file.fileno() > 2
os.write(1, b"x"); os.write(2, b"a library's warning")
file.write("mine"); file.close()
"""


def test_what_is_written_to_a_closed_stream_goes_into_no_file(tmp_path):
    """The next file to be opened would get the stream's number."""
    shell = 'exec "$@" <&- >&- 2>&-'
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", CLOSED, tmp_path / "f"]
    done = subprocess.run(words, cwd=ROOT)
    assert done.returncode == 0 and (tmp_path / "f").read_text() == "mine"


LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True
    )


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory):
    """A dataset whose names are in no small encoding."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    (root / "QA_information").mkdir()
    (root / "Images").mkdir()
    Image.new("RGB", (8, 8)).save(root / "Images" / "e.png")
    record = (
        '[{"question_id": "q→", "question_type": "→ T", "question": "?", "gt_answer": "één",'
        ' "image_path": "Images/e.png", "option_A": "één", "option_B": "twee",'
        ' "modality_type": "超声"}]'
    )
    (root / "QA_information" / "a.json").write_text(record, encoding="utf-8")
    return root


@pytest.mark.parametrize("locale", LOCALES)
def test_data_check_prints_on_any_terminal(odd_names, locale):
    done = run("-m", "kepo", "data", "check", odd_names, **LOCALES[locale])
    assert done.returncode == 0, done.stderr
    assert b"\\u8d85\\u58f0" in done.stdout and b"nothing is wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(("-m", "kepo", name, "--help") for name in ("train", "evaluate", "demo")),
        ("-m", "kepo", "plan", "--table", *sorted(ROOT.glob("recipes/*.yaml"))[:1]),
        ("-m", "kepo_kernels"),
    ],
    ids=lambda words: words[1],
)
def test_commands_print_on_an_ascii_terminal(words):
    done = run(*words, **LOCALES["ascii"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and done.stdout.strip()


# ---- a Python that is too old

OLD = """
import runpy, sys
sys.version_info, sys.version = (3, 10, 13, "final", 0), "3.10.13 (main)"
{}
"""


def test_the_loop_refuses_an_older_python_at_import():
    done = run("-c", OLD.format("import kepo.config"))
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("ImportError: kepo, the training loop, needs Python 3.11")
    assert "this is 3.10.13" in last


def test_its_commands_end_in_that_sentence_alone():
    program = "sys.argv = ['-m']; runpy._run_module_as_main('kepo')"
    done = run("-c", OLD.format(program))
    said = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(said) == 1
    assert said[0].startswith("error: kepo, the training loop, needs Python 3.11")
