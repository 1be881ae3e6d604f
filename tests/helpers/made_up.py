"""Run files with made-up numbers, as large as wanted, in files of the program's own writer."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from mpies import config
from mpies.es.answers import Answers
from mpies.es.population import Population
from mpies.phases import PHASES
from mpies.runfile import COSINE, RunFile
from mpies.runfile.checksum import cover, seal
from mpies.runfile.layout import add_own_columns, append_row, append_rows, missing_columns
from mpies.runfile.schema import ALL_TABLES

BASE = ("es.population=16", "es.perturbation=full", "es.antithetic=true")


def answers(texts: int = 1, **metrics: float) -> Answers:
    """A member's answers, which nobody looks at."""
    return Answers(np.zeros(texts, dtype=np.uint64), np.zeros(texts), 0, metrics)


def write_run(
    folder: Path,
    *settings: str,
    generations: int = 30,
    ranks: int = 4,
    gain: float = 100.0,
    scatter: float = 30.0,
    evaluate_every: int = 10,
    kl: float | None = None,
    hosts: int = 1,
) -> Path:
    """A finished run whose mean reward rises by `gain` from -gain, with `scatter` among members.

    `settings` are command-line settings, beyond BASE. `kl`: that at the end, if measured.
    Deterministic, by es.seed.
    """
    wanted = [*BASE, *settings, f"es.generations={generations}", f"run.directory={folder}"]
    chosen = config.load(wanted)
    log = RunFile.create(
        folder / "run.h5",
        chosen.to_yaml(),
        _start(ranks, hosts),
        population=chosen.es.population,
        generations=generations,
        model_path="made/up",
        model_digest=np.uint64(7),
        parameters=1_000_000,
        dtype="float32",
    )
    log.close()
    curve = _curve(generations, gain)
    evaluated = sorted({*range(0, generations, evaluate_every), generations})
    with h5py.File(folder / "run.h5", "r+") as file:
        _fill(file, chosen.es, curve, scatter, ranks)
        for g in evaluated:
            _evaluate(file, g, curve[g], kl and kl * g / max(1, generations))
    return folder / "run.h5"


def evaluation(generation: int, reward: float, kl: float | None) -> tuple[dict, list[dict]]:
    """A row of /evaluation, and three kept answers."""
    unmeasured = {"accuracy": np.nan, "drift_l2": np.nan}
    measured = {**unmeasured, "answer_tokens": 12.5, "kl": np.nan if kl is None else kl}
    row = {"generation": generation, "reward_mean": reward - 5, "tokens": 100, **measured}
    samples = [
        {
            "generation": generation,
            "split": "held_out",
            "prompt": f"prompt {i}",
            "completion": f"answer {generation}.{i}",
            "reward": reward - i,
        }
        for i in range(3)
    ]
    return row, samples


def evaluate_later(path: Path, generation: int, samples: int = 0, **figures: float) -> None:
    """What `mpies.evaluate --log` adds: figures with a standard error of 0.5, and answers to two prompts.

    `samples`: sampled at temperature 0.7; 0: greedy, and the answers are those of `evaluation`.
    """
    where = {
        "generation": generation,
        "split": "held_out",
        "seed": 42,
        "temperature": 0.7 if samples else 0.0,
    }
    shape = {**where, "prompts": 3, "samples": samples or 1}
    answers = [
        {**where, "prompt": f"prompt {i}", "sample": s, "tokens": 5, "reward": -float(i)}
        | {"completion": f"sampled {generation}.{i}.{s}" if samples else f"answer {generation}.{i}"}
        for i in range(2)
        for s in range(samples or 1)
    ]
    log = RunFile.reopen(path, generation)
    log.add_command(
        [], [], [], [{**shape, "name": n, "mean": m, "error": 0.5} for n, m in figures.items()], answers
    )
    log.close()


def tell(path: Path, right: dict[int, list[float]] | None = None, **columns: np.ndarray | float) -> None:
    """What answers told: columns of /generation, cosine_NAME among them; which held-out ones were right."""
    with h5py.File(path, "r+") as file:
        committed = int(file.attrs["generations_committed"])
        own = [f"generation/{name}" for name in columns if name.startswith(COSINE)]
        add_own_columns(file, missing_columns(file, own))
        for name, values in columns.items():
            file["generation"][name][:committed] = values
        seal(file, "generation", 0, committed)
        for generation, accuracies in (right or {}).items():
            n = len(accuracies)
            where = {"generation": np.full(n, generation), "split": np.full(n, "held_out", dtype=object)}
            found = {"reward": np.arange(n) - 3.0, "accuracy": np.array(accuracies), "tokens": np.full(n, 9)}
            append_rows(file, "prompt", {**where, "number": np.arange(n), **found})


