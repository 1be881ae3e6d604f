"""From timings to figures: what is reported, in which unit, and against which target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from mpies.bench.forecast import Constants, table
from mpies.bench.generation import MANY, SAMPLE, Work
from mpies.bench.timing import Timings
from mpies.phases import Phases


@dataclass(frozen=True)
class Result:
    """A measured value; `target` is the least or the most that it should be, `runs` what it is from."""

    group: str
    name: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}: " + ("reached" if self.value >= self.least else "missed")
        if self.most is not None:
            return f"< {self.most:g}: " + ("reached" if self.value < self.most else "missed")
        return ""


def kernels(t: Timings, bytes_moved: int) -> Iterator[Result]:
    group = "kernels, one tensor"
    yield Result(group, "copy of a perturbation's bytes, the limit", bytes_moved / t["copy"] / 1e9, "GB/s")
    for name in ("noise", "perturb", "update", "digest"):
        unit = "ns per parameter" + (" and member" if name == "update" else "")
        yield Result(group, name, t[name] * 1e9, unit)
    for name in ("perturb", "digest"):
        share = t.ratio("copy", name)
        yield Result(group, f"{name}: speed against the copy", share, "", 0.5 if name == "perturb" else None)
    yield Result(group, "paper: perturb + restore", t["paper: perturb + restore"] * 1e9, "ns per parameter")
    yield Result(group, "paper: update", t["paper: update"] * 1e9, "ns per parameter and member")
    yield Result(
        group, "perturb, against the paper's perturb + restore",
        t.ratio("paper: perturb + restore", "perturb"), "times faster", 15,
    )  # fmt: skip
    yield Result(group, "update, against the paper's", t.ratio("paper: update", "update"), "times faster", 15)


def generations(t: Timings, phases: Phases, work: Work, rounds: int) -> Iterator[Result]:
    group = f"generation, {work}"
    turns = range(len(t.seconds["plain"]))
    n, s = work.members, t.seconds
    full = [n * s["full: a member"][i] + s["full: update"][i] for i in turns]
    paper = [n * (s["paper: a member"][i] + s["paper: update, a member"][i]) for i in turns]
    yield Result(group, "plain inference of all rows", t["plain"], "s")
    yield Result(group, "plain inference", n * work.prompts * work.tokens / t["plain"], "tokens/s")
    yield Result(group, "low rank", t["low rank"], "s")
    for phase in ("perturb", "generate", "update"):
        yield Result(group, f"low rank: {phase}", phases.seconds[phase] / rounds, "s")
    many = MANY * t["low rank: a direction's update"]
    yield Result(group, f"low rank: update with {MANY} directions", many, "s")
    yield Result(group, f"full ({n} x a member's time, of {SAMPLE}, + update)", median(full), "s")
    yield Result(group, f"paper ({n} x a member's time, of {SAMPLE}, with its update)", median(paper), "s")
    against = [p / o for p, o in zip(paper, s["low rank"], strict=True)]
    yield Result(group, "low rank, against the paper's way", median(against), "times faster", 12)
    against = [p / o for p, o in zip(paper, full, strict=True)]
    yield Result(group, "full, against the paper's way", median(against), "times faster", 2)
    efficiency = t.ratio("plain", "low rank")
    yield Result(group, "low rank, everything: speed of plain inference", 100 * efficiency, "%", 90)


def forecast(
    t: Timings, phases: Phases, work: Work, rounds: int, population: int, whole: bool
) -> Iterator[Result]:
    """A generation of a large population on many ranks like this one.

    Evaluating is shared by the ranks, the update is not: every rank replays all seeds. `whole`: with waiting
    and exchange, and on more ranks; else the exchange, 16 bytes a member, is left out.
    """
    n = work.members
    lowrank = (phases.seconds["perturb"] + phases.seconds["generate"]) / rounds
    full = t["full: a member"]
    ways = {
        "full": Constants(full, full, 1, t["full: update"] / n),
        "low rank": Constants(full, lowrank, n, t["low rank: a direction's update"]),
    }
    group = f"forecast: {population} members x {work.prompts} prompts x {work.tokens} tokens"
    if whole:
        for name, value, unit in table(ways, population):
            yield Result(group, name, value, unit)
        return
    for way, measured in ways.items():
        for ranks in (8, 64, 256, 1024):
            blocks = -(-population // (measured.members * ranks))
            update = population * measured.update
            seconds = blocks * measured.many + update
            text = f"{way}, {ranks} ranks: {100 * update / seconds:.0f} % of it the update"
            yield Result(group, text, seconds, "s")


def one_turn(t: Timings, work: Work) -> Iterator[Result]:
    group = f"an environment of one turn, {work}"
    yield Result(group, "a task's generation, without its update", t["task"], "s")
    ways = {"one turn": "task.max_turns=1", "one turn of more": "keys and values kept for more turns"}
    for way, name in ways.items():
        more = 100 * (t.ratio(way, "task") - 1)
        yield Result(group, f"as an environment, {name}: takes more by", more, "%", most=3)
    alone = 100 * t.ratio("turns alone", "task")
    yield Result(group, "the environment alone, with answers at once: of the task's time", alone, "%", most=3)


def share(t: Timings, work: Work) -> Iterator[Result]:
    group = f"full perturbation, {work}"
    turns = range(len(t.seconds["generate"]))
    parts = [{name: values[i] for name, values in t.seconds.items()} for i in turns]
    others = [1 - part["generate"] / sum(part.values()) for part in parts]
    for name in ("generate", "perturb", "update"):
        yield Result(group, f"{name}, per member", t[name], "s")
    yield Result(group, "share that is not inference", 100 * median(others), "%", most=5)


def vllm(t: Timings, work: Work) -> Iterator[Result]:
    group = f"vLLM, full perturbation, {work}"
    turns = range(len(t.seconds["vllm"]))
    ours = [t.seconds["vllm"][i] + t.seconds["update"][i] for i in turns]
    theirs = [t.seconds["hf"][i] + t.seconds["update"][i] for i in turns]
    yield Result(group, "vLLM's own generate", work.prompts * work.tokens / t["vLLM alone"], "tokens/s")
    yield Result(group, "a member, with its share of the update", median(ours), "s")
    for name in ("perturb", "pack", "update"):
        yield Result(group, f"{name}, per member", t[name], "s")
    share = median(alone / all_ for alone, all_ in zip(t.seconds["vLLM alone"], ours, strict=True))
    yield Result(group, "everything: speed of vLLM's own generate", 100 * share, "%", 92)
    yield Result(
        group, "against the hf engine", median(b / a for a, b in zip(ours, theirs, strict=True)),
        "times faster", 2,
    )  # fmt: skip


def vllm_blocks(t: Timings, phases: Phases, work: Work, rounds: int, least: float) -> Iterator[Result]:
    """`least`: the per cent of vLLM's own speed that low rank should have."""
    group, rows = f"vLLM, low rank, {work}", work.members * work.prompts
    yield Result(group, "vLLM's own generate of all rows", t["vLLM alone"], "s")
    yield Result(group, "vLLM's own generate", rows * work.tokens / t["vLLM alone"], "tokens/s")
    yield Result(group, "low rank", t["low rank"], "s")
    for phase in ("perturb", "generate", "reward", "update"):
        yield Result(group, f"low rank: {phase}", phases.seconds[phase] / rounds, "s")
    speed = t.ratio("vLLM alone", "low rank")
    yield Result(group, "low rank, everything: speed of vLLM's own generate", 100 * speed, "%", least)


