"""The vLLM engine: a member is the same model as in the hf engine, and nothing of other weights is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import one_vllm
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from mpies import config, replica
from mpies.engines.base import Draws
from mpies.engines.sampler import answer_numbers
from mpies.engines.vllm.engine import VllmEngine
from mpies.engines.vllm.host import RESERVE, Room, cache_bytes
from mpies.errors import InputError
from mpies.noise import definition
from mpies.replica import Replica
from mpies.tasks.base import Task

# More than run at once, of very different lengths; one fills a block of the cache.
PROMPTS = ["Solve: 3 + 5 =", "a", "2,4,6,8," * 20, "zz", "Name a color:"]
NEW, ROWS, SIGMA = 10, 3, 0.05
HIDDEN = 128  # vLLM's attention on CPUs wants heads of 32 numbers at least


@dataclass
class Both:
    """The same model in both engines, each with weights of its own."""

    vllm: Replica
    hf: Replica

    @property
    def each(self) -> tuple[Replica, Replica]:
        return self.vllm, self.hf


@pytest.fixture(scope="module", autouse=True)
def cache_that_a_user_has_set():
    """As vLLM's documentation for CPUs has it, in GB: it would be taken in place of what is reckoned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def build(world, folder, engine: str, *overrides: str) -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.chat_template=false", f"engine.max_new_tokens={NEW}", f"engine.batch_size={ROWS}"]
    given += [f"engine.name={engine}", "es.perturbation=full", *overrides]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    settings = config.load(given)
    if engine == "vllm":
        return one_vllm.alone(lambda: replica.build(world, settings, task))
    return replica.build(world, settings, task)


@pytest.fixture(
    scope="module", params=[("llama", True), ("qwen2", False)], ids=["llama-tied", "qwen2-untied"]
)
def family(request) -> tuple[str, bool]:
    """qwen2 has biases in its fused layers; the vocabulary of 99 is padded. Of the module, so that each
    one's tests follow each other."""
    return request.param


@pytest.fixture
def both(family, world, tiny_model) -> Both:
    kind, tied = family
    folder = tiny_model(kind=kind, tied=tied, hidden=HIDDEN)
    return one_vllm.shared(
        ("both", *family), lambda: Both(*(build(world, folder, engine) for engine in ("vllm", "hf")))
    )


@pytest.fixture(autouse=True)
def base_weights(request):
    """Every test begins and ends with the base."""
    if "both" not in request.fixturenames:
        yield
        return
    made = request.getfixturevalue("both")
    for one in made.each:
        one.weights.show_base()
    stops = [set(one.engine.text.stops) for one in made.each]
    yield
    for one, theirs in zip(made.each, stops):
        one.weights.show_base()
        one.engine.text.stops = theirs


def parameters_of(made: Replica) -> dict[str, torch.Tensor]:
    """vLLM's own."""
    (found,) = made.engine.llm.collective_rpc(lambda worker: dict(worker.get_model().named_parameters()))
    return found


def first_logits(made: Replica, monkeypatch) -> torch.Tensor:
    """(prompts, vocabulary) that vLLM chooses the answers' first tokens by."""
    (model,) = made.engine.llm.collective_rpc(lambda worker: worker.get_model())
    seen, compute = [], model.compute_logits

    def spy(*arguments, **named):
        seen.append(compute(*arguments, **named))
        return seen[-1]

    found = []
    for prompt in PROMPTS:
        with monkeypatch.context() as patch:
            patch.setattr(model, "compute_logits", spy)
            seen.clear()
            made.engine.generate([prompt])
        found.append(seen[0][-1])
    return torch.stack(found)


@torch.inference_mode()
def expected_logits(made: Replica) -> torch.Tensor:
    encode = made.engine.text.encode
    return torch.stack([made.model(torch.tensor([encode(p)])).logits[0, -1] for p in PROMPTS])


