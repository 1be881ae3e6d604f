"""mpies.check says before a job what the job would run into, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import h5py
import launching
import pytest
import seeing
import small
import threads
import tiny
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import Job, arguments, train
from mpies import config
from mpies.check import ranks, storage
from mpies.check.forecast import Forecast, jobs_needed
from mpies.check.load import check_setup
from mpies.check.memory import propose_host, reckon_weights, room_to_load
from mpies.engines import membertest
from mpies.errors import RefusedError
from mpies.es.population import Member
from mpies.model import loading, saving
from mpies.model.lowrank import LowRank
from mpies.model.weights import take_over
from mpies.noise.cpu import CpuKernels
from mpies.ranks import gpu, memory
from mpies.ranks.devices import Place
from mpies.replica import build, settle
from mpies.tasks.base import Task

CHECK = ("-m", "mpies.check")


def check(n: int, *arguments: str | Path, program=CHECK):
    """The check's exit code, table and problems."""
    ended = launching.mpirun(n, *program, *arguments)
    return ended.returncode, ended.stdout, launching.problems(ended.stderr), ended.stderr


def lines(table: str) -> dict[str, str]:
    """what -> mark and value."""
    found = {}
    for line in table.splitlines():
        mark, _, rest = line.partition(" ")
        if mark in ("ok", "note", "FAIL"):
            what, value = rest.strip().split(maxsplit=1)
            found[what] = f"{mark}: {value}"
    return found


def assert_fails(result, what: str, problem: str) -> None:
    """With that one problem, marked in the table, and what needs it is not tried."""
    code, table, problems, stderr = result
    assert code == 2, stderr
    assert problem in problems[0], stderr
    assert lines(table)[what].startswith("FAIL: ")
    assert "evaluation" not in lines(table) or what in ("evaluation", "time")
    assert table.splitlines()[-1] == "verdict: this job would fail"


@pytest.mark.launch
def test_a_job_that_would_run(tmp_path, tiny_model):
    folder = tmp_path / "runs" / "new"
    words = arguments(tiny_model(), folder, 100, run__time_limit="2:00:00", es__perturbation="full")
    code, table, problems, stderr = check(2, *words)
    assert (code, problems) == (0, []), stderr
    assert table.splitlines()[-1].startswith("verdict: this job would run")
    said = lines(table)
    assert "mpi4py" in said["MPI"] and said["MPI"].endswith("2 rank(s)")
    assert "a new run" in said["directory"]
    assert said["run"].startswith("ok: file") and "locked" in said["run"] and "not" not in said["run"]
    assert said["time"].startswith("ok: 100 generation(s) to go") and said["time"].endswith("1 job(s) of 2 h")
    assert "3 such block(s)" in said["generation"], "5 members on 2 ranks"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.launch
def test_a_run_that_goes_on_is_looked_at_and_left_as_it_is(tmp_path, tiny_model):
    words = arguments(tiny_model(), tmp_path, 4)
    train(1, *words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, table, _, stderr = check(1, *words, "es.generations=9")
    assert code == 0, stderr
    assert "goes on after generation 4" in lines(table)["directory"]
    assert "5 generation(s) to go" in lines(table)["time"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_fails(check(1, *words, "es.sigma=0.2"), "directory", "es.sigma: the run was begun with 0.3")
    assert_fails(check(1, *words, "run.resume=never"), "directory", "exists already")


@pytest.mark.long
@pytest.mark.launch
def test_a_directory_that_another_job_writes_to(tmp_path, tiny_model):
    words = arguments(tiny_model(), tmp_path, 10**6)
    with Job(1, *words) as job:
        job.wait_for("generation 1/")
        assert_fails(check(1, *words), "directory", "is in use by another job")


@pytest.mark.long
@pytest.mark.launch
def test_models_that_cannot_be_loaded(tmp_path, tiny_model):
    words = arguments(tiny_model(), tmp_path / "run", 4)
    assert_fails(
        check(1, *words, "model.path=org/none"), "memory", "it is not in the local Hugging Face cache"
    )
    without = shutil.copytree(tiny_model(), tmp_path / "without-weights")
    (without / "model.safetensors").unlink()
    assert_fails(check(1, *words, f"model.path={without}"), "model", "model.path: cannot load")
    huge = shutil.copytree(tiny_model(), tmp_path / "huge")
    config = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10, "hidden_size": 128}))
    result = check(1, *words, f"model.path={huge}")
    assert_fails(result, "memory", "of memory free, but needs")
    assert "model" not in lines(result[1]), "what does not fit is not loaded"


