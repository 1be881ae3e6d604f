"""Far away from the base and back: other answers by members with a large sigma, then the same as before."""

from __future__ import annotations

from mpi4py import MPI
from steps import Figure

from mpies import config
from mpies.bench.generation import Work, prompts_of, task_of
from mpies.es.population import Member, Population
from mpies.replica import Replica, build
from probes import parser, verdict, write

SIGMAS = 0.001, 0.3
MEMBERS = 2  # of a block of low rank


def main() -> None:
    options = parser("sway")
    options.add_argument("model")
    options.add_argument("--engine", required=True)
    options.add_argument("--perturbation", default="full")
    options.add_argument("--short", action="store_true")
    given = options.parse_args()
    prompts, tokens = (2, 3) if given.short else (16, 64)
    settings = {
        "model.path": given.model,
        "model.device": "cuda",
        "model.dtype": "bfloat16",
        "task.chat_template": "false",
        "es.perturbation": given.perturbation,
        "es.population": MEMBERS,
        "es.block": MEMBERS,
        "engine.name": given.engine,
        "engine.batch_size": prompts * MEMBERS,
        "engine.max_new_tokens": tokens,
    }
    loaded = config.load([f"{key}={value}" for key, value in settings.items()])
    replica = build(MPI.COMM_SELF, loaded, task_of(Work(1, prompts, tokens)))
    members = Population(MEMBERS, seed=1).members(0)[: loaded.es.block_size]
    write(
        given.json,
        [*sway(replica, members, prompts), *compare_engines(replica, prompts, tokens), *tell_graphs(replica)],
    )


def sway(replica: Replica, members: list[Member], prompts: int) -> list[Figure]:
    asked, digest = prompts_of(prompts), replica.weights.digest()
    replica.perturbation.clear()
    before = replica.engine.generate(asked).ids
    figures = []
    for sigma in SIGMAS:
        answers = []
        for _ in range(2):
            replica.perturbation.set(members, sigma)
            made = replica.engine.generate_block(asked, len(members))
            answers.append([ids for member in made for ids in member.ids])
        moved = sum(one != other for one, other in zip(before * len(members), answers[0], strict=True))
        name = f"answers that sigma={sigma} changes, of {len(answers[0])}"
        figures.append(Figure(name, moved, "", verdict(moved > 0) if sigma == SIGMAS[-1] else ""))
        figures.append(
            Figure(f"the same answers again, sigma={sigma}", "", "", verdict(answers[0] == answers[1]))
        )
    replica.perturbation.clear()
    figures.append(
        Figure("the base's answers as before", "", "", verdict(replica.engine.generate(asked).ids == before))
    )
    return [
        *figures,
        Figure("the base's digest as before", "", "", verdict(replica.weights.digest() == digest)),
    ]


def compare_engines(replica: Replica, prompts: int, tokens: int) -> list[Figure]:
    """How far vLLM's answers are transformers'. In bfloat16, a token may turn an answer of random weights."""
    other = getattr(replica.engine, "hf", None)
    if other is None:
        return []
    asked = prompts_of(prompts)
    mine, theirs = replica.engine.generate(asked).ids, other.generate(asked).ids
    alike = sum(_common(one, two) for one, two in zip(mine, theirs, strict=True))
    return [
        Figure("tokens before the first that hf chooses otherwise", 100 * alike / (prompts * tokens), "%")
    ]


def _common(one: list[int], two: list[int]) -> int:
    """The length of the beginning that they have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def tell_graphs(replica: Replica) -> list[Figure]:
    """vLLM's CUDA graphs are on, or the answers above say nothing of them."""
    llm = getattr(replica.engine, "llm", None)
    if llm is None:
        return []
    wanted = llm.llm_engine.vllm_config
    mode = str(wanted.compilation_config.cudagraph_mode)
    on = not wanted.model_config.enforce_eager and "NONE" not in mode
    return [Figure("CUDA graphs", mode, "", verdict(on))]


if __name__ == "__main__":
    main()
