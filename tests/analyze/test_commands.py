"""The command line of the analysis: output, files, exit codes, and one line for each fault."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import launching
import made_up
import numpy as np
import pytest

from mpies.analyze.commands import main
from mpies.analyze.export import scalars
from mpies.analyze.run import open_run
from mpies.runfile import RunFile

DATA = launching.DATA
REFERENCE = str(DATA / "schema-1.h5")
OTHER = str(DATA / "schema-1-first.h5")
COMMANDS = ("summary", "plot", "compare", "samples", "export", "report", "watch")


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, standard output, standard error)."""

    def call(*arguments: str):
        status = main([*map(str, arguments)])
        return (status, *capsys.readouterr())

    return call


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert f"python -m mpies.analyze {command}" in said.split("example:")[1]
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {command} " in said for command in COMMANDS)


def test_as_a_module_and_into_a_closed_pipe():
    """The way it is called; and what reads it may stop doing so."""
    command = [sys.executable, "-m", "mpies.analyze", "summary", REFERENCE]
    with subprocess.Popen(
        command, env=launching.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


def test_summary_of_one(run):
    status, out, err = run("summary", REFERENCE)
    assert (status, err) == (0, "")
    rewards = open_run(REFERENCE).generations.reward_mean
    for part in ("5 of 5 generations", f"{rewards[0]:.4g}", f"{rewards[4]:.4g}", "restarted once", "3 ranks"):
        assert part in out, part


def test_summary_of_several(run):
    status, out, _ = run("summary", REFERENCE, OTHER)
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("run") and "held-out" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["schema-1", "schema-1-first"]
    assert max(map(len, lines)) <= 100


def test_summary_as_json(run, tmp_path):
    empty = made_up.write_run(tmp_path / "empty", generations=0)
    status, out, _ = run("summary", REFERENCE, empty, "--json")
    first, second = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (status, first["name"], first["generations"]) == (0, "schema-1", 5)
    assert second["tokens_per_second"] is None, "nothing is measured yet"


@pytest.fixture
def later(tmp_path) -> Path:
    """A run that was evaluated once more, by sampling, at its end."""
    path = made_up.write_run(tmp_path / "run", generations=10)
    made_up.evaluate_later(path, 10, reward=-3.0)
    made_up.evaluate_later(path, 10, samples=2, **{"pass@2": 0.75, "kl": float("nan")})
    return path


def test_summary_of_a_run_that_was_evaluated_later(run, later):
    _, out, _ = run("summary", later)
    line = next(line for line in out.splitlines() if "2 samples at T=0.7" in line)
    assert line.split()[:4] == ["generation", "10", "held-out", "(3)"] and "pass@2 0.75 +- 0.5" in line
    assert "reward -3 +- 0.5" in out
    _, out, _ = run("summary", later, "--json")
    (summary,) = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert summary["evaluations"][1]["figures"] == {"pass@2": [0.75, 0.5], "kl": [None, 0.5]}


def test_summary_in_ascii():
    ended = launching.python(
        "-m", "mpies.analyze", "summary", REFERENCE, OTHER, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.isascii()


def test_the_good_ones_are_shown_the_others_named(run, tmp_path):
    (tmp_path / "empty.h5").touch()
    status, out, err = run("summary", tmp_path / "empty.h5", REFERENCE, tmp_path / "missing.h5")
    assert status == 2
    assert "5 of 5 generations" in out
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("mpies: ") for line in lines)
    assert "empty.h5" in lines[0] and "missing.h5: there is no such file" in lines[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file(command, run, tmp_path):
    output = {"plot": "x.png", "export": "x", "report": "x.html"}.get(command)
    options = ["--output", tmp_path / output] if output else []
    form = ["--format", "csv"] if command == "export" else []
    status, out, err = run(command, tmp_path / "missing.h5", *options, *form)
    assert (status, out) == (2, "")
    assert err == f"mpies: {tmp_path / 'missing.h5'}: there is no such file\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.render
def test_plot_writes_what_the_name_says(run, tmp_path):
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for form, start in starts.items():
        status, out, _ = run(
            "plot", REFERENCE, "--panels", "learning", "--output", tmp_path / f"new/figure.{form}"
        )
        assert status == 0 and f"figure.{form}" in out
        assert (tmp_path / f"new/figure.{form}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plot", REFERENCE, "--output", "x.jpeg"], "--output: given x.jpeg, allowed is a name that ends in"),
        (["plot", REFERENCE, "--output", "x.png", "--panels", "nix"], "no panel 'nix'; there are learning"),
        (
            ["plot", REFERENCE, "--panels", "learning", "--output", "/dev/null/x.png"],
            "--output: cannot write",
        ),
        (["export", REFERENCE, "--format", "csv", "--output", "/dev/null/x"], "--output: cannot write"),
        (["samples", REFERENCE, "--prompt", "no such thing"], "--list shows the"),
        (["watch", REFERENCE, "--interval", "0"], "--interval: given 0"),
        (["plot", REFERENCE, "--output", "x.png", "--dpi", "0"], "--dpi: given 0, allowed is 1 to 1200"),
        (["compare", REFERENCE, "--generation", "0"], "--generation: given 0"),
        (["compare", REFERENCE, "--metric", "nix"], "no run has measured nix"),
    ],
)
def test_bad_input_is_told_in_a_line(arguments, told, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 2 and err.startswith("mpies: ") and err.count("\n") == 1
    assert told in err


def test_compare(run, tmp_path):
    paths = [
        made_up.write_run(
            tmp_path / f"s{s}-{i}", f"es.sigma={s}", f"es.seed={i}", generations=10, gain=99 - s
        )
        for s in (1, 2)
        for i in range(2)
    ]
    status, out, _ = run("compare", *paths)
    lines = out.splitlines()
    assert (
        status == 0 and lines[2].split()[:2] == ["sigma=2", "2"] and lines[3].split()[:2] == ["sigma=1", "2"]
    )
    assert "permutation" in out and "too few seeds" in out


# Samples


def test_samples_of_a_prompt(run):
    status, out, _ = run("samples", REFERENCE, "--prompt", "FRANCE")
    table = open_run(REFERENCE).samples
    rows = table[table.prompt == "What is the capital of France?"]
    assert status == 0 and "What is the capital of France?" in out
    shown = [line.rstrip().split(maxsplit=2) for line in out.splitlines()[2:]]
    assert [(int(g), answer) for g, _, answer in shown] == list(zip(rows.generation, rows.completion))


def test_samples_of_later_evaluations(run, later):
    """Greedy answers are there already; sampled ones are marked."""
    _, out, _ = run("samples", later, "--prompt", "prompt 1")
    shown = [line.strip() for line in out.splitlines()[2:]]
    assert [line.split()[0] for line in shown] == ["0", "10", "10", "10"]
    assert [line.endswith(("answer 0.1", "answer 10.1")) for line in shown] == [True, True, False, False]
    for s in (0, 1):
        assert shown[2 + s].startswith(f"10 (sample {s} at T=0.7, seed 42)")
        assert shown[2 + s].endswith(f"sampled 10.1.{s}")


def test_prompts_have_numbers(run):
    _, out, _ = run("samples", REFERENCE, "--list")
    assert out.splitlines()[1].split(maxsplit=2)[0] == "1"
    second = out.splitlines()[2].split(maxsplit=2)[2].strip()
    _, out, _ = run("samples", REFERENCE, "--prompt", "2")
    assert second in out.splitlines()[0]


def test_answers_have_no_power_over_the_terminal(run, tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=1)
    log = RunFile.reopen(path, 1)
    sample = {"generation": 1, "split": "train", "prompt": "p\x1b]0;x\x07", "reward": 0.0}
    log.add_evaluation(made_up.evaluation(1, 0, None)[0] | {"split": "train"},
                       [{**sample, "completion": "a\x1b[2Jb\r[bold]c[/bold]\nd"}])  # fmt: skip
    log.close()
    for options in (["--prompt", "]0;x"], ["--prompt", "]0;x", "--full"], ["--list"]):
        _, out, _ = run("samples", path, *options)
        assert out.replace("\n", "").isprintable()
    _, out, _ = run("samples", path, "--prompt", "]0;x")
    assert "[bold]c[/bold]" in out, "markup is text"


def test_conversations_are_shown_line_by_line(run, tmp_path):
    """Who said what, whatever that is; calls of tools, too; what is no conversation is the completion."""
    path = made_up.write_run(tmp_path / "run", generations=1)
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    said = [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "I\x1b[2J add.", "tool_calls": [call]},
        {"role": "tool", "content": "<b>[bold]2"},
        {"role": "assistant", "content": "Two."},
    ]
    told = [
        json.dumps({"conversation": said, "ended": "done after 2 turns"}),
        "{",
        '{"conversation": "text"}',
    ]
    log = RunFile.reopen(path, 1)
    sample = {
        "generation": 1,
        "split": "train",
        "prompt": "Which sum?",
        "reward": 0.0,
        "completion": "all of it",
    }
    log.add_evaluation(
        made_up.evaluation(1, 0, None)[0] | {"split": "train"},
        [{**sample, "messages": text, "completion": f"all {i}"} for i, text in enumerate(told)],
    )
    log.close()
    for options in ([], ["--full"]):
        _, out, _ = run("samples", path, "--prompt", "which sum", *options)
        parts = [
            "assistant: I",
            'add({"a": 1})',
            "tool: <b>[bold]2",
            "assistant: Two.",
            "end: done after 2 turns",
        ]
        places = [out.index(part) for part in [*parts, "all 1", "all 2"]]
        assert places == sorted(places) and "all 0" not in out and out.replace("\n", "").isprintable()
    output = tmp_path / "page.html"
    assert run("report", path, "--output", output)[0] == 0
    page = output.read_text()
    assert "<b>tool:</b> &lt;b&gt;[bold]2" in page and "<b>end:</b> done after 2 turns" in page