@pytest.mark.parametrize("kind", ["llama", "olmoe", "gpt_oss"])
def test_the_noise_of_a_block_is_reckoned_as_it_is_drawn(tmp_path, tiny_model, kind):
    """A thousand members of rank 4 need more memory for their noise than for the model; experts too."""
    folder = tmp_path / kind
    if kind == "llama":
        folder = tiny_model()
    else:
        saving.save(zoo.build(kind), tiny.tokenizer(), folder)
    overrides = [
        f"model.path={folder}",
        "es.population=6",
        "es.perturbation=lowrank",
        "es.rank=3",
        "es.block=4",
    ]
    settings = config.load([*overrides, "task.name=conciseness"])
    model, _ = loading.load(str(folder), allow_download=False)
    weights = take_over(model, torch.bfloat16, torch.device("cpu"), CpuKernels(1))
    perturbation = LowRank(model, weights, 3)
    perturbation.set([Member(i, i, 1) for i in range(4)], 0.01)
    block = perturbation.block
    drawn = [*block.vectors.values(), *(t for f in block.matrices.values() for t in (f.a, f.b))]
    assert reckon_weights(settings, torch.bfloat16).noise == sum(t.nbytes for t in drawn)
    full = config.load([*overrides, "task.name=conciseness", "es.perturbation=full"])
    assert reckon_weights(full, torch.bfloat16).noise == 0


@pytest.mark.parametrize(
    "shown, changes, left_out",
    [
        (False, {}, ("model.visual",)),
        (False, {"es__leave_out": "[auto,lm_head]", "es__perturbation": "full"}, ("lm_head", "model.visual")),
        (False, {"es__leave_out": "[]"}, ()),
        (True, {}, ()),
    ],
)
def test_what_is_not_tuned_has_live_weights_only(tmp_path, alone, shown, changes, left_out):
    """A tower that text does not need: as the replica has it; its base is there until it is loaded."""
    folder = seeing.save_model(tmp_path / "model", "qwen2_5_vl")
    given = {
        "model__dtype": "bfloat16",
        "es__perturbation": "lowrank",
        "es__rank": 2,
        "es__block": 3,
    } | changes
    prompts = seeing.PROMPTS if shown else ["3 + 5 =", "Say it."]
    task = Task("test", [{"prompt": prompt} for prompt in prompts], [], lambda *_, **__: [])
    with small.Runs(alone, folder, tmp_path) as runs:
        settings = config.load(runs.arguments(1, **given))
        made = build(alone, settings, task)
        needed = reckon_weights(
            settings, torch.bfloat16, left_out=settle(alone, settings, task).leaves_out(settings)
        )
    assert made.facts.left_out == left_out
    assert needed.base == sum(base.nbytes for base in made.weights.base.values())
    assert needed.live == sum(live.nbytes for live in made.model.parameters())
    assert needed.loaded == 2 * needed.live and needed.start >= needed.loaded - needed.base
    if settings.es.noise_rank:
        made.perturbation.set([Member(i, i, 1) for i in range(3)], 0.01)
        block = made.perturbation.block
        drawn = [*block.vectors.values(), *(t for f in block.matrices.values() for t in (f.a, f.b))]
        assert needed.noise == sum(tensor.nbytes for tensor in drawn)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_self_test_makes_is_reckoned(tiny_model, monkeypatch, alone, tmp_path, dtype):
    """One parameter of each kind as a member has it, in float32 at last."""
    made: list[list[int]] = []

    def weigh(weights, name, sigma, plain=membertest.weights_of_member):
        made[-1].append((value := plain(weights, name, sigma)).nbytes)
        return value

    def apart(attempt, names, plain=membertest.Attempt._apart):
        made.append([])
        return plain(attempt, names)

    monkeypatch.setattr(membertest, "weights_of_member", weigh)
    monkeypatch.setattr(membertest.Attempt, "_apart", apart)
    changes = {"es__perturbation": "lowrank", "es__rank": 1, "model__dtype": dtype}
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        runs.build(**changes)
        settings = config.load(runs.arguments(1, **changes))
    needed = reckon_weights(settings, getattr(torch, dtype))
    assert max(map(sum, made)) == needed.start > needed.scratch + needed.noise
    assert needed.total == needed.base + needed.live + needed.start


