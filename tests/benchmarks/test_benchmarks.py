"""The benchmarks' own logic, and each of their commands once in small."""

import csv
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

from benchmarks import bench_loss
from benchmarks.another_checkout import import_kernels_of
from benchmarks.losses import compare, floor, measure, peers, plot, problems, real, survival, table
from benchmarks.losses.losses_of_ours import CASES, NotComparable, ours
from benchmarks.losses.tolerance import kl_bias, tolerance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flat():
    return problems.Problem.make(problems.SHAPES["tiny"], torch.float32, CPU)


@pytest.fixture(scope="module")
def peaked():
    shape = problems.Shape("peaked", 64, 256, 256, 2048, {}, peaked=True)
    return problems.Problem.make(shape, torch.float32, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "torch_lce",
        # These compile, or import half a training stack.
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("compiled", "liger", "trl", "cce")
        ),
    ],
)
def test_peers_compute_the_same_gradients(flat, name):
    """One that does less, or something else, would make its time meaningless."""
    reasons = []
    for case in CASES:
        try:
            found = peers.PEERS[name](flat, case)()
        except NotComparable as reason:
            reasons.append(str(reason))
            continue
        for a, b in zip(found, ours(flat, case, 0.0)(), strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-4, case
    if len(reasons) == len(CASES):
        pytest.skip(reasons[0])


def test_floor_is_our_matrix_products_in_our_chunks(monkeypatch):
    """Rows of every product, call by call, of the floor and of the loss itself."""
    shape = problems.Shape("wide", 1000, 4, 6, 32768, {})  # so wide that it takes several chunks
    problem = problems.Problem.make(shape, torch.float32, CPU)
    seen = []

    def counted(name, operand):
        original = getattr(floor.gemm, name)

        def product(*args, **kwargs):
            seen.append((name, len(args[operand])))
            return original(*args, **kwargs)

        monkeypatch.setattr(floor.gemm, name, product)

    counted("project_", 0)
    counted("hidden_gradient", 0)
    counted("accumulate_head_", 1)

    def products(call):
        seen.clear()
        call()
        return [entry for entry in seen if entry[1]]

    for case in ("kd_open", "kd_half", "grpo", "joint", "two_calls", "logprobs", "ce"):
        bare = products(floor.floor(problem, case))
        mine = products(ours(problem, case))
        names = [name for name, _ in bare]
        assert names == [name for name, _ in mine], case
        for name in ("project_", "hidden_gradient", "accumulate_head_"):
            floor_rows, our_rows = ([n for k, n in side if k == name] for side in (bare, mine))
            if name == "project_":
                assert floor_rows == our_rows, case
            else:  # a clipped token sends nothing back, and the loss leaves its row out
                assert sum(our_rows) <= sum(floor_rows) <= 1.1 * sum(our_rows), case
        assert case != "kd_open" or names.count("accumulate_head_") > 1, "one chunk shows little"


def test_floor_takes_the_best_of_several_chunk_lengths(monkeypatch):
    """The shortest is the fastest here, by a planted clock."""
    shape = problems.Shape("wide", 1000, 4, 6, 32768, {})
    problem = problems.Problem.make(shape, torch.float32, CPU)
    rows, own = problem.rows, floor.chunk_rows(problem, problem.rows, problem.rows)
    tried = floor.lengths(problem, "kd_open")
    assert tried[0] <= own // 2 < own < rows == tried[-1] and len(tried) >= 3
    seconds = {length: 1 + abs(length - tried[0]) for length in tried}
    monkeypatch.setattr(floor, "floor", lambda problem, case, length: length)
    monkeypatch.setattr(floor, "watched", lambda length, device: measure.Measurement(9.0, length))
    monkeypatch.setattr(measure, "_settle", lambda mib: None)
    monkeypatch.setattr(measure, "timed", lambda length, device: seconds[length])
    call, result = floor.fastest(problem, "kd_open")
    assert call == result.peak_mib == tried[0] != own and result.first == 1 and not result.times
    assert result.note == f"chunks of {call} rows, the fastest of {', '.join(map(str, tried))}"
    # All rows at once where they would take more than a machine may have: the engine's own remain.
    monkeypatch.setattr(floor, "LARGEST", 1 << 20)
    assert floor.lengths(problem, "kd_open")[-1] <= own


def test_every_product_is_made_once_whatever_the_chunks(flat, monkeypatch):
    """A floor that leaves out rows would be a low one."""
    seen = []
    monkeypatch.setattr(floor.gemm, "accumulate_head_", lambda dw, g, x, first: seen.append(len(x)))
    for length in (7, 64):
        seen.clear()
        floor.floor(flat, "kd_open", length)()
        assert sum(seen) == flat.rows and max(seen) <= length


@pytest.mark.parametrize(
    "given, fast, asked, expected",
    [
        ("bfloat16", False, "auto", ["float32"]),
        ("bfloat16", True, "auto", ["bfloat16", "float32"]),  # both are tried
        ("float16", True, "auto", ["float32"]),
        ("float32", True, "auto", ["float32"]),
        ("bfloat16", False, "bfloat16", ["bfloat16"]),
    ],
)
def test_peers_get_what_their_processor_multiplies_fast(given, fast, asked, expected, monkeypatch):
    monkeypatch.setattr(peers.gemm, "fast_bf16", lambda device: fast)
    found = peers.dtypes(getattr(torch, given), CPU, asked)
    assert found == [getattr(torch, name) for name in expected]
    cuda = torch.device("cuda")
    assert peers.dtypes(torch.bfloat16, cuda) == [torch.bfloat16]


@pytest.mark.parametrize(
    "fast, slow_in, expected",
    [
        (False, torch.float32, "float32"),  # however slow: bf16 is not even tried
        (True, torch.float32, "bfloat16"),
        (True, torch.bfloat16, "float32"),
    ],
)
def test_a_row_says_the_dtype_of_the_peers_own_inputs(fast, slow_in, expected, monkeypatch):
    seen = set()

    def peer(problem, case):
        dtype = problem.hidden.dtype
        assert problem.lm_head.dtype == problem.teacher_lm_head.dtype == dtype
        seen.add(dtype)
        return lambda: time.sleep(0.05 if dtype == slow_in else 0)

    monkeypatch.setattr(peers.gemm, "fast_bf16", lambda device: fast)
    monkeypatch.setitem(peers.PEERS, "eager", peer)
    words = ["--shape", "tiny", "--case", "kd_open", "--provider", "ours", "eager", "--rounds", "1"]
    args = bench_loss.parse(words)
    rows = {row["provider"]: row for row in bench_loss.bench(args.shape[0], args)}
    assert rows["ours"]["dtype"] == "bfloat16" and rows["eager"]["dtype"] == expected
    assert seen == ({torch.float32, torch.bfloat16} if fast else {torch.float32})
    assert ("bfloat16" in rows["eager"]["note"]) == (fast and expected == "float32")


def test_the_same_problem_in_another_dtype():
    low = problems.Problem.make(problems.SHAPES["tiny"], torch.bfloat16, CPU)
    high = low.cast(torch.float32)
    assert low.cast(torch.bfloat16) is low and low.hidden.dtype == torch.bfloat16
    for name in ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head"):
        a, b = getattr(low, name), getattr(high, name)
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)
        assert b.is_leaf and b.requires_grad == a.requires_grad


