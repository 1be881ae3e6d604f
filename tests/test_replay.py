"""From a run file back to weights: `python -m mpies.replay`, what it proves and what it refuses."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import launching
import made_up
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from systems import python_on_another_system
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpies.es.directions import directions
from mpies.noise import definition
from mpies.runfile import SCHEMA_VERSION

GENERATIONS = 8
# Large steps, so that the random model's rewards differ between members in every generation.
SETTINGS = [
    "task.name=conciseness",
    "model.dtype=float32",
    "model.device=cpu",
    "es.population=6",
    "es.antithetic=true",
    "es.perturbation=full",
    f"es.generations={GENERATIONS}",
    "es.sigma=0.3",
    "es.alpha=0.3",
    "engine.max_new_tokens=16",
    "run.evaluate_every=3",
    "run.checkpoint_every=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Path:
    """The folder of a run that has ended: run.h5, checkpoints, the tuned model."""
    folder = tmp_path_factory.mktemp("finished")
    ended = launching.python(
        "-m", "mpies.train", *SETTINGS, f"model.path={tiny_model()}", f"run.directory={folder}"
    )
    assert ended.returncode == 0, ended.stderr
    assert len(set(digests_of(folder))) == GENERATIONS, "every generation has to change the weights"
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that folder, to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def truth(finished, tiny_model) -> list[dict[str, np.ndarray]]:
    """Every generation's weights by the definition of noise, from the rows of the run file."""
    weights = load_file(tiny_model() / "model.safetensors")
    generations = [dict(weights)]
    with h5py.File(finished / "run.h5", "r") as file:
        rows = [file["member"][column][:] for column in ("seed", "sign", "coefficient")]
    for row in zip(*rows, strict=True):
        seeds, factors = directions(*row)
        for name, base in weights.items():
            made = definition.updated(base.reshape(-1), seeds, factors, definition.parameter_id(name))
            weights[name] = made.reshape(base.shape)
        generations.append(dict(weights))
    return generations


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def replay(capfd):
    """replay(*arguments): the program, run in this process, which spares seconds of imports."""
    argv, threads = sys.argv, torch.get_num_threads()

    def program(*arguments: object) -> Ended:
        sys.argv = ["replay", *map(str, arguments)]
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_module("mpies.replay", run_name="__main__")
        return Ended(int(end.value.code or 0), *capfd.readouterr())

    yield program
    sys.argv = argv
    torch.set_num_threads(threads)


# Importing mpies.replay elsewhere first, as other tests do, is no problem for the program.
pytestmark = [
    pytest.mark.lengthy,
    pytest.mark.filterwarnings("ignore:'mpies.replay' found in sys.modules"),
]


def digests_of(folder: Path) -> list[int]:
    with h5py.File(folder / "run.h5", "r") as file:
        return file["generation/digest"][:].tolist()


def change(folder: Path, dataset: str, where, value) -> None:
    with h5py.File(folder / "run.h5", "r+") as file:
        file[dataset][where] = value


def assert_refused(ended: Ended, *words: object) -> None:
    """Status 2, and one line that says all of this."""
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mpies: "), ended.err
    for word in words:
        assert str(word) in lines[0]