@pytest.mark.parametrize("master", ["float32", "live"])
def test_a_base_on_the_host_is_not_on_the_gpu(tiny_model, master):
    """But for two buffers, which get the parameters by turns; and it is proposed where it helps."""
    given = [f"model.path={tiny_model()}", "es.perturbation=full", f"model.master={master}"]
    near, far = (config.load([*given, f"model.base={where}"]) for where in ("device", "host"))
    on_gpu, streamed = (reckon_weights(settings, torch.bfloat16, gpu=True) for settings in (near, far))
    sizes = [p.numel() for p in loading.outline(near.model.path, False).parameters()]
    width = 4 if master == "float32" else 2
    buffers = width * (max(sizes[::2]) + max(sizes[1::2])) + (4 - width) * 2 * max(sizes)
    assert streamed.total == streamed.live + buffers < on_gpu.total
    assert streamed.on_host == streamed.file + width * sum(sizes) and on_gpu.on_host == streamed.file
    assert reckon_weights(far, torch.bfloat16).total == reckon_weights(near, torch.bfloat16).total, "on a CPU"
    assert propose_host(near, torch.bfloat16, streamed.total).startswith("model.base=host, which needs")
    assert propose_host(near, torch.bfloat16, streamed.total - 1) == ""
    assert propose_host(far, torch.bfloat16, 10**12) == ""


@pytest.mark.long
@pytest.mark.launch
def test_initial_weights_that_cannot_be_read_one_by_one(tmp_path, tiny_model):
    """Decay towards them needs that; KL divergence and drift load the model as a whole."""
    given = AutoModelForCausalLM.from_pretrained(tiny_model(tied=True))
    given.model.save_pretrained(tmp_path / "bare")  # its weights have other names than the whole model's
    AutoTokenizer.from_pretrained(tiny_model(tied=True)).save_pretrained(tmp_path / "bare")
    words = [*arguments(tmp_path / "bare", tmp_path / "run", 4), "run.measure_drift=true"]
    assert check(1, *words)[0] == 0
    assert_fails(check(1, *words, "es.anchor_decay=0.1"), "model", "es.anchor_decay: the initial weights")
    words = arguments(tiny_model(), tmp_path / "run", 4, es__anchor_decay=0.1)
    assert check(1, *words)[0] == 0


@pytest.mark.launch
def test_a_time_limit_that_no_generation_fits(tmp_path, tiny_model):
    words = arguments(tiny_model(), tmp_path, 4, run__time_limit="0:05")
    assert_fails(check(1, *words), "time", "run.time_limit: not one generation")


@pytest.mark.launch
def test_bad_settings_are_told_without_a_table(tmp_path, tiny_model):
    code, table, problems, stderr = check(2, *arguments(tiny_model(), tmp_path, 4), "es.sigma=-1")
    assert (code, table, len(problems)) == (2, "", 1), stderr
    assert problems[0].startswith("es.sigma: given -1")


REWARD = """
from mpi4py import MPI

def judge(prompts, completions, **columns):
    if MPI.COMM_WORLD.rank == 1:
        raise ConnectionError("the judge does not answer")
    return [0.0 for c in completions]
"""