def test_grad_tol_is_promised_on_a_cpu_only():
    devices = {promise.name: set(promise.target) for promise in table.PROMISES}
    assert all(
        found == ({"cpu"} if "_tol" in name else {"cpu", "cuda"}) for name, found in devices.items()
    )


def test_peaked_problems_are_peaked_and_their_teacher_is_near(peaked):
    assert 0.05 < peaked.entropy < 0.4
    student, teacher = (
        (x.flatten(0, 1).detach() @ w.detach().T).log_softmax(-1)
        for x, w in (
            (peaked.hidden, peaked.lm_head),
            (peaked.teacher_hidden, peaked.teacher_lm_head),
        )
    )
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert 1e-3 < divergence < 0.5
    assert (student.argmax(-1) == teacher.argmax(-1)).float().mean() > 0.8


def test_columns_are_counted_as_the_tolerance_asks_for_them(flat, peaked):
    """The fewest columns of autograd's dlogits whose sums of |.| leave out no more than asked."""
    for problem, grad_tol in ((flat, 0.01), (peaked, 0.02), (peaked, 0.2)):
        logits = (problem.hidden.detach() @ problem.lm_head.detach().T).requires_grad_()
        logprobs = peers.token_logprobs(logits, problem.targets)
        peers.clipped(logprobs, problem.old_logprobs, problem.advantages).backward()
        mass = logits.grad.flatten(0, 1).abs().sum(0).double().sort().values
        left_out = int((mass.cumsum(0) <= grad_tol * mass.sum()).sum())
        found = tolerance(problem, "grpo_tol", grad_tol)
        assert abs(found.needed - (1 - left_out / len(mass))) < 2e-3
        assert found.kept == (1 if problem is flat else found.needed)
    assert max(found.hidden, found.lm_head) > 1e-3
    assert tolerance(peaked, "grpo_tol", 0.0)[:3] == (0, 0, 0)