def test_a_member_is_the_same_model_in_both_engines(both, monkeypatch):
    answers = []
    for seed in (None, 1, 2):
        for made in both.each if seed else ():
            made.weights.perturb(seed, SIGMA)
        logits = first_logits(both.vllm, monkeypatch)
        torch.testing.assert_close(logits, expected_logits(both.hf), atol=1e-4, rtol=0)
        mine, theirs = (made.engine.generate(PROMPTS) for made in both.each)
        assert mine == theirs
        answers.append(mine)
    assert len({str(answer.ids) for answer in answers}) == 3
    assert both.vllm.weights.digest() == both.hf.weights.digest()


def test_nothing_is_left_of_other_weights(both):
    """Strong perturbations change the answers to the same prompts; going back gives the first ones."""
    engine, weights = both.vllm.engine, both.vllm.weights
    first = engine.generate(PROMPTS)
    assert engine.generate(PROMPTS) == first
    seen = [first]
    for seed in (1, 2, 3):
        weights.perturb(seed, 0.5)
        seen.append(engine.generate(PROMPTS))
        assert all(mine != theirs for mine, theirs in zip(seen[-1].ids, first.ids, strict=True))
    assert len({str(answer.ids) for answer in seen}) == 4
    weights.show_base()
    assert engine.generate(PROMPTS) == first


