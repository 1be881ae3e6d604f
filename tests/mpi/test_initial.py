"""What evaluations measure against the initial model, KL and drift, against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpies import config, replica
from mpies.errors import InputError
from mpies.measure.drift import measure_drift
from mpies.measure.evaluation import Sampling
from mpies.measure.kl import estimate_kl
from mpies.measure.statistics import Figure
from mpies.model import initial, tensor_files
from mpies.ranks import collectives

pytestmark = pytest.mark.mpi

ROWS = [{"prompt": text} for text in ("Solve: 3 + 5 =", "a", "Name one primary color:")]


@pytest.fixture
def tuned(world, shared_model):
    """A replica whose base was moved away from its model folder's weights, and where to read those from."""
    torch.set_num_threads(1)
    collectives.set_timeout(world, 60)

    def make(shift=0.15, dtype="float32", new=3, perturbation="full", **options):
        folder = shared_model(**options)
        given = [f"model.path={folder}", "model.device=cpu", f"model.dtype={dtype}", "run.directory=none"]
        given += ["task.chat_template=false", f"engine.max_new_tokens={new}", "es.block=2"]
        settings = config.load([*given, f"es.perturbation={perturbation}"])
        made = replica.build(world, settings)
        facts = made.facts
        source = initial.find_initial(str(folder), made.weights, facts.model_digest, facts.model_class)
        for seed in (1, 2) if shift else ():
            made.weights.update(np.array([seed], dtype=np.uint64), np.array([shift], dtype=np.float32))
        made.perturbation.clear()
        return folder, made, source

    return make


@torch.inference_mode()
def true_divergence(model, base, prompt: list[int], stops: set[int], new: int) -> tuple[float, float]:
    """Expected sum of KL(pi || pi_0) over an answer's places, and its expected length, by all answers."""

    def chances(which, told):
        return torch.log_softmax(which(torch.tensor(told)).logits[:, -1].double(), -1)

    told, weight, total, length = [prompt], torch.ones(1, dtype=torch.float64), 0.0, 0.0
    for _ in range(new):
        p, q = chances(model, told), chances(base, told)
        total += float(weight @ (p.exp() * (p - q)).sum(-1))
        length += float(weight.sum())
        following = weight[:, None] * p.exp()
        kept = [(i, t) for i in range(len(told)) for t in range(p.shape[1]) if t not in stops]
        told = [[*told[i], t] for i, t in kept]
        weight = torch.tensor([float(following[i, t]) for i, t in kept], dtype=torch.float64)
    return total, length


def test_kl_is_that_of_the_whole_distributions(world, tuned):
    """Of answers of two tokens: the estimate against the sum over all 9,801 of them."""
    folder, made, source = tuned(new=2)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = ROWS[:2]
    found = estimate_kl(world, made, source, rows, 500, Sampling(3000, 1.0, seed=3))
    text = made.engine.text
    exact = [true_divergence(made.model, base, text.encode(r["prompt"]), text.stops, 2) for r in rows]
    expected = sum(total for total, _ in exact) / sum(length for _, length in exact)
    assert expected > 0.05
    assert found.mean == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("perturbation", ["full", "lowrank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_leaves_no_trace(world, tuned, dtype, perturbation):
    _, made, source = tuned(dtype=dtype, perturbation=perturbation)
    base = made.weights.digest()
    live = {name: value.clone() for name, value in made.weights.live.items()}
    first = estimate_kl(world, made, source, ROWS, 4, Sampling(3))
    assert first.mean > 0.001
    assert made.weights.digest() == base
    assert all(torch.equal(made.weights.live[name], value) for name, value in live.items())
    assert estimate_kl(world, made, source, ROWS, 4, Sampling(3)) == first
    assert len(set(collectives.allgather_objects(world, first))) == 1


def test_any_number_of_ranks_gives_the_same_figures(world, tuned):
    """Against one rank alone; with up to four ranks, some of which get no batch."""
    from mpi4py import MPI

    _, made, source = tuned()
    for rows in (ROWS, ROWS[:1]):
        alone = estimate_kl(MPI.COMM_SELF, made, source, rows, 2, Sampling(3))
        assert alone.mean > 0.001
        assert estimate_kl(world, made, source, rows, 2, Sampling(3)) == alone
    assert measure_drift(world, made, source) == measure_drift(MPI.COMM_SELF, made, source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_initial_model_has_no_kl_and_no_drift(world, tuned, dtype):
    _, made, source = tuned(shift=0, dtype=dtype)
    assert estimate_kl(world, made, source, ROWS, 4, Sampling(3)) == Figure(0.0, 0.0)
    assert set(measure_drift(world, made, source).values()) == {0.0}


def test_kl_of_a_failing_engine_shows_the_base_again(world, tuned, monkeypatch):
    _, made, source = tuned()
    live = {name: value.clone() for name, value in made.weights.live.items()}
    calls = iter([made.engine.log_probabilities])  # the second one fails
    from mpi4py import MPI

    monkeypatch.setattr(made.engine, "log_probabilities", lambda *a: next(calls)(*a))
    with pytest.raises(StopIteration):
        estimate_kl(MPI.COMM_SELF, made, source, ROWS, 32, Sampling(3))
    assert all(torch.equal(made.weights.live[name], value) for name, value in live.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_drift_is_the_distance_from_the_files(world, tuned, kind, tied):
    folder, made, source = tuned(kind=kind, tied=tied)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    squares: dict[str, float] = {}
    for name, value in before.named_parameters():
        group = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name)
        group = group or (f"layer {name.split('.')[2]}" if ".layers." in name else "other")
        far = (made.weights.base[name].double() - value.detach().double()).square().sum()
        squares[group] = squares.get(group, 0.0) + float(far)
    found = measure_drift(world, made, source)
    expected = {"all": sum(squares.values()), **squares}
    assert found.keys() == expected.keys()
    assert found == pytest.approx({group: math.sqrt(value) for group, value in expected.items()})
    assert ("head" in found) == (not tied)
    # theta - theta_0 = 0.15 (noise_1 + noise_2), of which every element has variance 2 * 0.15^2.
    assert found["all"] == pytest.approx(0.15 * math.sqrt(2 * made.weights.size), rel=0.02)


def test_a_model_whose_files_have_other_names_is_loaded(world, tuned, tmp_path, monkeypatch):
    folder, made, files = tuned()
    assert isinstance(files, initial.InitialFromFiles)
    monkeypatch.setattr(tensor_files, "SINGLE", "elsewhere.safetensors")
    loaded = initial.find_initial(str(folder), made.weights, made.facts.model_digest, made.facts.model_class)
    assert isinstance(loaded, initial.InitialFromLoading)
    assert measure_drift(world, made, loaded) == measure_drift(world, made, files)
    run = (world, made)
    assert estimate_kl(*run, loaded, ROWS, 4, Sampling(2)) == estimate_kl(*run, files, ROWS, 4, Sampling(2))


def test_another_model_to_compare_with_is_refused(world, tuned, shared_model):
    _, made, _ = tuned(kind="llama")
    for path, says in ((shared_model(kind="qwen2"), "has other parameters"), ("./none", "no such folder")):
        with pytest.raises(InputError, match=says):
            initial.find_initial(str(path), made.weights, None, made.facts.model_class)
    with pytest.raises(InputError, match="has changed"):
        other = str(shared_model(kind="llama", seed=1))
        initial.find_initial(other, made.weights, made.facts.model_digest, made.facts.model_class)
