"""Write docs/models.md, which models can be tuned: make models

What the page says of an architecture is what a start with a tiny random model of it came to.
"""

from __future__ import annotations

import json
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
IN_VLLM = PAGE.with_name("models-vllm.jsonl")
"""What starts with the vLLM engine came to, in its own environment: make models-vllm"""
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
Nemotron-H, Zamba 2) and the mixture of Llama 4.

The last column is what `engine.name=vllm` comes to ([engines.md](engines.md)), by `make models-vllm` with
{vllm}, on a CPU and in float32 as well: after a start, greedy answers
of perturbed members and their log-probabilities were compared with what transformers computes with the
members' own weights. Tiny models had heads of 32 numbers there. Where low rank is refused, the layer that it
does not know is named.

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
ROW = "| `{}` | {} | {} | {} |\n"


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


def outcomes_in_vllm() -> tuple[str, dict[str, tuple[str, str]]]:
    """With which versions; and of each architecture, what full noise and low rank came to."""
    versions, *lines = (json.loads(line) for line in IN_VLLM.read_text().splitlines())
    said = {(name, lowrank): outcome for name, lowrank, outcome in lines}
    tried = {
        name: (outcome, said.get((name, True), ""))
        for (name, lowrank), outcome in said.items()
        if not lowrank
    }
    return " and ".join(f"{name} {version}" for name, version in versions.items()), tried


def in_vllm(full: str, lowrank: str) -> str:
    """Both outcomes in a few words."""
    if full != "yes":
        return reason_in_vllm(full)
    if lowrank == "yes":
        return "full noise, low rank"
    return f"full noise; low rank {reason_in_vllm(lowrank) if lowrank else 'not tried'}"


# Of refusals by vLLM or for it, what is left of them in the table.
SHORTER = {
    r"^no: \S+: (vllm |lowrank )?": "no: ",
    r"[;,] (or )?use engine\.name=hf.*$": "",
    r"does not know vLLM's (\w+) at \S+$": r"knows no `\1`",
    r"has no \S+ of its own, only transformers'$": "only by transformers' classes",
    r"does not start with this model \(\w+: (Value error, )?(.*?)\.?\)$": r"\2",
    r"Model architectures? \S+ are not supported for now": "not known",
    r"Model architecture \S+ was supported in vLLM until (\S+),.*": r"known until \1",
    r"Model architectures \S+ failed to be inspected\..*": "its file needs what is not installed",
    r"cannot share this model's weights: ": "",
    r"this model otherwise than transformers does: log": "it otherwise than transformers does: log",
    r"weights that it has made of this model's": "weights that it has made of others",
    r"\|": r"\\|",
}


def reason_in_vllm(line: str) -> str:
    for pattern, text in SHORTER.items():
        line = re.sub(pattern, text, line)
    return line


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
    versions, tried = outcomes_in_vllm()
    head = HEAD.format(
        version=transformers.__version__, none=works.count([False, False]), vllm=versions, **counts
    )
    others = {name: in_vllm(*tried[name]) if name in tried else "not tried" for name in rows}
    table = "".join(
        ROW.format(name.replace(":", "`, form `"), *said, others[name]) for name, said in rows.items()
    )
    columns = "| `model_type` | full noise | low rank | in vLLM |\n|---|---|---|---|\n"
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
