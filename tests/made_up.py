"""Run files with made-up numbers, as large as wanted, through the program's own writer."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from mpies import config
from mpies.phases import PHASES
from mpies.population import Population
from mpies.runfile import RunFile


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

    `settings` are command-line settings, beyond the quickstart's. `kl`: that at the end, if measured.
    Deterministic, by es.seed.
    """
    wanted = [*settings, f"es.generations={generations}", f"run.directory={folder}"]
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
    curve = _curve(generations, gain)
    for g in range(0, generations + 1, evaluate_every):
        row = {"reward_mean": curve[g] - 5, "accuracy": np.nan, "tokens": 100, "drift_l2": np.nan}
        kl_now = np.nan if kl is None else kl * g / generations
        answers = [
            {"generation": g, "split": "held_out", "prompt": f"prompt {i}", "completion": f"answer {g}.{i}",
             "reward": curve[g] - i} for i in range(3)
        ]  # fmt: skip
        log.add_evaluation({"generation": g, "split": "train", "kl": np.nan, **row}, [])
        row["reward_mean"] -= 10
        log.add_evaluation({"generation": g, "split": "held_out", "kl": kl_now, **row}, answers)
    log.close()
    _fill(folder / "run.h5", chosen.es, curve, scatter, ranks)
    return folder / "run.h5"


def _start(ranks: int, hosts: int) -> dict:
    names = [f"node{r * hosts // ranks}" for r in range(ranks)]
    return {
        "world_size": ranks,
        "hosts": ",".join(names),
        "devices": ",".join(f"cuda:{r}" for r in range(ranks)),
        "versions": '{"mpies": "0.1.0", "torch": "2.13.0"}',
        "reason": "new",
    }


def _curve(generations: int, gain: float) -> np.ndarray:
    return gain * (-np.exp(-4 * np.arange(generations + 1) / max(1, generations)))


def _fill(path: Path, es: config.Es, curve: np.ndarray, scatter: float, ranks: int) -> None:
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
    with h5py.File(path, "r+") as file:
        for table, columns in (("generation", rows), ("member", members)):
            for name, values in columns.items():
                file[table][name][:generations] = values
        file.attrs.modify("generations_committed", generations)
