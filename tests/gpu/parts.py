"""The parts and their steps: the project's own commands, on a GPU, and what has to come of them.

Seconds are guesses for an H100; every step takes some 15 s of them to import and to compile kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from launching import REPOSITORY
from steps import Bench, Figure, LeftOutError, Step, WrongError

import jobs

GENERATIONS = 3
# Of small runs: what is computed otherwise on a GPU.
KINDS = {
    "full": {"es.perturbation": "full", "model.dtype": "float32"},
    "lowrank": {"es.perturbation": "lowrank", "es.block": 2},
    "live": {"es.perturbation": "full", "model.master": "live"},
    "host": {"es.perturbation": "full", "model.base": "host"},
}
QUICK = "lowrank"  # the kind that is tried on a pretended GPU
# What of the bench is measured in a process of its own: a 7B model with its base, twice, is more than a GPU.
BENCHES = {"hf": [["kernels"], ["memory", "generation", "share"]], "vllm": [["vllm"], ["vllm-lowrank"]]}
CONFIGS = {
    "0.5B": "countdown-qwen2.5-0.5b",
    "3B": "countdown-qwen2.5-3b",
    "7B": "conciseness-qwen2.5-7b-sigma0.001",
}


def settings(bench: Bench, model: str, folder: Path, device: str = "cuda", **given: object) -> list[str]:
    """Of a small run; `given` as section__key=value."""
    values = {
        "model.path": bench.model(model),
        "model.device": device,
        "model.dtype": "bfloat16",
        "task.name": "conciseness",  # which tells random models' answers apart
        "run.directory": folder,
        "run.progress": "lines",
        "run.keep_samples": 0,
        "es.generations": GENERATIONS - bench.pretended,
        "es.population": 4,
        "es.sigma": 0.02,
        "es.alpha": 0.02,
        "engine.max_new_tokens": 4 if bench.pretended else 32,
        "task.chat_template": "false",
    }
    if bench.pretended:
        values |= {"task.train_size": 1, "task.train_data": _few_prompts(bench), "task.eval_size": 1}
    values |= {key.replace("__", "."): value for key, value in given.items()}
    return [f"{key}={value}" for key, value in values.items()]


def _few_prompts(bench: Bench) -> Path:
    file = bench.folder / "prompts.jsonl"
    rows = [{"prompt": prompt, "answer": "4"} for prompt in ("1 + 3 =", "2 + 2 =")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# bits


def try_kernels(bench: Bench) -> Iterator[Figure]:
    """The quick tests of the kernels, of which those on the GPU are meant; some, where it is pretended."""
    files = [REPOSITORY / "tests/noise/test_noise.py", REPOSITORY / "tests/model/test_lowrank_gpu.py"]
    which = "gpu- or lowrank_gpu"
    if bench.pretended:
        files, which = files[1:], "looked_up or nothing"
    done = bench.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", which)
    yield Figure("tests", done.stdout.strip().splitlines()[-1].strip("= "))


def try_long_tensors(bench: Bench) -> list[Figure]:
    return bench.probe("beyond")


def replay_on_cpu(bench: Bench) -> Iterator[Figure]:
    """Runs of each kind on the GPU: every generation's digest has to be the CPU's."""
    for kind in [QUICK] if bench.pretended else KINDS:
        folder = bench.fresh(f"gpu-{kind}")
        ranks = 2 if bench.pretended else 1
        bench.run("-m", "mpies.train", *settings(bench, "tiny", folder), *_as(KINDS[kind]), ranks=ranks)
        _need_change(folder)
        done = bench.run("-m", "mpies.replay", folder / "run.h5", "--verify", cpu=True)
        yield Figure(f"{kind}, replayed on the CPU", done.stdout.strip().splitlines()[-1])


def replay_on_gpu(bench: Bench) -> Iterator[Figure]:
    """The other way round."""
    for kind in [QUICK] if bench.pretended else [kind for kind in KINDS if kind != "host"]:
        folder = bench.fresh(f"cpu-{kind}")
        given = settings(bench, "tiny", folder, device="cpu")
        bench.run("-m", "mpies.train", *given, *_as(KINDS[kind]), ranks=1, cpu=True)
        _need_change(folder)
        done = bench.run("-m", "mpies.replay", folder / "run.h5", "--verify", "--device", "cuda")
        yield Figure(f"{kind}, replayed on the GPU", done.stdout.strip().splitlines()[-1])


def _need_change(folder: Path) -> None:
    """Equal digests say nothing of weights that do not move."""
    digests = jobs.content(folder, GENERATIONS)["generation/digest"]
    if len(set(digests)) < len(digests):
        raise WrongError(f"rewards do not differ, and the weights have not changed: {folder}")


def _as(given: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in given.items()]


# engines


def _need(engine: str) -> None:
    if engine == "vllm" and not find_spec("vllm"):
        raise LeftOutError("vLLM is not installed")


def checked(engine: str, kind: str):
    def check(bench: Bench) -> Iterator[Figure]:
        """A start, with all its tests that engine and perturbation compute what the weights say."""
        _need(engine)
        given = settings(bench, "0.5B", bench.fresh(f"check-{engine}-{kind}"), engine__name=engine)
        done = bench.run(
            "-m", "mpies.check", *given, *_as(KINDS[kind] | {"model.dtype": "bfloat16"}), ranks=1
        )
        yield from findings(done.stdout, "evaluation", "cache", "generation", "start")

    return check


def findings(table: str, *names: str) -> Iterator[Figure]:
    """Lines of a check's table."""
    for line in table.splitlines():
        mark, _, rest = line.partition(" ")
        name, _, value = rest.strip().partition(" ")
        if name in names and mark in ("ok", "note", "FAIL"):
            yield Figure(name, value.strip())


