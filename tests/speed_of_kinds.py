"""Low rank on a small random mixture and a small random hybrid, against plain inference: make speed-of-kinds

A generation, everything included (factors, answers, update and digest), and the unperturbed model on the same
rows, in turns; float32, one thread. Both keep a core busy, so the share is worth something on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import tiny
import zoo
from mpi4py import MPI

from mpies.bench.generation import SIGMA, Rig, Work, prompts_of, seeds_of
from mpies.bench.timing import Case, in_turns
from mpies.es.population import Population
from mpies.model import saving

WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64}
WIDTHS |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "sliding_window": None}
KINDS = {
    "qwen2": {},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


def measure(kind: str, given: argparse.Namespace) -> list[float]:
    """The share of plain inference's speed that low rank reaches, in each round."""
    work = Work(given.members, given.prompts, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = zoo.build(kind, **WIDTHS, num_hidden_layers=4, **KINDS[kind])
        saving.save(model, tiny.tokenizer(), Path(folder) / kind)
        given.model = str(Path(folder) / kind)
        rig = Rig(MPI.COMM_SELF, given, "float32", work)
    prompts, members = prompts_of(work.prompts), Population(work.members, seed=1).members(0)
    engine = rig.engine(work.tokens, work.members * work.prompts)

    def lowrank() -> None:
        rig.lowrank.set(members, SIGMA)
        engine.generate_block(prompts, work.members)
        rig.update(seeds_of(members), rank=1)

    cases = {
        "plain": Case(lambda: engine.generate(prompts * work.members), before=rig.plain),
        "low rank": Case(lowrank, before=rig.stale),
    }
    seconds = in_turns(cases, given.repeats, lambda: None).seconds
    return [plain / ours for plain, ours in zip(seconds["plain"], seconds["low rank"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"members": 32, "prompts": 2, "tokens": 48, "repeats": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    given.device = "cpu"
    for kind in KINDS:
        shares = measure(kind, given)
        rounds = ", ".join(f"{share:.0%}" for share in shares)
        print(f"{kind}: {statistics.median(shares):.0%} of plain inference's speed ({rounds})", flush=True)


if __name__ == "__main__":
    main()
