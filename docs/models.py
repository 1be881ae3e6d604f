"""Write docs/models.md, which models can be tuned: make models

What the page says of an architecture is what a start with a tiny random model of it came to.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
import zoo
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpies.errors import InputError
from mpies.model.lowrank import LowRank

PAGE = Path(__file__).resolve().parent / "models.md"
HEAD = """# Models: which can be tuned

Made by `make models`, with transformers {version}: of each architecture a tiny random model was built
from its configuration alone and started as a run starts it, with `engine.name=hf`, in float32 on a CPU.
The [self-test](engines.md#whatever-else-is-in-the-batch) of the start lets it through, or ends it with a
line whose reason stands here. What it lets through, `tests/model/test_zoo.py` compares once more, with
members' weights that the test itself writes out. Your model is tested at every start, with its own weights
and in its own dtype.

`model_type` is what config.json calls it. With low rank, *fast* is a block of members in one batch all
through; *member by member* are the modules named, which cost the time of smaller batches (what is in them is
fast). What hf refuses, `engine.name=vllm` may compute ([engines.md](engines.md)).

{both} compute with full noise and with low rank, {fast} of them fast; {full} more with full noise alone,
{none} with neither.

"""
TAIL = """
Not tried, since most of them are no text models or no decoders: {untried}.
"""
ROW = "| `{}` | {} | {} |\n"


def outcome(name: str, lowrank: bool) -> str:
    """What a start comes to: how it computes, or the reason of its refusal."""
    try:
        started = zoo.start(zoo.build(name), lowrank)
    except InputError as error:
        return "no: " + reason(str(error))
    said = "yes"
    if isinstance(started.perturbation, LowRank):
        modules = ", ".join(f"`{module}`" for module in started.perturbation.ways.in_turns())
        said = f"member by member: {modules}" if modules else "fast"
    return said + ", but KL divergence reads whole answers at once" * started.engine.at_once


def reason(line: str) -> str:
    """A refusal without the setting, the model's name and the remedy."""
    said = re.sub(r"^\S+: (lowrank|hf) ", "", line).split("; use ")[0]
    said = re.sub(r"(does not know|what) the (\w+)( at \S+)", r"\1 `\2`", said)
    said = re.sub(r"\b(compute|computes|decode) \w+( in float32)?", r"\1 it", said)
    return re.sub(r" \(log-probabilities .*\)$", "", said).replace("|", "\\|")


def make_page() -> str:
    """Of all architectures that the installed transformers has."""
    torch.set_num_threads(1)
    present = sorted(set(zoo.ARCHITECTURES) - set(zoo.missing()))
    rows = {name: (outcome(name, False), outcome(name, True)) for name in present}
    works = [[not said.startswith("no: ") for said in row] for row in rows.values()]
    counts = {"both": works.count([True, True]), "full": works.count([True, False])}
    counts["fast"] = sum(said.startswith("fast") for _, said in rows.values())
    untried = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(map(zoo.kind_of, present)))
    head = HEAD.format(version=transformers.__version__, none=works.count([False, False]), **counts)
    table = "".join(ROW.format(name.replace(":", "`, form `"), *said) for name, said in rows.items())
    columns = "| `model_type` | full noise | low rank |\n|---|---|---|\n"
    return head + columns + table + TAIL.format(untried=", ".join(untried))


if __name__ == "__main__":
    PAGE.write_text(make_page())