def assert_weights(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.tobytes() == expected[name].tobytes(), name


# What it proves


def test_every_digest_is_found_again(finished, replay):
    ended = replay(finished / "run.h5", "--verify")
    assert ended == (0, f"{GENERATIONS} of {GENERATIONS} generations' digests agree\n", "")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("generation", [0, 1, 4, 7, GENERATIONS])
def test_any_generation_is_rebuilt_bit_for_bit(run, replay, truth, tmp_path, generation, threads):
    for checkpoint in run.glob("checkpoint-*"):
        checkpoint.unlink()
    output = tmp_path / "rebuilt"
    ended = replay(run / "run.h5", "--generation", generation, "--threads", threads, "--output", output)
    assert ended.status == 0
    if generation:
        assert f"generation {generation}: digest {digests_of(run)[generation - 1]:016x}" in ended.out
    assert_weights(output, truth[generation])


def test_the_last_generation_is_what_the_run_saved(finished, replay, tmp_path):
    assert replay(finished / "run.h5", "--output", tmp_path / "last").status == 0
    assert_weights(tmp_path / "last", load_file(finished / "model" / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_is_a_folder_that_loads_and_answers(finished, replay, truth, tmp_path, dtype):
    output = tmp_path / "somewhere" / "else"
    assert replay(finished / "run.h5", "--generation", 3, "--dtype", dtype, "--output", output).status == 0
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(output)
    name, first = next(iter(model.named_parameters()))
    assert torch.equal(first, torch.from_numpy(truth[3][name]).to(getattr(torch, dtype)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize("dataset, value", [("member/seed", 7), ("member/sign", 0), ("member/reward", 0.25)])
def test_a_changed_row_is_found(run, replay, dataset, value):
    change(run, dataset, (4, 3), value)
    ended = replay(run / "run.h5", "--verify")
    assert ended.status == 1
    assert ended.err == f"mpies: {run / 'run.h5'}: damaged: generation 5; generations 1 to 4 are good\n"
    assert f"4 of {GENERATIONS} generations' digests agree" in ended.out
    assert "first generation that does not: 5\n" in ended.out


def test_a_changed_coefficient_is_found(run, replay):
    """Weights do not depend on the logged ones: they follow from the rewards."""
    change(run, "member/coefficient", (4, 3), 0.25)
    ended = replay(run / "run.h5", "--verify")
    assert ended.status == 1 and "damaged: generation 5;" in ended.err
    (line,) = [line for line in ended.out.splitlines() if "coefficients" in line]
    assert "generation 5" in line


def test_a_changed_digest_is_found_and_only_that(run, replay):
    change(run, "generation/digest", 4, 1)
    ended = replay(run / "run.h5", "--verify")
    assert ended.status == 1 and "damaged: generation 5;" in ended.err
    assert f"{GENERATIONS - 1} of {GENERATIONS} generations' digests agree" in ended.out
    assert "first generation that does not: 5\n" in ended.out
    ended = replay(run / "run.h5", "--generation", 5)
    assert (ended.status, ended.out) == (1, "")
    assert "generation 5: " in ended.err and "--verify" in ended.err
    assert replay(run / "run.h5", "--generation", 6).status == 0, "its own digest proves it"


def test_rows_beyond_the_committed_ones_do_not_count(run, replay):
    with h5py.File(run / "run.h5", "r+") as file:
        file.attrs["generations_committed"] = 5
    change(run, "member/seed", (5, 0), 7)
    assert "5 of 5" in replay(run / "run.h5", "--verify").out
    assert "generation 5: " in replay(run / "run.h5", "--generation", "last").out
    assert_refused(replay(run / "run.h5", "--generation", 6), "0 to 5")


# Which generation


def test_best_is_the_best_held_out_evaluation(run, replay):
    with h5py.File(run / "run.h5", "r+") as file:
        table = file["evaluation"]
        for i, (g, split) in enumerate(zip(table["generation"][:], table["split"].asstr()[:], strict=True)):
            # Highest on training prompts last, highest on held-out prompts in generation 6.
            table["reward_mean"][i] = g if split == "train" else -abs(g - 6)
    assert "generation 6: " in replay(run / "run.h5", "--generation", "best").out


def test_best_needs_an_evaluation(run, replay):
    with h5py.File(run / "run.h5", "r+") as file:
        for column in file["evaluation"].values():
            column.resize(0, axis=0)
    assert_refused(replay(run / "run.h5", "--generation", "best"), "--generation", "held-out")


def test_best_leaves_out_evaluations_that_could_not_be_scored(run, replay):
    with h5py.File(run / "run.h5", "r+") as file:
        table = file["evaluation"]
        table["reward_mean"][:] = np.where(table["generation"][:] == 6, -1.0, np.nan)
    assert "generation 6: " in replay(run / "run.h5", "--generation", "best").out


@pytest.mark.parametrize("text", ["9", "-1", "1.5", "first", "", "²", "1" * 5000])
def test_a_generation_that_is_not_there_is_refused(finished, replay, text):
    assert_refused(
        replay(finished / "run.h5", f"--generation={text}"), "--generation", f"0 to {GENERATIONS}", "best"
    )


# Checkpoints


def test_only_the_newest_two_checkpoints_are_kept(finished):
    kept = sorted(path.name for path in finished.glob("checkpoint-*"))
    assert kept == ["checkpoint-000006.safetensors", "checkpoint-000008.safetensors"]


def test_a_checkpoint_gives_the_same_weights_and_spares_what_came_before(run, replay, truth, tmp_path):
    change(run, "member/reward", (0, 0), 0.25)  # a replay from the beginning would go wrong
    ended = replay(run / "run.h5", "--generation", 7, "--output", tmp_path / "seventh")
    assert ended.status == 0 and "damaged: generation 1; no generation is good" in ended.err
    assert_weights(tmp_path / "seventh", truth[7])
    assert replay(run / "run.h5", "--generation", 5, "--output", tmp_path / "fifth").status == 1
    assert not (tmp_path / "fifth").exists()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rewrite(path: Path, tensors: dict | None = None, **metadata: str) -> None:
    with safe_open(path, "np") as file:
        metadata = file.metadata() | metadata
    save_file(load_file(path) | (tensors or {}), path, metadata)


def from_another_run(path: Path) -> None:
    rewrite(path, run_uuid="a6b1dd60-0000-4000-8000-000000000000")


def of_another_generation(path: Path) -> None:
    shutil.copy(path.with_name("checkpoint-000006.safetensors"), path)


def with_another_tensor(path: Path) -> None:
    rewrite(path, {"another": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    "harm, reason",
    [
        (flip_a_bit, "damaged"),
        (cut, "unreadable"),
        (empty, "unreadable"),
        (from_another_run, "another run"),
        (of_another_generation, "another run"),
        (with_another_tensor, "other parameters"),
    ],
)
def test_a_checkpoint_that_is_no_good_is_skipped_with_a_message(run, replay, truth, tmp_path, harm, reason):
    harm(run / "checkpoint-000008.safetensors")
    ended = replay(run / "run.h5", "--output", tmp_path / "last")
    assert ended.status == 0
    (message,) = [line for line in ended.out.splitlines() if "skipped" in line]
    assert message.startswith("checkpoint-000008.safetensors: ") and reason in message
    assert_weights(tmp_path / "last", truth[GENERATIONS])


def test_without_a_good_checkpoint_it_begins_with_the_initial_model(run, replay, truth, tmp_path):
    for path in run.glob("checkpoint-*"):
        flip_a_bit(path)
    ended = replay(run / "run.h5", "--output", tmp_path / "last")
    assert ended.status == 0
    assert ended.out.count("skipped") == 2
    assert_weights(tmp_path / "last", truth[GENERATIONS])


def test_files_that_only_look_like_checkpoints_are_left_alone(run, replay, truth, tmp_path):
    (run / "checkpoint-mine.safetensors").write_text("a user's own")
    ended = replay(run / "run.h5", "--output", tmp_path / "last")
    assert (ended.status, ended.err) == (0, "")
    assert_weights(tmp_path / "last", truth[GENERATIONS])


# The initial model


def test_another_initial_model_is_refused_with_both_digests(finished, tiny_model, replay):
    with h5py.File(finished / "run.h5", "r") as file:
        right = int(file.attrs["model_digest"])
    other = tiny_model(seed=1)
    ended = replay(finished / "run.h5", "--model", other)
    assert_refused(ended, other, f"{right:016x}", "--model")
    assert ended.err.count(f"{right:016x}") == 1
    named = [w.strip(",;") for w in ended.err.split() if len(w.strip(",;")) == 16]
    assert len(set(named)) == 2, "the digest that was found, and the one that was expected"


def test_a_model_that_has_moved_is_found_with_an_option(run, tiny_model, replay, tmp_path):
    gone = tmp_path / "gone"
    with h5py.File(run / "run.h5", "r+") as file:
        file.attrs["model_path"] = str(gone)
        made_up.seal_all(file)
    assert_refused(replay(run / "run.h5", "--verify"), gone, "--model")
    moved = Path(shutil.copytree(tiny_model(), tmp_path / "moved"))
    ended = replay(run / "run.h5", "--verify", "--model", moved)
    assert ended.status == 0
    assert f"{GENERATIONS} of {GENERATIONS}" in ended.out


# Bad input


def hdf5(**attributes):
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.attrs.update(attributes)

    return make


@pytest.mark.parametrize(
    "make, words",
    [
        pytest.param(lambda path: None, ["no such file"], id="missing"),
        pytest.param(Path.mkdir, ["a folder, not a run file"], id="a directory"),
        pytest.param(Path.touch, ["not a readable HDF5 file"], id="empty"),
        pytest.param(lambda path: path.write_text("1, 2\n"), ["not a readable HDF5 file"], id="text"),
        pytest.param(lambda path: path.write_bytes(bytes(5000)), ["not a readable HDF5 file"], id="zeros"),
        pytest.param(hdf5(), ["not a run file"], id="foreign"),
        pytest.param(hdf5(program="another", schema_version=1), ["not a run file"], id="another program's"),
        pytest.param(hdf5(program="mpies", schema_version="one"), [], id="nonsense"),
        pytest.param(hdf5(program="mpies", schema_version=SCHEMA_VERSION + 1), ["newer"], id="newer"),
        pytest.param(hdf5(program="mpies", schema_version=SCHEMA_VERSION), ["damaged"], id="hollow"),
    ],
)
def test_what_is_no_run_file_is_refused_in_a_line(tmp_path, replay, make, words):
    path = tmp_path / "run.h5"
    make(path)
    assert_refused(replay(path, "--verify"), path, *words)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--verify", "--output", "somewhere"], ["--verify", "--output"]),
        (["--verify", "--generation", "99"], ["--verify", "all generations", "--generation"]),
        (["--threads", "0"], ["--threads"]),
        (["--device", "nonsense"], ["--device"]),
        pytest.param(
            ["--device", "cuda"],
            ["--device"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_cannot_be_are_refused(finished, replay, options, words):
    ended = replay(finished / "run.h5", *options)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    for word in words:
        assert word in last


def test_a_folder_with_other_things_in_it_is_not_replaced(finished, replay, tmp_path):
    """`--output .` must not cost anybody their files."""
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    assert_refused(replay(finished / "run.h5", "--output", tmp_path), "--output", tmp_path)
    assert precious.read_text() == "years of work"


def test_an_earlier_output_is_replaced(finished, replay, truth, tmp_path):
    output = tmp_path / "rebuilt"
    for generation in (1, 2):
        ended = replay(finished / "run.h5", "--generation", generation, "--output", output)
        assert ended.status == 0
    assert_weights(output, truth[2])


# Truncated files

# Reads the run file cut at every so many bytes, as the program does. In a process of its own, since
# HDF5 can search a damaged heap for ever, in C code that nothing interrupts.
CUTTING = """
import faulthandler, sys
from pathlib import Path
from mpies.errors import InputError
from mpies.runfile import TruncatedError, read_history, salvage_history

whole, part, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
data, truth = whole.read_bytes(), read_history(whole)
for size in [*range(0, len(data), step), len(data) - 1]:
    faulthandler.dump_traceback_later(10, exit=True)
    print(size, flush=True, end=" ")
    part.write_bytes(data[:size])
    try:
        try:
            history = read_history(part)
        except TruncatedError:
            history = salvage_history(part)
    except InputError as error:
        print("refused", len(str(error).splitlines()))
        continue
    for rows in ("seed", "sign", "reward", "coefficient", "alpha", "digest"):
        found = getattr(history, rows)
        assert (found == getattr(truth, rows)[: len(found)]).all(), rows
    print("salvaged", history.generations)
"""


def test_wherever_a_file_is_cut_there_is_a_line_or_the_right_generations(finished, tmp_path):
    script = tmp_path / "cutting.py"
    script.write_text(CUTTING)
    ended = launching.python(script, finished / "run.h5", tmp_path / "part.h5", 500, timeout=100)
    assert ended.returncode == 0, (ended.stdout.splitlines()[-1], ended.stderr[-1500:])
    words = [line.split() for line in ended.stdout.splitlines()]
    assert all(int(count) == 1 for _, word, count in words if word == "refused")
    salvaged = [int(count) if word == "salvaged" else 0 for _, word, count in words]
    assert salvaged[-1] == GENERATIONS, "without its last byte, all of it is there"
    assert salvaged == sorted(salvaged), "more of the file, more generations"


def test_what_is_salvaged_is_said_and_verified(run, replay, truth, tmp_path):
    part = run / "part.h5"
    part.write_bytes((run / "run.h5").read_bytes()[:-1])
    ended = replay(part, "--verify")
    assert ended.status == 0
    said, verdict = ended.out.splitlines()
    assert str(part) in said and f"salvaged {GENERATIONS} generations" in said
    assert verdict == f"{GENERATIONS} of {GENERATIONS} generations' digests agree"
    assert replay(part, "--generation", 4, "--output", tmp_path / "fourth").status == 0
    assert_weights(tmp_path / "fourth", truth[4])


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5])
def test_a_file_of_which_too_little_is_left_is_refused_in_a_line(run, replay, share):
    data = (run / "run.h5").read_bytes()
    (run / "part.h5").write_bytes(data[: int(share * len(data))])
    ended = replay(run / "part.h5", "--verify")
    assert "agree" not in ended.out
    assert_refused(ended, run / "part.h5")


def test_it_runs_where_there_is_neither_mpi_nor_a_gpu(finished):
    program = (
        "import runpy, sys\n"
        "sys.modules['mpi4py'] = None\n"  # importing it raises ImportError
        "try:\n"
        "    runpy.run_module('mpies.replay', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    assert not any(name.startswith('mpi4py.') for name in sys.modules)\n"
    )
    ended = launching.python("-c", program, finished / "run.h5", "--verify", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{GENERATIONS} of {GENERATIONS}" in ended.stdout


def test_a_laptop_with_another_system_replays(finished, truth, tmp_path):
    """macOS and Windows have no fcntl, no sched_getaffinity; and there is no MPI."""
    words = ["mpies.replay", finished / "run.h5", "--generation", "3", "--output", tmp_path / "out"]
    ended = subprocess.run(
        [*python_on_another_system(), *map(str, words)],
        capture_output=True,
        text=True,
        env=launching.environment(),
    )
    assert ended.returncode == 0, ended.stderr
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(made[name], truth[3][name]) for name in made)
