"""The program as a visitor starts it: mpirun -n N python -m mpies.train, in a folder of their own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import h5py
import launching
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpies import config
from mpies.es.directions import directions
from mpies.noise import definition

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

TRAIN = ("-m", "mpies.train", "config.yaml")
GENERATIONS = 4

# Together: both families, tied and untied, all live dtypes, antithetic or not, a population that no
# number of ranks above 1 divides, and one with fewer members than ranks.
CASES = {
    "llama-tied-bf16": ({"kind": "llama", "tied": True}, {"dtype": "bfloat16"}, {"population": 5}),
    "qwen2-untied-fp16": (
        {"kind": "qwen2", "tied": False},
        {"dtype": "float16"},
        {"population": 6, "antithetic": True},
    ),
    "llama-untied-fp32": ({"kind": "llama", "tied": False}, {"dtype": "float32"}, {"population": 2}),
    "qwen2-tied-fp32": ({"kind": "qwen2", "tied": True}, {"dtype": "float32"}, {"population": 5}),
    "llama-tied-bf16-all": (
        {"kind": "llama", "tied": True},
        {"dtype": "bfloat16", "master": "live"},
        {"population": 5},
    ),
}
DTYPES = {name: getattr(torch, model["dtype"]) for name, (_, model, _) in CASES.items()}

# What a run file holds; it may hold more.
TABLES = {
    "generation": "reward_mean reward_std reward_min reward_max sigma alpha digest seconds seconds_perturb"
    " seconds_generate seconds_reward seconds_communicate seconds_wait seconds_update seconds_log"
    " imbalance tokens bytes_communicated bytes_gathered identical_pairs pairs_with_signal"
    " prompts_disagreeing distinct_answers truncated",
    "member": "seed sign reward coefficient rank tokens seconds",
    "evaluation": "generation split reward_mean accuracy kl tokens drift_l2 answer_tokens",
    "metric": "generation split name mean",
    "sample": "generation split prompt completion reward",
    "prompt": "generation split number reward accuracy tokens",
    "start": "generation utc world_size hosts devices versions reason rewards",
    "config": "000",
}
UNMEASURED = {"evaluation/kl", "evaluation/drift_l2"}

# All cases in one launch, since most of a launch is imports.
SEVERAL_JOBS = """
import sys
from mpies.ranks import launch
from mpies import train

def main(comm, files):
    return max(train.main(comm, [file]) for file in files)