def test_no_samples(run, tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=0)
    with h5py.File(path, "r+") as file:
        for column in file["sample"].values():
            column.resize(0, axis=0)
    status, _, err = run("samples", path)
    assert status == 2 and "no answers were kept" in err


# Export


def test_csv_and_parquet_come_back(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    original = open_run(REFERENCE)
    for form, read in (("csv", pandas.read_csv), ("parquet", pandas.read_parquet)):
        status, _, _ = run("export", REFERENCE, "--format", form, "--output", tmp_path / form)
        assert status == 0
        for table in ("generations", "members", "evaluations", "samples", "starts"):
            again = read(tmp_path / form / f"{table}.{form}")
            frame = getattr(original, table)
            if form == "csv" and table in ("generations", "members"):
                again = again.set_index(frame.index.names)
            for name in frame:
                left, right = frame[name].tolist(), again[name].astype(frame[name].dtype).tolist()
                if form == "csv":
                    right = [re.sub(r"^'(?=[=+@\t\r-])", "", r) if isinstance(r, str) else r for r in right]
                kind = frame[name].dtype.kind
                same = np.array_equal(left, right, equal_nan=True) if kind == "f" else left == right
                assert same, f"{form}: {table}.{name}"
        assert (tmp_path / form / "settings.yaml").read_text() == original.configs[-1]


def test_what_a_model_wrote_is_no_formula_of_a_spreadsheet(run, tmp_path):
    """A cell that begins with one of these is run, or sent somewhere, when the file is opened."""
    pandas = pytest.importorskip("pandas")
    texts = ["=HYPERLINK(0)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "1 = 1", "'=1", "", "plain"]
    path = made_up.write_run(tmp_path / "run", generations=0)
    with h5py.File(path, "r+") as file:
        for table in ("sample", "metric"):
            for column in file[table].values():
                column.resize(len(texts), axis=0)
        file["sample/completion"][:] = file["metric/name"][:] = texts
        file["sample/prompt"][:] = file["sample/split"][:] = file["metric/split"][:] = "train"
        file["sample/reward"][:] = file["metric/mean"][:] = -5.0
        file["sample/generation"][:] = file["metric/generation"][:] = 0
        made_up.seal_all(file)
    for form, quote in (("csv", "'"), ("parquet", "")):
        status, _, err = run("export", path, "--format", form, "--output", tmp_path / form)
        assert status == 0, err
        read = {"csv": lambda p: pandas.read_csv(p, keep_default_na=False), "parquet": pandas.read_parquet}[
            form
        ]
        samples, metrics = (read(tmp_path / form / f"{table}.{form}") for table in ("samples", "metrics"))
        expected = [quote + text for text in texts[:6]] + texts[6:]
        assert samples.completion.tolist() == expected == metrics.name.tolist()
        assert samples.reward.tolist() == [-5.0] * len(texts), "numbers stay numbers"


def test_tables_of_later_evaluations_are_exported(run, later, tmp_path):
    pandas = pytest.importorskip("pandas")
    run("export", REFERENCE, "--format", "csv", "--output", tmp_path / "without")
    assert not list((tmp_path / "without").glob("figures*"))
    run("export", later, "--format", "csv", "--output", tmp_path / "csv")
    figures, answers = (pandas.read_csv(tmp_path / f"csv/{t}.csv") for t in ("figures", "answers"))
    assert figures.name.tolist() == ["reward", "pass@2", "kl"] and figures.error.tolist() == [0.5] * 3
    assert answers.completion.tolist()[:3] == ["answer 10.0", "answer 10.1", "sampled 10.0.0"]
    run("export", later, "--format", "json", "--output", tmp_path / "run.json")
    whole = json.loads((tmp_path / "run.json").read_text())
    assert whole["figure"]["mean"] == [-3.0, 0.75, None]
    steps = {step: values for step, _, values in scalars(open_run(later))}
    assert steps[10]["held_out, greedy/reward"] == -3
    assert steps[10]["held_out, 2 samples at T=0.7, seed 42/pass@2"] == 0.75


def test_json_holds_everything_and_no_nan(run, tmp_path):
    status, _, _ = run("export", REFERENCE, "--format", "json", "--output", tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    whole = json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    original = open_run(REFERENCE)
    assert status == 0 and whole["settings"] == original.settings
    assert whole["member"]["seed"] == original.column("member/seed").tolist(), "all 64 bits"
    assert whole["evaluation"]["kl"] == [None] * len(original.evaluations)
    assert whole["sample"]["completion"] == original.samples.completion.tolist()


def test_tensorboard_reads_the_events(run, tmp_path):
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    status, _, _ = run("export", REFERENCE, "--to", "tensorboard", "--output", tmp_path / "events")
    assert status == 0
    events = reader.EventAccumulator(str(tmp_path / "events"), {"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    original = open_run(REFERENCE)
    means = events.Scalars("reward/mean")
    assert [event.step for event in means] == list(range(5))
    assert np.allclose([event.value for event in means], original.generations.reward_mean)
    begun = original.starts.utc[0]
    assert abs(means[0].wall_time - original.generations.seconds[0] - _seconds(begun)) < 1
    held_out = original.evaluations[original.evaluations.split == "held_out"]
    shown = {event.step: event.value for event in events.Scalars("held_out/reward_mean")}
    assert shown == pytest.approx(dict(zip(held_out.generation, held_out.reward_mean)))
    assert "held_out/kl" not in events.Tags()["scalars"], "not measured"
    assert len(events.Histograms("reward/members")) == 5
    status, _, err = run("export", REFERENCE, "--to", "tensorboard", "--output", tmp_path / "events")
    assert status == 2 and "holds TensorBoard events already" in err


@pytest.mark.render
def test_wandb_gets_a_folder_to_sync(run, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed; only its users need it")
    status, out, err = run("export", REFERENCE, "--to", "wandb-offline", "--output", tmp_path / "offline")
    assert (status, err) == (0, "") and "wrote" in out
    (log,) = (tmp_path / "offline").glob("wandb/offline-run-*/*.wandb")
    data = log.read_bytes()
    for name in ("reward/mean", "held_out/reward_mean", "seconds/generate", "sigma"):
        assert name.encode() in data, name


def _seconds(utc: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(utc).timestamp()


# Watch


def test_watch_of_a_complete_run_ends(run):
    status, out, _ = run("watch", REFERENCE)
    assert status == 0 and out.splitlines()[-1].startswith("generation 5/5 ")


def test_watch_follows_a_job_to_its_end(tmp_path):
    """In another process, as it is meant; this one writes."""
    path = made_up.write_run(tmp_path / "run", generations=6)
    whole = {table: _rows(path, table) for table in ("generation", "member")}
    made_up.rewind(path, 2)
    with h5py.File(path, "r+") as file:
        for column in file["evaluation"].values():
            column.resize(2, axis=0)
    log = RunFile.reopen(path, 6)
    command = [sys.executable, "-m", "mpies.analyze", "watch", str(path), "--interval", "0.05"]
    with subprocess.Popen(
        command, env=launching.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = threading.Timer(60, process.kill)
        deadline.start()
        try:
            lines = [process.stdout.readline()]
            for g in range(2, 6):
                log.append(*({name: values[g] for name, values in whole[t].items()} for t in whole))
            lines += [process.stdout.readline() for _ in range(4)]
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.6)  # the last evaluation is still to come
            log.add_evaluation({**made_up.evaluation(6, 0, None)[0], "split": "held_out"}, [])
            assert process.wait(60) == 0
        finally:
            deadline.cancel()
            process.kill()
            log.close()
    assert [line.split()[1] for line in lines] == [f"{g}/6" for g in range(2, 7)]


def test_watch_is_left_by_an_interrupt(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=6)
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", 2)
    command = [sys.executable, "-m", "mpies.analyze", "watch", str(path)]
    with subprocess.Popen(
        command,
        env=launching.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and so their children, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout.readline().startswith("generation 2/6")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def _rows(path: Path, table: str) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: dataset[:] for name, dataset in file[table].items()}


def test_watch_on_a_terminal_shows_the_curve(tmp_path):
    import pty

    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "mpies.analyze", "watch", REFERENCE]
    env = launching.environment(TERM="xterm", COLUMNS="100", LINES="40")
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        seen = b""
        while piece := _piece(ours):
            seen += piece
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0
    assert "5 of 5 generations" in text and "complete" in text and "│" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"


def _piece(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's way to say that the other end was closed
        return b""
