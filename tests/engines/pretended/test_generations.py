"""A rank on a pretended GPU and on the CPU: the same is computed, on one device at a time, rarely waiting."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pretended_gpu
import pytest
import tiny
import torch
from pretended_gpu import DEVICE, counting
from transformers import AutoModelForCausalLM, AutoTokenizer
from triton.runtime import driver

from mpies.engines.base import Conversations, Draws
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Population
from mpies.model import lowrank_block
from mpies.model.anchor import Anchor
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Full
from mpies.model.weights import Weights, take_over
from mpies.noise.cpu import CpuKernels
from mpies.noise.gpu import GpuKernels

CPU = torch.device("cpu")
EQUAL, PADDED = ["abcd", "efgh"], ["ab", "efghij"]
MEMBERS = Population(3, seed=1).members(0)
SEEDS, FACTORS = np.array([3, 2**64 - 4], np.uint64), np.array([0.1, -0.2], np.float32)


@dataclass
class Rank:
    """What a rank has, on one of the devices."""

    folder: str
    weights: Weights
    model: torch.nn.Module
    text: Text

    @classmethod
    def load(cls, folder, device: torch.device, where: str = "device", master=torch.float32) -> Rank:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        text = Text(model, AutoTokenizer.from_pretrained(folder), False)
        kernels = CpuKernels(1) if device == CPU else GpuKernels()
        weights = take_over(model, model.dtype, device, kernels, 1, master, where)
        return cls(str(folder), weights, model, text)

    def engine(self, tokens: int, on_rows=lambda rows: None, version=None) -> HfEngine:
        return HfEngine(
            self.model, self.text, max_new_tokens=tokens, batch_size=64, on_rows=on_rows, version=version
        )


def compute(rank: Rank) -> dict:
    """All that is computed with a model in a generation and in an evaluation."""
    weights, made = rank.weights, {}
    full, engine = Full(weights), rank.engine(3)
    full.set(MEMBERS[:1], 0.02)
    made["greedy"] = engine.generate(EQUAL).ids, engine.generate(PADDED).ids
    made["sampled"] = engine.sample(PADDED, Draws(5, 1.0, np.arange(2, dtype=np.uint64))).ids
    made["likelihood"] = np.concatenate(engine.log_probabilities(PADDED, [[5, 6, 7], [8]]))
    full.clear()
    lowrank = LowRank(rank.model, weights, rank=1)
    engine = rank.engine(3, lowrank.rows)
    lowrank.set(MEMBERS, 0.05)
    made["low rank"] = [c.ids for prompts in (EQUAL, PADDED) for c in engine.generate_block(prompts, 3)]
    lowrank.clear()
    anchor = Anchor(rank.folder, weights, weights.digest())
    weights.update(SEEDS, FACTORS, anchor.pulling(0.1))
    made["digest"] = weights.digest()
    return made


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True)])
def test_the_same_is_computed(tiny_model, kind, tied):
    """In float32, where the order of a sum changes no token."""
    folder = tiny_model(kind=kind, tied=tied)
    expected = compute(Rank.load(folder, CPU))
    with counting():
        found = compute(Rank.load(folder, DEVICE))
    assert np.allclose(found.pop("likelihood"), expected.pop("likelihood"), atol=1e-5)
    assert found == expected
    assert len({str(ids) for ids in found["low rank"]}) > 2, "members answer differently"


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_a_base_on_the_host(tiny_model, master):
    """Streamed to the GPU: the same bits are live, updated, pulled, read, told, and nothing is mixed up."""
    folder = tiny_model(kind="qwen2", tied=False, dtype=torch.bfloat16)
    with counting():
        near, far = (Rank.load(folder, DEVICE, where, master).weights for where in ("device", "host"))
        assert {base.device.type for base in far.base.values()} == {"cpu"} and far.device == DEVICE
        anchor = Anchor(str(folder), far, far.digest())
        found = []
        for weights in (near, far):
            shown = [live.cpu() for live in weights.live.values()]
            weights.perturb(int(SEEDS[1]), 0.05)
            shown += [live.cpu() for live in weights.live.values()]
            weights.update(SEEDS, FACTORS, anchor.pulling(0.1))
            weights.show_base()
            shown += [live.cpu() for live in weights.live.values()]
            weights.rank = 0
            weights.update_one("lm_head.weight", SEEDS, FACTORS)
            weights.restore(
                "model.norm.weight", torch.full_like(weights.live["model.norm.weight"].cpu(), 1.5)
            )
            found.append((shown, weights.digest(), weights.find_unfit()))
        (expected, digest, fit), (shown, *others) = found
        assert all(map(torch.equal, shown, expected)) and others == [digest, fit]


def test_a_stream_of_the_base_never_waits(ranks):
    """Copies begin a parameter ahead: 4 bytes of each, no wait while perturbing, one at an update's end."""
    size = 4 * ranks[2].weights.size
    with counting():
        far = Rank.load(ranks[2].folder, DEVICE, "host").weights
        far.perturb(1, 0.1)
    perturbed = cost(ranks[2], lambda rank: far.perturb(1, 0.1))
    assert perturbed.uploaded[torch.float32] == size and not perturbed.waits
    assert sum(perturbed.operations.values()) == 0, "but for the kernels"
    near = [cost(ranks[2], update) for _ in range(2)][-1]  # the seeds are there already
    updated = cost(ranks[2], lambda rank: (far.update(SEEDS, FACTORS), far.digest()))
    assert sum(updated.waits.values()) == sum(near.waits.values()) + 1