launch.run(main, sys.argv[1:])
"""


def write_config(
    path: Path, model: Path, directory: str, dtype: str = "float32", master: str = "float32", **es
) -> Path:
    """A configuration of a short run; steps are large, so that a random model's rewards differ."""
    es = {"population": 4, "generations": GENERATIONS, "sigma": 0.3, "alpha": 0.3} | es
    lines = [
        "model:",
        f"  path: {model}",
        f"  dtype: {dtype}",
        f"  master: {master}",
        "  device: cpu",
        "es:",
        *(f"  {key}: {str(value).lower()}" for key, value in es.items()),
        "engine:",
        "  max_new_tokens: 16",
        "run:",
        f"  directory: {directory}",
        "  evaluate_every: 2",
        "  keep_samples: 3",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """runs(n) -> the folder with a run directory per case, after a launch on n ranks."""
    done: dict[int, Path] = {}

    def launch(ranks: int) -> Path:
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
            (folder / "several.py").write_text(SEVERAL_JOBS)
            for name, (model, dtypes, es) in CASES.items():
                write_config(folder / f"{name}.yaml", tiny_model(**model), name, **dtypes, **es)
            files = [f"{name}.yaml" for name in CASES]
            ended = launching.mpirun(ranks, "several.py", *files, cwd=folder, timeout=300)
            assert ended.returncode == 0, ended.stderr
            done[ranks] = folder
        return done[ranks]

    return launch


@pytest.fixture
def job(tiny_model, tmp_path) -> Path:
    """A folder with a config.yaml, to start jobs in; they write to its `out`."""
    write_config(tmp_path / "config.yaml", tiny_model(), "out")
    return tmp_path


def contents(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a run file, with its path as the key."""
    found = {}
    with h5py.File(path, "r", locking=False) as file:
        file.visititems(
            lambda name, node: found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None
        )
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("case", CASES)
def test_every_world_size_gives_the_same_run(runs, ranks, case):
    """Digests, seeds, rewards, coefficients, evaluations, answers: all but times and places."""
    expected = contents(runs(1) / case / "run.h5")
    found = contents(runs(ranks) / case / "run.h5")
    assert found.keys() == expected.keys()
    for data in (found, expected):
        data["config/000"] = re.sub(rb"\n  directory: .*", b"", data["config/000"])
    differ = re.compile(r"start/.*|generation/checksum|.*/(seconds.*|rank|imbalance|bytes_.*)")
    compared = [name for name in expected if not differ.fullmatch(name)]
    assert {"generation/digest", "member/seed", "member/reward", "member/coefficient"} < set(compared)
    for name in compared:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    weights = Path(case) / "model" / "model.safetensors"
    assert (runs(ranks) / weights).read_bytes() == (runs(1) / weights).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_runs_do_something(runs, case):
    """What the comparison of world sizes would not notice: runs in which nothing happens."""
    data = contents(runs(1) / case / "run.h5")
    assert len(set(data["generation/digest"])) == GENERATIONS
    assert np.ptp(data["member/reward"], axis=1).min() > 0
    es = CASES[case][2]
    seeds, signs = data["member/seed"], data["member/sign"]
    if es.get("antithetic"):
        assert (seeds[:, 0::2] == seeds[:, 1::2]).all()
        assert (signs == np.tile([1, -1], es["population"] // 2)).all()
        assert len(set(seeds.flat)) == seeds.size // 2
    else:
        assert (signs == 1).all()
        assert len(set(seeds.flat)) == seeds.size


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_no_rank_is_left_out(runs, ranks):
    for case in CASES:
        rows = contents(runs(ranks) / case / "run.h5")["member/rank"]
        for row in rows:
            assert set(row) <= set(range(ranks))
            assert len(set(row)) == min(ranks, len(row)), "each rank has a member to begin with"


def test_every_dataset_is_filled(runs):
    case, members, evaluations = "qwen2-tied-fp32", 5, 2 * 3  # after 0, 2 and 4 generations
    data = contents(runs(3) / case / "run.h5")
    shapes = {
        "generation": (GENERATIONS,),
        "member": (GENERATIONS, members),
        "evaluation": (evaluations,),
        "metric": (evaluations,),  # one each
        "sample": (3 * (2 + 3),),  # two training prompts, and three of eight held-out ones
        "start": (1,),
        "config": (),
        # The dimensions' row numbers.
        "generations": (GENERATIONS,),
        "members": (members,),
        "evaluations": (evaluations,),
        "metrics": (evaluations,),
        "samples": (3 * (2 + 3),),
        "prompt": (3 * (2 + 8),),
        "prompts": (3 * (2 + 8),),
        "starts": (1,),
    }
    for table, columns in TABLES.items():
        assert {f"{table}/{column}" for column in columns.split()} <= data.keys()
    for name, values in data.items():
        assert np.shape(values) == shapes[name.split("/")[0]], name
        # A figure that is the same for all members has no cosine.
        if np.asarray(values).dtype.kind == "f" and "/cosine_" not in name:
            measured = name not in UNMEASURED
            assert (~np.isnan(values) == measured).all(), name
    assert data["evaluation/generation"].tolist() == [0, 0, 2, 2, 4, 4]
    assert data["evaluation/split"].tolist() == [b"train", b"held_out"] * 3
    assert data["start/world_size"].tolist() == [3]
    with h5py.File(runs(3) / case / "run.h5", "r", locking=False) as file:
        attributes = dict(file.attrs)
        for name in data:
            if not name.startswith("config/"):
                assert file[name].attrs["description"], name
                assert "units" in file[name].attrs, name
    assert attributes["generations_committed"] == GENERATIONS
    assert attributes["schema_version"] == 2
    assert attributes["program"] == "mpies"
    assert attributes["population"] == members
    assert attributes["model_digest"] != data["generation/digest"][0]
    assert attributes["parameters"] > 0 and attributes["model_path"]
    assert attributes["run_uuid"] and attributes["created_utc"] and attributes["program_version"]


@pytest.mark.parametrize("case", CASES)
def test_telemetry_adds_up(runs, case):
    data = contents(runs(1) / case / "run.h5")
    rewards = data["member/reward"]
    np.testing.assert_allclose(data["generation/reward_mean"], rewards.mean(axis=1))
    np.testing.assert_allclose(data["generation/reward_std"], rewards.std(axis=1))
    assert (data["generation/reward_min"] == rewards.min(axis=1)).all()
    assert (data["generation/reward_max"] == rewards.max(axis=1)).all()
    assert (data["generation/tokens"] == data["member/tokens"].sum(axis=1)).all()
    assert (data["generation/imbalance"] >= 1).all()
    # On one rank, the phases make up the generation, but for what lies between them. Writing the log
    # comes after it.
    phases = ("perturb", "generate", "reward", "wait", "communicate", "update")
    measured = sum(data[f"generation/seconds_{phase}"].sum() for phase in phases)
    assert 0.8 < measured / data["generation/seconds"].sum() <= 1
    for phase in ("perturb", "generate", "update"):
        assert (data[f"generation/seconds_{phase}"] > 0).all(), phase
    assert (data["generation/seconds_log"][1:] > 0).all(), "of the row before"


@pytest.mark.parametrize("case", CASES)
def test_cosines_are_those_of_the_logged_numbers(runs, case):
    """Of the answers' length, a figure that every task has: by NumPy, from seeds, signs, coefficients."""
    data = contents(runs(2) / case / "run.h5")
    prompts = 2  # of conciseness
    for g, found in enumerate(data["generation/cosine_answer_tokens"]):
        lengths = data["member/tokens"][g] / prompts
        z = (lengths - lengths.mean()) / (lengths.std() or np.nan)
        seeds, signs = data["member/seed"][g], data["member/sign"][g]
        one, other = (
            np.array([(signs * factor)[seeds == seed].sum() for seed in dict.fromkeys(seeds)])
            for factor in (data["member/coefficient"][g].astype(float), z)
        )
        lengths_of_both = np.linalg.norm(one) * np.linalg.norm(other)
        expected = one @ other / lengths_of_both if lengths_of_both > 0 else np.nan
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isfinite(data["generation/cosine_answer_tokens"]).any()


@pytest.mark.parametrize("case", CASES)
def test_the_file_proves_the_tuned_model(runs, tiny_model, case):
    """Promise 2, by the plain NumPy definition: initial weights and logged rows give every digest,
    and, cast to the live dtype, the model that was saved."""
    data = contents(runs(4) / case / "run.h5")
    model, dtypes, _ = CASES[case]
    initial = AutoModelForCausalLM.from_pretrained(tiny_model(**model), dtype=torch.float32)
    weights = {
        name: parameter.detach().numpy().reshape(-1)
        for name, parameter in initial.named_parameters(remove_duplicate=True)
    }
    ids = {name: definition.parameter_id(name) for name in weights}
    if dtypes.get("master") == "live":
        weights = {name: in_float32(torch.from_numpy(w).bfloat16()) for name, w in weights.items()}
    for generation in range(GENERATIONS):
        rows = (data[f"member/{column}"][generation] for column in ("seed", "sign", "coefficient"))
        seeds, factors = directions(*rows)
        for name in weights:
            weights[name] = definition.updated(weights[name], seeds, factors, ids[name])
            if dtypes.get("master") == "live":
                rounded = definition.rounded(weights[name], int(seeds[0]), ids[name])
                weights[name] = in_float32(torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16))
        digest = sum(definition.digest(weights[name], ids[name]) for name in weights) % 2**64
        assert digest == int(data["generation/digest"][generation])

    tuned = AutoModelForCausalLM.from_pretrained(runs(4) / case / "model", dtype="auto")
    assert tuned.dtype == DTYPES[case]
    assert [name for name, _ in tuned.named_parameters()] == list(weights)
    for name, parameter in tuned.named_parameters():
        expected = torch.from_numpy(weights[name]).to(tuned.dtype).view(parameter.shape)
        assert torch.equal(parameter, expected), name


def in_float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


def test_the_tuned_model_answers_as_in_the_file(runs):
    """The folder is complete: tokenizer, chat template and weights give the answer that was logged."""
    folder = runs(2) / "llama-untied-fp32"
    data = contents(folder / "run.h5")
    row = max(i for i, g in enumerate(data["sample/generation"]) if g == GENERATIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    chat = [{"role": "user", "content": data["sample/prompt"][row].decode()}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == data["sample/completion"][row].decode()


def test_lines_arrive_and_the_file_can_be_read_while_the_job_runs(job):
    """Without a terminal: one line per generation, at once; the run file opens at any moment."""
    generations = 8
    command = launching.mpirun_command(2, *TRAIN, f"es.generations={generations}", "engine.max_new_tokens=40")
    committed, lines, failed = [], [], []
    ended = threading.Event()

    def poll():
        while not ended.is_set():
            if (job / "out" / "run.h5").exists():
                try:
                    with h5py.File(job / "out" / "run.h5", "r", locking=False) as file:
                        committed.append(int(file.attrs["generations_committed"]))
                        assert len(file["generation/digest"][: committed[-1]]) == committed[-1]
                        assert (file["member/seed"][: committed[-1]] > 0).all()
                except Exception as error:
                    failed.append(error)
            time.sleep(0.02)

    reader = threading.Thread(target=poll)
    reader.start()
    with subprocess.Popen(
        command, env=launching.environment(), cwd=job, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stdout:
                lines.append((line.rstrip("\n"), committed[-1] if committed else 0))
        finally:
            launching.kill_tree(process.pid)
            ended.set()
            reader.join()
    assert process.returncode == 0
    assert failed == []
    assert committed == sorted(committed)
    assert len(set(committed)) > generations // 2, "seen growing"

    shown = [(text, seen) for text, seen in lines if text.startswith("generation ")]
    assert [text.split()[1] for text, _ in shown] == [f"{g}/{generations}" for g in range(1, generations + 1)]
    # Each line came when its generation was the newest one (or one more had just been committed).
    assert all(abs(seen - g) <= 1 for g, (_, seen) in enumerate(shown, 1))


def test_what_a_job_shows(job, tiny_model):
    ended = launching.mpirun(2, *TRAIN, "es.antithetic=true", cwd=job)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "", "nothing but what we say, and we say it on stdout"
    out = ended.stdout
    assert "\x1b" not in out and "\r" not in out
    banner, rest = out.split("generation 1/4", 1)
    for part in (
        "mpies",
        str(tiny_model()),
        "21760 parameters",
        "float32 (as set)",
        "conciseness",
        "4 members in 2 antithetic pairs",
        "sigma 0.3",
        "ranks",
        f"2 on {os.uname().nodename} (2 x cpu)",
        "out/run.h5",
    ):
        assert part in banner, part
    first, second = rest.splitlines()[:2]
    assert first.endswith("  3 left"), "the first generation warms up"
    assert re.search(r"  2 left, [0-9.]+ (ms|s|min)$", second)
    assert all(word in rest for word in ("held-out prompt", "before", "after"))
    assert rest.count("What is the capital of France?") == 1
    # Rewards before and after are those in the file.
    data = contents(job / "out" / "run.h5")
    for split, name in ((b"train", "train"), (b"held_out", "held-out")):
        rewards = data["evaluation/reward_mean"][data["evaluation/split"] == split]
        assert f"{name} prompts: {rewards[0]:.4g} before, {rewards[-1]:.4g} after" in rest
    assert "next:" in rest
    assert "out/model" in rest
    assert f"-m mpies.analyze summary {job / 'out' / 'run.h5'}" in rest


def test_on_a_terminal_there_is_a_bar(job):
    """A launcher passes output through a pipe, so the program looks for the launcher's terminal."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    with subprocess.Popen(
        launching.mpirun_command(2, *TRAIN, "es.generations=6"),
        env=launching.environment(TERM="xterm"),
        cwd=job,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        seen = b""
        try:
            while piece := os.read(ours, 4096):
                seen += piece
        except OSError:  # Linux's way to say that the other end was closed
            pass
        finally:
            launching.kill_tree(process.pid)
            os.close(ours)
    assert process.returncode == 0
    text = seen.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    states = re.findall(r"generation (\d)/6 (━*)", plain)
    assert {int(done) for done, _ in states} >= {0, 6}
    assert all(len(bar) >= 10 for _, bar in states[-1:])
    # The cursor goes back to the line's start, and the bar replaces itself.
    assert text.count("\r") > 6 and "\x1b[2K" in text
    assert "tokens/s" not in plain, "no lines besides the bar"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"
    after = plain.split("6/6")[-1]
    assert "held-out prompt" in after and "next:" in after
    assert max(len(line) for line in after.replace("\r", "").splitlines() if "┃" in line) <= 90


def test_help_starts_no_mpi():
    ended = launching.python("-X", "importtime", "-m", "mpies.train", "--help")
    assert ended.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines()}
    assert "mpies.config" in imported
    assert not imported & {"mpi4py", "mpi4py.MPI", "torch", "transformers"}
    keys = config.keys()
    for key in keys:
        assert f"{key}:" in ended.stdout


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["es.poplation=4"], ["es.poplation", "es.population"]),
        (["es.population=many"], ["es.population", "many", "integer"]),
        (["es.sigma=-1"], ["es.sigma", "-1", "greater than 0"]),
        (["es.antithetic=true", "es.population=5"], ["es.population", "even"]),
        (["other.yaml"], ["other.yaml", "one configuration file"]),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(job, ranks, arguments, says):
    # There is no model either, but that would be noticed later.
    refused(job, ranks, ["model.path=./none", *arguments], says)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_missing_model_is_refused(job, ranks):
    refused(job, ranks, ["model.path=./none"], ["model.path", "./none", "no such folder"])


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_directory_with_another_run_is_left_alone(job, ranks):
    (job / "out").mkdir()
    (job / "out" / "run.h5").write_text("somebody's")
    refused(job, ranks, ["run.resume=never"], ["run.directory", "out/run.h5"])


def refused(folder: Path, ranks: int, arguments: list[str], says: list[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    start = time.monotonic()
    ended = launching.mpirun(ranks, *TRAIN, *arguments, cwd=folder)
    assert time.monotonic() - start < 60
    assert ended.returncode == 2
    (problem,) = launching.problems(ended.stderr)
    assert all(part in problem for part in says)
    assert (ended.stdout + ended.stderr).count(problem) == 1
    assert "Traceback" not in ended.stderr
    assert "generation" not in ended.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [p.name for p in folder.iterdir() if p.is_dir()] == (["out"] if len(before) > 1 else [])


def test_settings_that_differ_between_ranks_are_refused(job):
    """One rank reads another file, as when a node sees an old copy."""
    ended = launching.mpirun(
        1, *TRAIN, "es.seed=1", ":", "-n", "2", sys.executable, *TRAIN, "es.seed=2", cwd=job
    )
    assert ended.returncode == 2
    (problem,) = launching.problems(ended.stderr)
    assert all(part in problem for part in ("es.seed", "1 on rank 0", "2 on rank 1"))
    assert "Traceback" not in ended.stderr
    assert not (job / "out").exists()
