"""configs/: the paper's experiments with the paper's settings, and headers whose figures are right."""

from __future__ import annotations

import re

import launching
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from mpies import config
from mpies.tasks import making

FOLDER = launching.REPOSITORY / "configs"

# arXiv 2509.24372v2, hyper-parameters and results. What the header has to give of the results:
# accuracy before and after ES, in per cent; normalised reward and KL.
PAPER_COUNTDOWN = {
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", "0.1", "14.4"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "0.7", "37.3"),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", "10.0", "60.5"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "31.2", "66.8"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", "0.4", "16.8"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", "3.2", "51.6"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "8.1", "61.2"),
}
PAPER_CONCISENESS = {"0.0005": (), "0.001": (".889", ".274"), "0.0015": (".919", ".813")}

# task, model, sigma, alpha, iterations, new tokens, figures
PAPER = {
    **{
        f"countdown-{name}": ("countdown", model, 0.001, 5e-4, 500, 1024, figures)
        for name, (model, *figures) in PAPER_COUNTDOWN.items()
    },
    **{
        f"conciseness-qwen2.5-7b-sigma{sigma}": (
            *("conciseness", "Qwen/Qwen2.5-7B-Instruct", float(sigma), float(sigma) / 2, 1000, 100),
            figures,
        )
        for sigma, figures in PAPER_CONCISENESS.items()
    },
    "math-qwen2.5-math-7b": ("math", "Qwen/Qwen2.5-Math-7B", 0.001, 5e-4, 336, 3000, ()),
}
POPULATION = 30
FLOAT32, BFLOAT16 = 4, 2  # bytes

# As in each model's config.json: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied.
QWEN_7B = (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, False)
SHAPES = {
    "Qwen2.5-0.5B-Instruct": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B-Instruct": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B-Instruct": (Qwen2Config, 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B-Instruct": QWEN_7B,
    "Qwen2.5-Math-7B": QWEN_7B,
    "Llama-3.2-1B-Instruct": (LlamaConfig, 2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.2-3B-Instruct": (LlamaConfig, 3072, 8192, 28, 24, 8, 128256, True),
    "Llama-3.1-8B-Instruct": (LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
}


def header(name: str) -> str:
    """The file's comment, on one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(word for line in lines if line.startswith("#") for word in line[1:].split())


def listed(name: str) -> str:
    """The file's row in the table of README.md."""
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{name}.yaml`" in line]
    return row


def load(name: str) -> config.Settings:
    return config.load([str(FOLDER / f"{name}.yaml")])


def test_there_is_a_file_for_each_experiment_and_no_other():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name):
    task, model, sigma, alpha, iterations, tokens, figures = PAPER[name]
    settings = load(name)
    es = settings.es
    assert (settings.task.name, settings.model.path) == (task, model)
    assert (es.sigma, es.alpha, es.population, es.generations) == (sigma, alpha, POPULATION, iterations)
    assert (settings.engine.max_new_tokens, es.perturbation, es.fitness) == (tokens, "full", "zscore")
    assert not es.antithetic and not es.anchor_decay and es.alpha_schedule == "constant"
    assert settings.run.directory == f"runs/{name}"  # a run file of its own
    assert "paper (arXiv 2509.24372v2)" in header(name)
    assert all(figure in header(name) and figure in listed(name) for figure in figures)


def sizes_of(model: str) -> tuple[list[int], int]:
    """Elements of each parameter, and bytes of a token's keys and values, in bfloat16."""
    kind, hidden, intermediate, layers, heads, pairs, vocabulary, tied = SHAPES[model]
    shape = kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(shape)
    keys_and_values = 2 * layers * pairs * (hidden // heads)
    return [parameter.numel() for parameter in outline.parameters()], keys_and_values * BFLOAT16


@pytest.mark.parametrize("name", PAPER)
def test_memory_in_the_header_is_that_of_the_model(name):
    settings, said = load(name), header(name)
    sizes, token = sizes_of(settings.model.path.split("/")[1])
    rows = settings.engine.batch_size
    length = int(re.search(rf"{rows} \w+ x ([\d,]+) tokens x {token:,} B", said)[1].replace(",", ""))
    assert length >= settings.engine.max_new_tokens + 100  # the prompt's
    parts = (FLOAT32 + BFLOAT16) * sum(sizes), FLOAT32 * max(sizes), rows * length * token
    assert settings.model.dtype == "bfloat16" and f"weights {sum(sizes):,} x (4 B" in said
    assert re.findall(r" ([\d.]+ GB)(?= scratch| cache| Ranks)", said) == [f"{p / 1e9:.1f} GB" for p in parts]
    total = f"{sum(parts) / 1e9:.1f} GB"
    assert f"Memory per GPU, {total}" in said and f" {total} " in listed(name)
    gpu = int(re.search(r"so an? (\d+) GB GPU", said)[1])
    assert sum(parts) < 0.9e9 * gpu  # activations come on top


def test_ranks_in_the_headers_share_the_members():
    even = [n for n in range(1, POPULATION + 1) if POPULATION % n == 0]
    text = f"{', '.join(map(str, even[:-1]))} or {even[-1]}"
    assert all(text in header(name) for name in PAPER)


@pytest.mark.parametrize(
    "name, train, held_out",
    [("countdown-qwen2.5-3b", 200, 2000), ("conciseness-qwen2.5-7b-sigma0.001", 2, 8)],
)
def test_the_prompts_are_as_many_as_in_the_paper(name, train, held_out):
    task = making.make(load(name).task)
    assert (len(task.train), len(task.held_out)) == (train, held_out)