def vllm_others(t: Timings, work: Work) -> Iterator[Result]:
    """The same work in other ways, and how many times longer it takes than low rank in vLLM."""
    group, n, s = f"vLLM, low rank, {work}", work.members, t.seconds
    turns = range(len(s["low rank"]))
    full = [n * s["full: a member"][i] + s["full: update"][i] for i in turns]
    paper = [n * (s["paper: a member"][i] + s["paper: update, a member"][i]) for i in turns]
    ways = {
        "low rank in the hf engine": (s["hf: low rank"], "", 1.3),
        "full noise in vLLM": (full, f" ({n} x a member's time, of {SAMPLE}, + update)", 8),
        "the paper's way": (paper, f" ({n} x a member's time, of {SAMPLE}, with its update)", 28),
    }
    for way, (seconds, how, least) in ways.items():
        yield Result(group, way + how, median(seconds), "s")
        against = median(b / a for a, b in zip(s["low rank"], seconds, strict=True))
        yield Result(group, f"low rank in vLLM, against {way}", against, "times faster", least)


def multilora(t: Timings, lowrank: Timings, work: Work) -> Iterator[Result]:
    """`lowrank`: of the same rows, in the turns before these."""
    group = f"vLLM's multi-LoRA, {work}"
    yield Result(group, "no adapters: vLLM's own generate", t["no adapters"], "s")
    yield Result(group, "an adapter a member, on linear layers", t["adapters"], "s")
    yield Result(group, "new adapters, from disk", t["new adapters"], "s")
    for case in ("adapters", "new adapters"):
        yield Result(group, f"{case}: speed without", 100 * t.ratio("no adapters", case), "%")
    against = t["new adapters"] / lowrank["low rank"]
    yield Result(group, "low rank, everything, against new adapters", against, "times faster")


def scaling(t: Timings, ranks: int, work: Work) -> Iterator[Result]:
    group = f"{ranks} ranks, low rank, {work}"
    yield Result(group, "1 rank", t["1 rank"], "s")
    yield Result(group, f"{ranks} ranks", t["all ranks"], "s")
    least = 1.9 if ranks == 2 else None
    yield Result(group, f"{ranks} ranks against 1", t.ratio("1 rank", "all ranks"), "times faster", least)


def waiting(shares: dict[bool, float], ranks: int, blocks: int) -> Iterator[Result]:
    """`shares`: of the time that ranks wait, if blocks are handed out, and if not."""
    group = f"{ranks} ranks, {blocks} blocks each, of 1 to 4 units; the last rank takes 3 times longer"
    yield Result(group, "waiting, blocks handed out", 100 * shares[True], "%", most=100 / blocks)
    yield Result(group, "waiting, by a plan made beforehand", 100 * shares[False], "%")


def memory(bytes_beyond: dict[str, int | None], largest: int) -> Iterator[Result]:
    most = (largest + 200e6) / 1e6
    for name, value in bytes_beyond.items():
        if value is not None:
            yield Result("peak memory beyond live and base weights", name, value / 1e6, "MB", most=most)
