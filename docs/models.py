"""Write docs/models.md, which models can be tuned: make models

What the page says of an architecture is what a start with a tiny random model of it came to.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import seeing
import torch
import transformers
import zoo
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpies.engines.unused import find_unused
from mpies.errors import InputError
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Perturbation

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
fast): above all state spaces (the Mamba 1 and 2 mixers of Bamba, Jamba, Falcon-H1, Granite 4's hybrids,
Nemotron-H, Zamba 2) and the mixture of Llama 4. What hf refuses, `engine.name=vllm` may compute
([engines.md](engines.md)).

{both} compute with full noise and with low rank, {fast} of them fast; {full} more with full noise alone,
{none} with neither.

"""
IMAGES = """
## With images

The same with prompts that have images, each model with a tiny processor of its own kind. Where no prompt has
images, the modules in the last column are not tuned (`es.leave_out`).

| `model_type` | full noise | low rank | not tuned without images |
|---|---|---|---|
"""
TAIL = """
Of forms that read images, the table names the text decoder (`qwen3_5_text` of `qwen3_5`); the whole is
loaded.

Not tried: {untried}. Most of them are no text models or no decoders; the others are tested as yours is, at
the start of a run.
"""
ROW = "| `{}` | {} | {} |\n"


def outcome(name: str, lowrank: bool) -> str:
    """What a start comes to: how it computes, or the reason of its refusal."""
    try:
        started = zoo.start(zoo.build(name), lowrank)
    except InputError as error:
        return "no: " + reason(str(error))
    return (
        told(started.perturbation)
        + ", but KL divergence reads whole answers at once" * started.engine.at_once
    )


def outcome_with_images(kind: str, lowrank: bool) -> tuple[str, str]:
    """The same of a model that reads images, and what is not tuned of it where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        seeing.save_model(Path(folder), kind)
        perturbation = f"es.perturbation={'lowrank' if lowrank else 'full'}"
        try:
            made = seeing.start(Path(folder), perturbation)
        except InputError as error:
            return "no: " + reason(str(error)), ""
    unused = ", ".join(f"`{path}`" for path in find_unused(made.model, made.weights))
    return told(made.perturbation), unused


def told(perturbation: Perturbation) -> str:
    """How a perturbation is computed."""
    if not isinstance(perturbation, LowRank):
        return "yes"
    modules = ", ".join(f"`{module}`" for module in perturbation.ways.in_turns())
    return f"member by member: {modules}" if modules else "fast"


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
    return head + columns + table + TAIL.format(untried=", ".join(untried)) + images()


def images() -> str:
    """The part about models that read images."""
    rows = []
    for kind in sorted(seeing.KINDS):
        (full, unused), (lowrank, _) = (outcome_with_images(kind, lowrank) for lowrank in (False, True))
        rows.append(f"| `{kind}` | {full} | {lowrank} | {unused} |\n")
    return IMAGES + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(make_page())