def test_bf16_logits_make_a_kl_larger(peaked):
    found = {row["case"]: row for row in kl_bias(peaked)}
    assert abs(found["ratio:kl_1/float32"]["ratio"]) < 1e-4
    assert 1e-4 < abs(found["ratio:kl_1/bf16_logits"]["ratio"]) < 0.1


def test_states_of_padded_prompts_are_those_of_each_alone(monkeypatch):
    """Else the rows of `--shape real` would be no model's."""
    transformers = pytest.importorskip("transformers")
    from kepo.digits.tiny import build_tokenizer
    from kepo.models.families.text_only import TEMPLATE

    monkeypatch.setattr(real, "TOKENS", 5)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids, asked, said = real.sampled(model, tokenizer, 1.0)
    found = real.states(model, ids, asked, said)
    alone = []
    for row, read, told in zip(ids, asked, said, strict=True):
        with torch.no_grad():
            states = model.model(input_ids=row[read][None]).last_hidden_state[0]
        alone.append(states[-int(told.sum()) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(alone))
    assert tokenizer.eos_token_id not in ids[said & ~said.roll(-1, 1)].tolist() or len(found) < 60


def test_few_rows_still_have_a_closed_sequence(flat):
    few = flat.first_rows(8)
    assert few.rows == 8 and few.gate("kd_half").tolist() == [True, False]


def test_time_of_all_rows_is_read_off_a_line(monkeypatch):
    """1 s and 10 ms a row are 11 s for 1000 rows, not the 135 s that 8 rows would promise. That the
    fewest rows cost 40 ms each promises no more either."""
    monkeypatch.setattr(measure, "timed", lambda rows, device: 1 + 0.01 * rows)
    found = measure.estimated(lambda rows: rows, 1000, CPU, longest=6.0)
    assert found.seconds.median == pytest.approx(11)
    assert "scaled from calls of 128 and 256 rows" in found.note and found.peak_mib is None
    assert measure.estimated(lambda rows: rows, 1000, CPU, longest=12.0) is None
    bent = {n: min(0.04 * n, 1.92 + 0.01 * n) for n in (8, 16, 32, 64, 128, 256)}
    monkeypatch.setattr(measure, "timed", lambda rows, device: bent[rows])
    found = measure.estimated(lambda rows: rows, 1000, CPU, longest=6.0)
    assert found.seconds.median == pytest.approx(11.92)


def test_ratios_are_taken_within_a_round():
    mine, other = measure.Measurement(9.0, None), measure.Measurement(9.0, None)
    mine.times, other.times = [1.0, 20.0, 3.0], [1.0, 10.0, 1.0]
    assert mine.over([other]) == pytest.approx((2.0, 1.4, 2.6))
    assert mine.over([other, other]).median == pytest.approx(1.0)
    assert mine.seconds.median == 3.0


def test_promises_are_judged_where_they_are_promised():
    measured = {
        ("kd_open", name): SimpleNamespace(over=lambda _: measure.Quantiles(1.2, 1.1, 1.3))
        for name in ("ours", "floor")
    }
    (row,) = table.promised_rows("design", "cpu", measured)
    assert (row["case"], row["target"], row["met"]) == ("ratio:kd/floor", 1.1, "no")
    (row,) = table.promised_rows("tiny", "cpu", measured)
    assert (row["target"], row["met"]) == (None, "")


def test_table_csv_and_picture(tmp_path, monkeypatch, capsys):
    results, picture = tmp_path / "deep" / "r.csv", tmp_path / "p.png"
    monkeypatch.setitem(sys.modules, "trl.kernels", None)  # as if it were not installed
    cases = ["kd_open", "kd_half", "grpo", "joint", "two_calls", "kd_tol"]
    settings = ["--shape", "tiny", "--dtype", "float32", "--rounds", "2", "--case", *cases]
    providers = ["--provider", "floor", "ours", "eager", "trl", "cce"]
    bench_loss.main([*settings, *providers, "--csv", str(results)])
    out = capsys.readouterr().out
    assert "trl >= 1.16 cannot be imported" in out
    assert "has cross-entropy only" in out

    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == table.COLUMNS
    for case in cases:
        mine = {row["provider"]: row for row in rows if row["case"] == case}
        assert {"floor", "ours", "eager"} <= set(mine) and "trl" not in mine
        for row in mine.values():
            assert row["commit"] and row["torch"] == torch.__version__ and row["rounds"] == "2"
            assert 0 < float(row["seconds_p20"]) <= float(row["seconds"])
            assert float(row["seconds"]) <= float(row["seconds_p80"])
        assert float(mine["floor"]["x_floor"]) == 1
    ratios = {row["case"]: row for row in rows if row["case"].startswith("ratio:")}
    assert {"ratio:kd/floor", "ratio:half/open", "ratio:joint/two_calls"} <= set(ratios)
    assert float(ratios["ratio:kd_tol/gradient_error"]["ratio"]) <= 1e-2
    assert all(row["provider"] == "ours" and float(row["ratio"]) >= 0 for row in ratios.values())

    plot.main([str(results), "--picture", str(picture)])
    assert picture.stat().st_size > 10_000


def aborts(problem, case):
    """A planted peer: well on few rows, its end on all of them."""
    return os.abort if problem.rows == problems.SHAPES["tiny"].n else lambda: None


def sleeps(problem, case):
    return lambda: time.sleep(600)


@pytest.mark.parametrize(
    "planted, patience, reason",
    [(aborts, survival.PATIENCE, "crashes here: SIGABRT"), (sleeps, 0.5, "hangs here")],
)
def test_bench_survives_a_peer_that_does_not(planted, patience, reason, monkeypatch, capsys):
    """What stands after it is still measured."""
    monkeypatch.setitem(peers.PEERS, "cce", planted)
    monkeypatch.setattr(survival, "PATIENCE", patience)
    settings = ["--shape", "tiny", "--dtype", "float32", "--rounds", "1", "--case", "ce"]
    bench_loss.main([*settings, "--provider", "floor", "cce", "ours"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table_of = {words[1]: words for words in lines if words[:1] == ["ce"]}
    assert " ".join(table_of["cce"]).startswith(f"ce cce - - - - {reason}")
    assert float(table_of["ours"][3]) > 0


def test_a_peer_that_raises_is_not_refused(capfd):
    """The bench itself will name what was raised."""
    survival.must_survive(raises, "ce", problems.SHAPES["tiny"], torch.float32, CPU)
    assert capfd.readouterr() == ("", "")


def raises(problem, case):
    raise ValueError("no such thing")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--shape", "1,2"], "N,H,Ht,V"),
        (["--shape", "0,1,1,8"], "positive"),
        (["--rounds", "0"], "--rounds"),
        (["--device", "nonsense"], "nonsense"),
        (["--case", "kd"], "kd_open"),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_loss.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_plot_refuses_what_is_no_results_file(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="no column machine"):
        plot.main([str(other), "--picture", str(tmp_path / "p.png")])


def worktrees() -> str:
    words = ["git", "worktree", "list"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout


def test_compare_leaves_no_worktree_behind_after_an_error():
    before = worktrees()
    with pytest.raises(ZeroDivisionError), compare.worktree("HEAD") as (tree, _):
        assert (tree / "kepo_kernels" / "__init__.py").exists() and str(tree) in worktrees()
        raise ZeroDivisionError
    assert not tree.parent.exists() and worktrees() == before


def test_compare_builds_only_what_differs(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for tree in (ours, theirs):
        (tree / "csrc").mkdir(parents=True)
        (tree / "kepo_kernels").mkdir()
        (tree / "setup.py").write_text("raise SystemExit('words of the build')\n")
        (tree / "csrc" / "rows.cpp").write_text("int x;\n")
    monkeypatch.setattr(compare, "ROOT", ours)
    assert "not built" in compare.build(theirs)
    (ours / compare.LIBRARY).write_text("binary")
    assert "a copy" in compare.build(theirs)
    assert (theirs / compare.LIBRARY).read_text() == "binary"
    (theirs / compare.LIBRARY).unlink()
    (theirs / "csrc" / "rows.cpp").write_text("int y;\n")
    with pytest.raises(SystemExit, match="words of the build"):
        compare.build(theirs)


def test_the_package_of_another_checkout_comes_first_or_not_at_all(tmp_path):
    """Once this one's is imported, a time would be of the wrong package."""
    before = list(sys.path)
    with pytest.raises(ImportError, match="kepo_kernels comes from"):
        import_kernels_of(tmp_path)
    assert sys.path == before


@pytest.mark.slow
def test_compare_times_both_trees():
    before = worktrees()
    settings = ["--shape", "tiny", "--dtype", "float32", "--rounds", "3", "--case", "kd_open", "ce"]
    command = [sys.executable, "benchmarks/losses/compare.py", "HEAD", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert all(float(lines[case][3]) > 0 for case in ("kd_open", "ce"))
    assert worktrees() == before


@pytest.mark.slow
def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    report = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "benchmarks/"]
    command += ["-k", "ours or floor", "--kepo-shape", "32,8,12,128", f"--benchmark-json={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    timed = json.loads(report.read_text())["benchmarks"]
    assert {entry["group"] for entry in timed} == set(CASES)
    assert all(entry["extra_info"]["N"] == 32 for entry in timed)