# What it costs. A GPU's time while decoding is that of launching: operations are counted.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, Rank]:
    """In bfloat16, by their number of layers."""
    made = {}
    with pytest.MonkeyPatch.context() as patch, counting():
        config = tiny.CONFIGS["qwen2"]
        for layers in (1, 2):
            kinds = {"qwen2": lambda **given: config(**{**given, "num_hidden_layers": layers})}  # noqa: B023
            patch.setattr(tiny, "CONFIGS", kinds)
            folder = tmp_path_factory.mktemp("model")
            tiny.save_model(folder, kind="qwen2", tied=False, dtype=torch.bfloat16)
            made[layers] = Rank.load(folder, DEVICE)
            made[layers].text.stops = {10**6}
    return made


def per_token(rank: Rank, prompts: list[str], lowrank: bool) -> tuple[int, Counter, Counter]:
    """Operations, waits and uploads that a token more takes."""
    counts = []
    with counting():
        perturbation = LowRank(rank.model, rank.weights, rank=1) if lowrank else None
        if perturbation:
            perturbation.set(MEMBERS, 0.01)
    for tokens in (2, 3):
        with counting() as counted:
            driver.active.launches.clear()
            engine = rank.engine(tokens, perturbation.rows if perturbation else lambda rows: None)
            engine.generate_block(prompts, len(MEMBERS) if lowrank else 1)
            launches = len(driver.active.launches)
        counts.append((sum(counted.operations.values()) + launches, counted.waits, counted.uploads))
    with counting():
        if perturbation:
            perturbation.clear()
    (before, *_), (after, waits, uploads) = counts
    return after - before, waits - counts[0][1], uploads - counts[0][2]


@pytest.mark.parametrize("prompts, waits, more", [(EQUAL, 1, 0), (PADDED, 2, 16)], ids=["equal", "padded"])
@pytest.mark.parametrize(
    "lowrank, fused, in_a_layer, besides",
    [
        (False, True, 40, 27),  # 1147 in 28 layers, 1163 with padding
        (True, True, 33, 24),  # 948 and 964
        (True, False, 64, 33),  # 1825 and 1841: without Triton
    ],
    ids=["plain", "low rank", "low rank, without Triton"],
)
def test_a_token(ranks, monkeypatch, prompts, waits, more, lowrank, fused, in_a_layer, besides):
    """Padding costs 16 operations and a wait, in transformers: is there any?"""
    monkeypatch.setattr(lowrank_block, "FUSED_ON", {DEVICE.type} if fused else set())
    one, waited, uploads = per_token(ranks[1], prompts, lowrank)
    two, *_ = per_token(ranks[2], prompts, lowrank)
    assert two - one <= in_a_layer and one - (two - one) <= besides + more
    assert sum(waited.values()) == waits and not uploads


def cost(rank: Rank, work) -> pretended_gpu.Counted:
    with counting() as counted:
        work(rank)
    return counted


def converse(rank: Rank, turns: int, times: int = 1) -> list[list[list[int]]]:
    """A turn goes on with what is kept of the one before."""
    engine, prompts = rank.engine(3, version=lambda: rank.weights.version), PADDED * times
    kept, said = engine.keep(), []
    for _ in range(turns):
        made = engine.generate(prompts, Conversations(kept, list(range(len(prompts)))))
        said.append(made.ids)
        prompts = [f"{prompt}{text} and" for prompt, text in zip(prompts, made.texts, strict=True)]
    return said


def test_turns_are_the_same(tiny_model):
    folder = tiny_model(kind="qwen2", tied=False)
    expected = converse(Rank.load(folder, CPU), 3)
    with counting():
        assert converse(Rank.load(folder, DEVICE), 3) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_kept_costs_two_operations_a_row_and_layer(ranks, layers):
    """Keys and values: of two rows, and of four."""
    turn = []
    for times in (1, 2):
        counts = [cost(ranks[layers], lambda rank, n=n: converse(rank, n, times)) for n in (1, 2)]  # noqa: B023
        turn.append([sum(getattr(one, kind).values()) for kind in ("operations", "waits") for one in counts])
    (first, second, waited, waits), (more, most, *others) = turn
    assert (most - more) - (second - first) <= 2 * len(PADDED) * layers
    assert others == [waited, waits], "a row waits for nothing"


def update(rank: Rank) -> None:
    rank.weights.update(SEEDS, FACTORS)
    rank.weights.digest()


def perturb(rank: Rank) -> None:
    LowRank(rank.model, rank.weights, rank=1).set(MEMBERS, 0.01)


def perturb_fully(rank: Rank) -> None:
    rank.weights.perturb(int(SEEDS[1]), 0.01)


@pytest.mark.parametrize("work, waits", [(update, 4), (perturb, 3), (perturb_fully, 0)])
def test_waits_do_not_grow_with_the_tensors(ranks, work, waits):
    """Seeds and factors are uploaded once, and the digest is read once; of 15 tensors and of 27."""
    for rank in ranks.values():
        assert sum(cost(rank, work).waits.values()) <= waits, len(rank.weights.base)


def test_weights_are_uploaded_as_they_are(ranks):
    """In the files' dtype, half of the base's bytes, converted on the GPU: at the start, for the anchor."""
    rank = ranks[2]
    size = sum(2 * base.numel() for base in rank.weights.base.values())
    loaded = cost(rank, lambda rank: Rank.load(rank.folder, DEVICE))
    assert loaded.uploaded[torch.bfloat16] == size
    assert sum(count for line, count in loaded.waits.items() if "weights.py:" in line) <= 2, "the buffers"
    with counting():
        fresh = Rank.load(rank.folder, DEVICE)
        anchor = Anchor(rank.folder, fresh.weights, fresh.weights.digest())
    pulled = cost(fresh, lambda rank: [anchor.initial(name) for name in rank.weights.base])
    assert pulled.uploaded == {torch.bfloat16: size} and not pulled.waits