def rewind(path: Path, committed: int) -> None:
    """As the file was when so many generations were made."""
    with h5py.File(path, "r+") as file:
        file["generation/checksum"][committed:] = 0
        file.attrs.modify("generations_committed", committed)


def seal_all(file: h5py.File) -> None:
    """As if the values had been written so; for columns that the file lacks, as an earlier version did."""
    for table in file.keys() & ALL_TABLES.keys() - {"member"}:
        cover(file, table)
        there = [name for name in file[table]["checksum"].attrs["covers"].split() if name in file]
        file[table]["checksum"].attrs["covers"] = " ".join(there)
        seal(file, table)


def _evaluate(file: h5py.File, generation: int, reward: float, kl: float | None) -> None:
    row, samples = evaluation(generation, reward, kl)
    append_row(file, "evaluation", {**row, "split": "train", "kl": np.nan})
    append_row(file, "evaluation", {**row, "split": "held_out", "reward_mean": row["reward_mean"] - 10})
    for sample in samples:
        append_row(file, "sample", sample)


def _start(ranks: int, hosts: int) -> dict:
    names = [f"node{r * hosts // ranks}" for r in range(ranks)]
    return {
        "world_size": ranks,
        "hosts": ",".join(names),
        "devices": ",".join(f"cuda:{r}" for r in range(ranks)),
        "versions": '{"mpies": "0.1.0", "torch": "2.13.0"}',
        "reason": "new",
        "rewards": "{}",
    }


def _curve(generations: int, gain: float) -> np.ndarray:
    return gain * (-np.exp(-4 * np.arange(generations + 1) / max(1, generations)))


def _fill(file: h5py.File, es: config.EsSettings, curve: np.ndarray, scatter: float, ranks: int) -> None:
    """All generations at once: a commit of each would wait for the disk each time."""
    random = np.random.default_rng([es.seed, int(1e9 * es.sigma), int(1e9 * es.alpha)])
    shape = (generations, n) = (len(curve) - 1, es.population)
    rewards = curve[:-1, None] + scatter * (
        random.standard_normal(shape) + 0.3 * random.standard_normal((generations, 1))
    )
    seconds = 2 + random.random(shape)
    plans = Population(n, es.seed, es.antithetic, es.block_size)
    members = {
        "seed": random.integers(1, 2**64, shape, dtype=np.uint64),
        "sign": np.ones(shape),
        "reward": rewards,
        "coefficient": es.alpha
        / n
        * (rewards - rewards.mean(1, keepdims=True))
        / rewards.std(1, keepdims=True),
        "rank": np.stack([plans.plan(g, ranks).rank_of for g in range(8)])[np.arange(generations) % 8],
        "tokens": random.integers(20, 80, shape),
        "seconds": seconds,
    }
    phases = dict(zip(PHASES, (0.05, 0.9, 0.001, 0.002, 0.03, 0.016, 0.001), strict=True))
    whole = seconds.sum(1) / ranks
    rows = {
        "reward_mean": rewards.mean(1),
        "reward_std": rewards.std(1),
        "reward_min": rewards.min(1),
        "reward_max": rewards.max(1),
        "unscored": np.zeros(generations),
        "sigma": np.full(generations, es.sigma),
        "alpha": np.full(generations, es.alpha),
        "digest": random.integers(1, 2**64, generations, dtype=np.uint64),
        "seconds": whole,
        **{f"seconds_{phase}": share * whole for phase, share in phases.items()},
        "imbalance": 1 + 0.1 * random.random(generations),
        "tokens": members["tokens"].sum(1),
        "bytes_communicated": np.full(generations, 16 * n),
    }
    for table, columns in (("generation", rows), ("member", members)):
        for name, values in columns.items():
            file[table][name].resize(max(generations, len(file[table][name])), axis=0)
            file[table][name][:generations] = values
    file["generation/checksum"].resize(len(file["generation/digest"]), axis=0)
    seal(file, "generation", 0, generations)
    file.attrs.modify("generations_committed", generations)