@pytest.mark.launch
def test_a_reward_function_that_fails(tmp_path, tiny_model):
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 + 5 ="}\n')
    words = [
        *arguments(tiny_model(), tmp_path / "run", 4),
        "task.name=custom",
        f"task.reward={tmp_path}/rewards.py:judge",
        f"task.train_data={tmp_path}/prompts.jsonl",
    ]
    result = check(2, *words)
    assert_fails(result, "evaluation", "rank 1 with ConnectionError: the judge does not answer")
    assert result[3].count("Traceback (most recent call last)") == 1
    assert_fails(check(1, *words, f"task.reward={tmp_path}/rewards.py:jugde"), "task", "judge")


@pytest.mark.launch
def test_help_is_printed_once():
    ended = launching.mpirun(3, *CHECK, "--help")
    assert ended.returncode == 0 and ended.stdout.count("run.time_limit:") == 1
    ended = launching.mpirun(3, "-m", "mpies.train", "--help")
    assert ended.returncode == 0 and ended.stdout.count("run.time_limit:") == 1


# Parts


def on_host(gpu: str | None, cores: set[int]) -> ranks.RankOnHost:
    return ranks.RankOnHost(3, Place("n1", "cuda:0" if gpu else "cpu", gpu, 2**30), cores)


def test_gpus_of_several_models_are_a_note(monkeypatch):
    """Two ranks on a host, each on a GPU of its own."""
    models = ["NVIDIA H100, 132 multiprocessors", "NVIDIA H100, 114 multiprocessors"]

    def run(*models):
        made = iter([Place("n1", "cuda:0", str(i), 1, model) for i, model in enumerate(models)])
        monkeypatch.setattr(ranks, "place_of", lambda _: next(made))
        return threads.run(2, lambda comm: ranks.check_places(comm, config.load(["model.device=cpu"]), False))

    assert [finding.what for finding in run(*models)[0]] == ["n1", "GPUs"]
    assert "114 multiprocessors" in run(*models)[0][1].note
    assert [finding.what for finding in run(models[0], models[0])[0]] == ["n1"]


@pytest.mark.parametrize("share, problem", [(False, True), (True, False)])
def test_two_ranks_on_one_gpu_have_to_be_asked_for(share, problem):
    facts = [on_host("a", {0, 1}), on_host("a", {2, 3}), on_host("b", {4, 5})]
    found = ranks.describe_host("n1", facts, 1, share)
    assert bool(found.problem) == problem
    assert not problem or "--share-gpus" in found.problem
    assert not ranks.describe_host("n1", facts[1:], 1, False).problem


@pytest.mark.parametrize(
    "cores, threads, note",
    [([{0}, {1}], 1, False), ([{0}, {0}], 1, True), ([{0, 1}, {0, 1}], 1, False), ([{0}, {1}], 2, True)],
)
def test_ranks_that_share_cores_are_noted(cores, threads, note):
    facts = [on_host(None, mine) for mine in cores]
    assert bool(ranks.describe_host("n1", facts, threads, False).note) == note


@pytest.mark.parametrize(
    "cores, threads, sharing",
    [
        ([{0}, {1}, {2}], 1, []),
        ([{0, 1}, {0, 1}, {2}], 1, []),  # not bound to one, but there is one for each
        ([{0}, {0}, {1, 2}], 1, [0, 1]),
        ([{0, 1, 2, 3}, {2, 3}, {2, 3}, {2, 3}, {5, 6, 7}], 1, [1, 2, 3]),
        ([{0, 1}, {1, 2, 3, 4, 5}, {0, 1}], 2, [0, 2]),
    ],
)
def test_ranks_that_share_a_core_are_noted(cores, threads, sharing):
    bound = [ranks.RankOnHost(i, Place("n1", "cpu", None, 0), own) for i, own in enumerate(cores)]
    assert [one.rank for one in ranks.find_sharing(bound, threads)] == sharing
    note = ranks.describe_host("n1", bound, threads, False).note
    assert note.startswith(f"ranks {', '.join(map(str, sharing))} share core(s) ") == bool(sharing)


def test_a_lock_that_nobody_holds_keeps_nobody_out(tmp_path):
    (tmp_path / "run.lock").touch()
    assert not storage.kept_out(tmp_path / "run.h5")