def test_fused_parameters_hold_slices_of_the_same_noise(both):
    weights = both.vllm.weights
    weights.perturb(7, 0.3)
    expected = {
        name: definition.perturbed(base.numpy().ravel(), 7, weights.ids[name], 0.3).reshape(base.shape)
        for name, base in weights.base.items()
    }
    own = parameters_of(both.vllm)
    for layer in range(2):
        path = f"model.layers.{layer}"
        for fused, parts in {
            "self_attn.qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            for kind in ("weight", "bias"):
                if f"{path}.{fused}.{kind}" in own:
                    joined = np.concatenate([expected[f"{path}.{part}.{kind}"] for part in parts])
                    np.testing.assert_array_equal(own[f"{path}.{fused}.{kind}"].numpy(), joined)
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(own[name][: len(expected[name])].numpy(), expected[name])
    assert len(own[name]) > len(expected[name]) and not own[name][len(expected[name]) :].any()


def test_live_weights_are_not_there_twice(both):
    """The transformers model, vLLM and `Weights` share memory: no parameter is anywhere else."""
    own = {p.untyped_storage().data_ptr() for p in parameters_of(both.vllm).values()}
    for tensors in (both.vllm.model.parameters(), both.vllm.weights.live.values()):
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == own


def test_the_cache_is_what_was_reckoned(both):
    cache = both.vllm.engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    room = Room.of(both.vllm.engine.text, PROMPTS, ROWS, NEW)
    assert cache == room.bytes(both.vllm.model.config, torch.float32)


def test_answers_end_as_with_hf(both):
    """At a stop token, which counts; some rows early, others not at all."""
    said = both.hf.engine.generate(PROMPTS).ids
    stops = {said[0][2], said[2][5]}
    for made in both.each:
        made.engine.text.stops |= stops
    mine, theirs = (made.engine.generate(PROMPTS) for made in both.each)
    assert mine == theirs
    assert len(set(mine.tokens)) > 1 and any(ids[-1] in stops for ids in mine.ids)


def test_prompts_are_written_as_with_hf(both):
    chat = [[{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}], "a"]
    assert both.vllm.engine.generate(chat) == both.hf.engine.generate(chat)
    assert both.vllm.engine.generate([]).texts == []
    longest = max(len(both.vllm.engine.text.encode(prompt)) for prompt in PROMPTS)
    with pytest.raises(InputError, match=f"a prompt has 199 tokens.* up to {longest}$"):
        both.vllm.engine.generate(["a" * 199])


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_are_those_of_hf(both, temperature):
    """Drawn from the same logits by the same numbers, also where answers end at different times."""
    for made in both.each:
        made.weights.perturb(3, SIGMA)
        made.engine.text.stops |= set(range(60, 70))
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    draws = Draws(5, temperature, answer_numbers(range(2**31, 2**31 + len(PROMPTS)), 2))
    mine, theirs = (made.engine.sample(asked, draws) for made in both.each)
    assert mine == theirs
    assert len({str(ids) for ids in mine.ids}) == len(asked) and len(set(mine.tokens)) > 2
    assert both.vllm.engine.generate(PROMPTS) == both.hf.engine.generate(PROMPTS), "greedy again"
    values, expected = (made.engine.log_probabilities(asked, mine.ids) for made in both.each)
    np.testing.assert_array_equal(np.concatenate(values), np.concatenate(expected))


# Refusals


@pytest.mark.parametrize(
    "settings, why",
    [
        (GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=99, n_positions=512), "in transformers, but"),
        (
            Qwen3Config(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, vocab_size=99, max_position_embeddings=512,
            ),
            "cannot compute this model",
        ),
    ],
    ids=["transposed", "heads-too-small"],
)  # fmt: skip
def test_models_that_cannot_be_shared_are_refused(world, tiny_model, tmp_path, settings, why):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"engine.name: vllm .*{why}.*engine.name=hf") as error:
        build(world, tmp_path, "vllm")
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_transformers_computes_otherwise_is_refused(both, monkeypatch):
    made = both.vllm.engine
    host = SimpleNamespace(
        llm=made.llm,
        packing=made.packing,
        cache=0,
        room=Room(rows=ROWS, tokens=made.most_tokens),
        noise=None,
        turns=False,
    )
    given = host, made.text, made.hf
    VllmEngine(*given, max_new_tokens=NEW)
    monkeypatch.setattr(both.vllm.model.model.norm, "variance_epsilon", 10.0)
    with pytest.raises(
        InputError, match=r"^engine.name: vllm computes this model otherwise .*engine.name=hf"
    ):
        VllmEngine(*given, max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_vllm_keeps_to_itself_are_found_at_start(world, tiny_model, monkeypatch, dtype):
    """A copy that a layer makes when it first computes with weights, as of norms: the base's for ever."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    plain = RMSNorm.forward

    def forward(self, *given):
        own = self.weight.data
        if own.any():  # vLLM computes once before they are written
            vars(self).setdefault("kept", own.clone())
            self.weight.data = self.kept
        try:
            return plain(self, *given)
        finally:
            self.weight.data = own

    monkeypatch.setattr(RMSNorm, "forward", forward)
    with pytest.raises(InputError, match=r"^engine\.name: vllm computes Llama.* once its weights are p"):
        build(world, tiny_model(kind="llama", hidden=HIDDEN), "vllm", f"model.dtype={dtype}")


def test_answers_longer_than_the_model_knows_are_refused(world, tiny_model):
    with pytest.raises(InputError, match=r"14 tokens and its answer up to 500, but the model knows 512"):
        build(world, tiny_model(hidden=HIDDEN), "vllm", "engine.max_new_tokens=500")


def test_what_does_not_fit_is_refused_with_numbers(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(hidden=HIDDEN))
    room, gb = Room(rows=8, tokens=1000), 10**9
    one = room.bytes(model.config, torch.bfloat16, 1)
    assert one == (math.ceil(1000 / 128) + 2) * 128 * 2 * 2 * 2 * 32 * 2  # two layers, two heads of 32

    def reckon(free, device="cuda"):
        return cache_bytes(room, model.config, torch.bfloat16, device, gb, free)

    assert reckon(20 * gb) == room.bytes(model.config, torch.bfloat16)
    assert reckon(2 * gb + RESERVE["cuda"] + 2 * one) == 2 * one, "fewer answers at a time"
    with pytest.raises(
        InputError, match=r"leave 2.1 GB, but live weights take 2 GB, .* 1000 tokens .* the rest"
    ):
        reckon(int(2.1 * gb))
    with pytest.raises(InputError, match="live weights take 4 GB"):  # once more as oneDNN has them
        reckon(3 * gb, "cpu")