def swayed(engine: str, perturbation: str = "full"):
    def sway(bench: Bench) -> list[Figure]:
        _need(engine)
        given = ["--engine", engine, "--perturbation", perturbation, *(["--short"] * bench.pretended)]
        return bench.probe("sway", bench.model("0.5B"), *given)

    return sway


def shared(engine: str):
    def share(bench: Bench) -> Iterator[Figure]:
        """Two ranks on the GPU make the run that one makes."""
        _need(engine)
        yield from _same_on(bench, "0.5B", engine, 2)

    return share


def try_batches(bench: Bench) -> Iterator[Figure]:
    """Batch-invariant kernels: what a member answers does not depend on what is beside it."""
    _need("vllm")
    file = REPOSITORY / "tests/engine_vllm/test_vllm_on_gpu.py"
    done = bench.run("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    yield Figure("tests", done.stdout.strip().splitlines()[-1].strip("= "))


def _same_on(bench: Bench, model: str, engine: str, ranks: int) -> Iterator[Figure]:
    folders = {number: bench.fresh(f"{model}-{engine}-on-{number}") for number in (1, ranks)}
    for number, folder in folders.items():
        given = settings(bench, model, folder, engine__name=engine, es__perturbation="full")
        bench.run("-m", "mpies.train", *given, ranks=number)
    _need_change(folders[1])
    one, many = (jobs.content(folder, GENERATIONS) for folder in folders.values())
    if differing := [name for name in one if one[name] != many[name]]:
        raise WrongError(f"on {ranks} ranks others than on 1: {', '.join(differing)}")
    yield Figure("generations with equal digests and rewards", len(one["generation/digest"]))


# speed


def measured(engine: str, model: str):
    def bench_it(bench: Bench) -> Iterator[Figure]:
        """The bench's table, with members' answers as in the paper's smaller tasks."""
        _need(engine)
        file = bench.fresh("bench.json")
        size, work = 2**30, (32, 8, 64)
        if bench.pretended:
            size, work = 2048, (2, 1, 2)
        members, prompts, tokens = work
        for only in [["memory"]] if bench.pretended else BENCHES[engine]:
            bench.run(
                "-m", "mpies.bench", "--model", bench.model(model), "--device", "cuda", "--dtype", "bfloat16",
                "--repeats", 1 if bench.pretended else 2, "--members", members, "--prompts", prompts,
                "--tokens", tokens, "--size", size, "--only", *only, "--json", file, ranks=1,
            )  # fmt: skip
            for row in json.loads(file.read_text())["figures"]:
                if not row["group"].startswith("forecast"):
                    verdict = row["verdict"]
                    yield Figure(f"{row['group']}: {row['name']}", row["value"], row["unit"], verdict)

    return bench_it


def fitting(model: str, base: str = "device"):
    def fit(bench: Bench) -> Iterator[Figure]:
        """A member with a configuration's own settings: phases, a start, and the memory at its peak."""
        file = REPOSITORY / "configs" / f"{CONFIGS[model]}.yaml"
        given = [f"model.path={bench.model(model)}", f"run.directory={bench.fresh(CONFIGS[model])}"]
        given += [f"model.base={base}"]
        if bench.pretended:
            given += ["task.train_size=1", "engine.max_new_tokens=2", "es.population=2"]
        said = next(line for line in file.read_text().splitlines() if line.startswith("# Memory per GPU"))
        done = bench.run("-m", "mpies.check", file, *given, ranks=1)
        found = list(findings(done.stdout, "memory", "model", "start", "evaluation", "generation", "cache"))
        yield from found
        yield from compare_memory(said, found)

    return fit


def compare_memory(said: str, found: list[Figure]) -> Iterator[Figure]:
    """What a header says of a member's memory, and what was measured: wrong, if its GPU is too small."""
    weights, gpu = re.fullmatch(r"# Memory per GPU, ([\d.]+) GB, so an? (\d+) GB GPU;.*", said).groups()
    yield Figure("in the file's header, without activations", float(weights), "GB")
    for figure in found:
        if figure.name == "cache" and (peak := re.search(r"([\d.]+) GB in all", str(figure.value))):
            verdict = "right" if float(peak[1]) < float(gpu) else "wrong"
            yield Figure(f"at the peak, of the {gpu} GB that it names", float(peak[1]), "GB", verdict)


# scaling


def scale(bench: Bench) -> Iterator[Figure]:
    """The bench's generation on one GPU and on all."""
    _need_gpus(bench)
    file, small = bench.fresh("scaling.json"), bench.pretended
    bench.run(
        "-m", "mpies.bench", "--model", bench.model("3B"), "--device", "cuda", "--only", "scaling",
        "--repeats", 1, "--members", 2 if small else 64, "--prompts", 1 if small else 8,
        "--tokens", 2 if small else 64, "--json", file, ranks=bench.gpus,
    )  # fmt: skip
    for row in json.loads(file.read_text())["figures"]:
        yield Figure(row["name"], row["value"], row["unit"], row["verdict"])


def same_on_all(bench: Bench) -> Iterator[Figure]:
    """The run of one GPU on all of them."""
    _need_gpus(bench)
    yield from _same_on(bench, "0.5B", "hf", bench.gpus)


def _need_gpus(bench: Bench) -> None:
    if bench.gpus < 2:
        raise LeftOutError("there is one GPU")


TAKES_MEMORY = "it takes 18 GB"
AS_LOWRANK = "as with low rank"
AS_3B = "as with 3B"
AS_REPLAYED = "bits.replayed is made by two ranks there"
AS_CHECKED = "as engines.hf-lowrank"
NO_VLLM = "vLLM computes on no pretended GPU"

PARTS = {
    "bits": [
        Step("kernels", "kernels against the definition", try_kernels, 60),
        Step("beyond", "kernels beyond 2^31 elements", try_long_tensors, 40, TAKES_MEMORY),
        Step("replayed", "small runs on the GPU, replayed on the CPU", replay_on_cpu, 150),
        Step("replaying", "small runs on the CPU, replayed on the GPU", replay_on_gpu, 120),
    ],
    "engines": [
        Step("hf-lowrank", "hf, low rank, 0.5B: a start", checked("hf", "lowrank"), 45),
        Step("hf-full", "hf, full noise, 0.5B: a start", checked("hf", "full"), 45, AS_LOWRANK),
        Step("hf-sway", "hf, 0.5B: far away and back", swayed("hf"), 45),
        Step("hf-shared", "hf, 0.5B: two ranks on a GPU as one", shared("hf"), 90, AS_REPLAYED),
        Step("vllm-full", "vllm, full noise, 0.5B: a start", checked("vllm", "full"), 120, NO_VLLM),
        Step("vllm-sway", "vllm, 0.5B: far away and back, with graphs", swayed("vllm"), 90, NO_VLLM),
        Step("vllm-lowrank", "vllm, low rank, 0.5B: a start", checked("vllm", "lowrank"), 120, NO_VLLM),
        Step("vllm-sway-lowrank", "the same with low rank", swayed("vllm", "lowrank"), 120, NO_VLLM),
        Step("vllm-batches", "vllm, low rank, whatever the batch", try_batches, 240, NO_VLLM),
        Step("vllm-shared", "vllm, 0.5B: two ranks on a GPU as one", shared("vllm"), 180, NO_VLLM),
    ],
    "speed": [
        Step("bench-3B", "the bench, 3B", measured("hf", "3B"), 150),
        Step("bench-3B-vllm", "the bench with vllm, 3B", measured("vllm", "3B"), 200, NO_VLLM),
        Step("bench-7B", "the bench, 7B", measured("hf", "7B"), 200, AS_3B),
        Step("bench-7B-vllm", "the bench with vllm, 7B", measured("vllm", "7B"), 250, NO_VLLM),
        Step("bench-0.5B", "the bench, 0.5B", measured("hf", "0.5B"), 100, AS_3B),
        Step("bench-0.5B-vllm", "the bench with vllm, 0.5B", measured("vllm", "0.5B"), 200, NO_VLLM),
        Step("config-7B", f"{CONFIGS['7B']}.yaml, 7B: memory and time", fitting("7B"), 120, AS_CHECKED),
        Step("config-7B-host", "the same with model.base=host", fitting("7B", "host"), 150, AS_CHECKED),
        Step("config-3B", f"{CONFIGS['3B']}.yaml, 3B: memory and time", fitting("3B"), 150, AS_CHECKED),
        Step(
            "config-0.5B", f"{CONFIGS['0.5B']}.yaml, 0.5B: memory and time", fitting("0.5B"), 90, AS_CHECKED
        ),
    ],
    "scaling": [
        Step("scaling", "a generation on all GPUs", scale, 120, "as speed.bench-3B"),
        Step("same", "a run on all GPUs as on one", same_on_all, 120, "as engines.hf-shared"),
    ],
}