def test_a_file_system_is_named_by_the_nearest_mount():
    assert storage.file_system(Path("/proc/self/status")) == "proc"


@pytest.mark.parametrize(
    "limit, used, left", [("1000", "300", [700]), ("max", "300", []), ("", "300", []), ("1000", "", [])]
)
def test_what_a_control_group_leaves(tmp_path, limit, used, left):
    (tmp_path / "max").write_text(limit + "\n")
    (tmp_path / "current").write_text(used + "\n")
    assert list(memory.left(tmp_path / "max", tmp_path / "current")) == left
    assert list(memory.left(tmp_path / "absent", tmp_path / "current")) == []


@pytest.mark.parametrize(
    "stat",
    ["active_file 30\ninactive_file 4\n", "active_file 1\ntotal_active_file 30\ntotal_inactive_file 4\n"],
)
def test_copies_of_files_are_there_to_be_had(tmp_path, stat):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 250\n" + stat)
    assert list(memory.left(tmp_path / "max", tmp_path / "current")) == [734]


def test_a_rank_that_sees_no_gpu_is_told(monkeypatch):
    """It would compute on its CPU, and other bits: rank 0 has a GPU, rank 1 of the same node none."""
    rank = threading.local()
    monkeypatch.setattr(gpu, "try_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: rank.number == 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(rank.number == 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name="GPU of a test", uuid="u", multi_processor_count=1),
    )
    settings = config.load([])

    def check_devices(comm):
        rank.number = comm.rank
        finding, *_ = ranks.check_places(comm, settings, share_gpus=False)
        with pytest.raises(RefusedError) as refused:
            check_setup(comm, settings, None)
        return finding.value, str(refused.value)

    try:
        told = threads.run(2, check_devices, hosts=["n1", "n1"])
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert not [one for one in told if isinstance(one, Exception)]
    for value, problem in told:
        assert value.startswith("rank 0 on cuda:0 GPU of a test, 1 on cpu; ")
        assert problem.endswith("model.device is 'cuda' on rank 0 on n1 and 'cpu' on rank 1 on n1")


ONE = Forecast(start=10.0, generation=5.0, update=1.0, blocks=(1,))


@pytest.mark.parametrize(
    "limit, done, total, every, expected",
    [
        (1000, 0, 10, 0, (1, 10)),
        (1000, 10, 10, 0, (0, 10)),
        (19, 0, 10, 0, (0, 0)),  # 10 to start, 5 to leave, and a generation of 5
        (21, 0, 1, 0, (1, 1)),
        (26.5, 0, 8, 0, (5, 6)),  # 2, then 1 at a time, since others are replayed first; then none
        (26.5, 0, 8, 2, (4, 8)),  # with checkpoints, nothing is replayed
        (26.5, 6, 8, 0, (0, 6)),
    ],
)
def test_jobs_that_follow_one_another(limit, done, total, every, expected):
    assert jobs_needed(ONE, limit, done, total, every) == expected


def test_the_probe_is_a_run_file_that_readers_understand(tmp_path):
    from mpies import config

    settings = config.load([f"run.directory={tmp_path}"])
    log = storage.new_run_file(tmp_path / "probe" / "run.h5", settings)
    assert 0 < storage.seconds_of_commit(log, settings.es.population) < 60
    assert storage.sees(tmp_path / "probe" / "run.h5")
    log.close()
    with h5py.File(tmp_path / "probe" / "run.h5", "r") as file:
        assert file.attrs["generations_committed"] == storage.COMMITS


def test_all_ranks_of_a_node_load_into_its_own_memory_at_once():
    fits = room_to_load(10**9, {"big": (8, 9 * 10**9), "small": (1, 15 * 10**8)})
    assert (fits.mark, fits.value) == ("ok", "1 GB of small's own memory while 1 rank(s) load, 1.5 GB there")
    too_many = room_to_load(10**9, {"big": (8, 9 * 10**9), "small": (2, 15 * 10**8)})
    assert too_many.mark == "FAIL"
    assert too_many.problem.startswith("small has 1.5 GB of its own memory free, but 2 rank(s)")
