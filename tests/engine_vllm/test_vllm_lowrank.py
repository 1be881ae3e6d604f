"""A block of low-rank members in vLLM: each computes what its own weights do, however vLLM mixes them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import one_vllm
import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from mpies import config, replica
from mpies.engines.vllm import layers, lowrank, members, noise, norms, selftest
from mpies.engines.vllm.host import Noise, Room, cache_bytes
from mpies.errors import InputError
from mpies.es.population import Member
from mpies.noise import definition
from mpies.replica import Replica
from mpies.tasks.base import Task

PROMPTS = ["Solve: 3 + 5 =", "a", "2,4,6,8," * 20, "zz", "Name a color:"]
NEW, ROWS, SIGMA, RANK = 10, 7, 0.05, 2
MEMBERS = [Member(0, 5, 1), Member(1, 5, -1), Member(2, 2**63 + 8, 1)]

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 32}
# Untied and biases; norms of queries and keys; scaled embeddings and norms that add 1; fused in transformers,
# too; norms that subtract the mean, with biases; norms that hand on a sum; norms that add 1 to a weight and
# have a bias; a table of positions.
ARCHITECTURES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": HEADS,
    "Gemma3Text": HEADS | {"query_pre_attn_scalar": 32},
    "Phi3": {},
    "StableLm": {"use_qkv_bias": True},
    "Cohere": {},
    "Nemotron": {},
    "OPT": {"ffn_dim": 256, "word_embed_proj_dim": 128},
}


def save(folder, architecture: str, **changes):
    """A model whose every parameter matters: norms and biases are random, too."""
    text = tiny.tokenizer()
    options = {"vocab_size": len(text), **SHAPE, **ARCHITECTURES.get(architecture, {}), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{architecture}Config")(**options))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.float().save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def build(world, folder, *overrides: str) -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.chat_template=false", f"engine.max_new_tokens={NEW}", f"engine.batch_size={ROWS}"]
    given += [
        "engine.name=vllm",
        "es.perturbation=lowrank",
        f"es.rank={RANK}",
        "es.block=3",
        "es.population=6",
    ]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    return one_vllm.alone(lambda: replica.build(world, config.load([*given, *overrides]), task))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request) -> str:
    """Of the module, so that each one's tests follow each other."""
    return request.param


@pytest.fixture
def made(family, world, tmp_path) -> Replica:
    return one_vllm.shared(("low rank", family), lambda: build(world, save(tmp_path / "model", family)))


@pytest.fixture
def llama(world, tmp_path) -> Replica:
    return one_vllm.shared(("low rank", "Llama"), lambda: build(world, save(tmp_path / "model", "Llama")))


@pytest.fixture(autouse=True)
def base_weights(request):
    """Every test begins and ends with the base."""
    used = [request.getfixturevalue(name) for name in ("made", "llama") if name in request.fixturenames]
    yield
    for one in used:
        one.perturbation.clear()


def own_weights(made: Replica, member: Member) -> dict[str, torch.Tensor]:
    """A member's, by the definition."""
    found = {}
    for name, base in made.weights.base.items():
        number, values = definition.parameter_id(name), base.numpy()
        if values.ndim == 2:
            a, b = definition.factors(member.seed, number, values.shape, RANK)
            noise = a.T @ b / np.sqrt(RANK)
        else:
            noise = definition.normal(member.seed, number, 0, values.size)
        found[name] = torch.from_numpy(values + SIGMA * member.sign * noise.reshape(values.shape)).float()
    return found


@torch.inference_mode()
def answers_by_transformers(made: Replica, weights: dict[str, torch.Tensor]) -> tuple[list, list]:
    """Greedy answers with these weights, one after another: tokens, and logits at each place."""
    answers, logits = [], []
    with made.weights.lending(weights):
        for prompt in PROMPTS:
            ids, places = made.engine.text.encode(prompt), []
            length = len(ids)
            for _ in range(NEW):
                places.append(made.model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids = [*ids, int(places[-1].argmax())]
                if ids[-1] in made.engine.text.stops:
                    break
            answers.append(ids[length:])
            logits.append(torch.stack(places))
    return answers, logits


def ids_of(completions) -> list[list[list[int]]]:
    return [one.ids for one in completions]


def chances_in_vllm(made: Replica, count: int) -> list[list[dict[int, float]]]:
    """Of each member's answers: at each place, log-probabilities of some tokens."""
    prompts = [made.engine.text.encode(prompt) for prompt in PROMPTS]
    return [told.places for told in made.engine.tell(prompts, count, NEW, 20)]


def test_members_answer_as_their_own_weights_do(made):
    expected = [answers_by_transformers(made, own_weights(made, member))[0] for member in MEMBERS]
    assert len({str(answers) for answers in expected}) == len(MEMBERS)
    made.perturbation.set(MEMBERS, SIGMA)
    assert ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS))) == expected


def test_members_log_probabilities_are_those_of_their_own_weights(made):
    made.perturbation.set(MEMBERS, SIGMA)
    found = chances_in_vllm(made, len(MEMBERS))
    made.perturbation.clear()
    for number, member in enumerate(MEMBERS):
        for row in range(len(PROMPTS)):
            places = found[number * len(PROMPTS) + row]
            with made.weights.lending(own_weights(made, member)):
                ids = made.engine.text.encode(PROMPTS[row]) + [max(p, key=p.get) for p in places]
                logits = made.model(torch.tensor([ids]), use_cache=False).logits[0, -len(places) - 1 : -1]
            expected = torch.log_softmax(logits.float(), -1)
            for place, chances in enumerate(places):
                theirs = expected[place, list(chances)].tolist()
                assert theirs == pytest.approx(list(chances.values()), abs=1e-4)


def test_members_find_given_answers_as_likely_as_their_own_weights_do(made):
    """Of answers that none of them would give, and of the unperturbed model."""
    vocabulary = len(made.tokenizer)
    answers = [
        [(7 * row + 3 * place) % vocabulary for place in range(2 + row)] for row in range(len(PROMPTS))
    ]
    after = [0, 1, 2, 0, 3]
    asked = PROMPTS * len(MEMBERS), answers * len(MEMBERS)
    owners = [number for number in range(len(MEMBERS)) for _ in PROMPTS]
    made.perturbation.set(MEMBERS, SIGMA)
    found = made.engine.log_probabilities(*asked, members=owners, after=after * len(MEMBERS))
    made.perturbation.clear()
    plain = made.engine.log_probabilities(PROMPTS, answers, after=after)
    for number, weights in enumerate([*(own_weights(made, member) for member in MEMBERS), {}]):
        values = [*found, *plain][number * len(PROMPTS) :]
        for row, prompt in enumerate(PROMPTS):
            ids = made.engine.text.encode(prompt) + answers[row]
            with made.weights.lending(weights), torch.inference_mode():
                logits = made.model(torch.tensor([ids]), use_cache=False).logits[0]
            chances = torch.log_softmax(logits.float(), -1)
            first = len(ids) - len(answers[row]) + after[row]
            right = [float(chances[place - 1, ids[place]]) for place in range(first, len(ids))]
            assert values[row].tolist() == pytest.approx(right, abs=1e-4)


def test_answers_that_are_longer_than_there_is_room_for_are_refused(made):
    with pytest.raises(InputError, match=r"has \d+ tokens with its answer, but vLLM was started for up to"):
        made.engine.log_probabilities(["a"], [[3] * 500], members=[0])


def test_strong_perturbation_and_back_leaves_nothing(made):
    first = made.engine.generate(PROMPTS).ids
    made.perturbation.set(MEMBERS, 3.0)
    moved = ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS)))
    assert first not in moved
    made.perturbation.clear()
    assert made.engine.generate(PROMPTS).ids == first
    made.perturbation.set(MEMBERS, 0.0)
    assert ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS))) == [first] * len(MEMBERS)


def test_an_update_reaches_members_and_nobody(made):
    digest = made.weights.digest()
    made.perturbation.set(MEMBERS, SIGMA)
    made.weights.update(np.array([3], np.uint64), np.array([0.3], np.float32))
    assert made.weights.digest() != digest
    try:
        expected = [answers_by_transformers(made, own_weights(made, member))[0] for member in MEMBERS]
        made.perturbation.set(MEMBERS, SIGMA)
        assert ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS))) == expected
        made.perturbation.clear()
        assert made.engine.generate(PROMPTS).ids == answers_by_transformers(made, made.weights.base)[0]
    finally:
        made.weights.update(np.array([3], np.uint64), np.array([-0.3], np.float32))


def test_a_step_that_is_shown_reaches_nobody_and_not_the_base(made):
    """Vectors, too, which who is no member has of his own on GPUs."""
    first, digest = made.engine.generate(PROMPTS).ids, made.weights.digest()
    made.perturbation.set(MEMBERS, SIGMA)
    terms = np.array([3], np.uint64), np.array([0.3], np.float32)
    made.weights.show_updated(*terms)
    made.perturbation.rest()
    moved = {name: made.weights.updated(name, *terms) for name in made.weights.base}
    assert made.engine.generate(PROMPTS).ids == answers_by_transformers(made, moved)[0] != first
    for name, vectors in made.perturbation.vectors.items():
        assert torch.equal(vectors[-1], moved[name])
    made.perturbation.clear()
    assert made.engine.generate(PROMPTS).ids == first and made.weights.digest() == digest


def test_weights_are_packed_once_they_were_written(llama, monkeypatch):
    """By whatever way; a block of members does not write them."""
    packed, packing = [], llama.engine.packing
    plain = packing.pack
    monkeypatch.setattr(packing, "pack", lambda: (packed.append(1), plain()))
    llama.perturbation.set(MEMBERS, SIGMA)
    llama.engine.generate_block(PROMPTS, len(MEMBERS))
    packed.clear()
    llama.perturbation.set(MEMBERS[1:], SIGMA)
    llama.engine.generate_block(PROMPTS, 2)
    assert not packed
    for write in (
        lambda: llama.weights.update(np.array([3], np.uint64), np.array([0.0], np.float32)),
        lambda: llama.weights.perturb(3, 0.1),
        lambda: llama.weights.show(llama.weights.base.items()),
        lambda: llama.weights.show_updated(np.array([3], np.uint64), np.array([0.3], np.float32)),
        lambda: llama.weights.restore(*next(iter(llama.weights.base.items()))),
    ):
        write()
        llama.perturbation.clear()
        llama.engine.generate(PROMPTS)
        assert packed.pop() and not packed, "once for each"


def places_of(made: lowrank.BlocksInVllm) -> dict[str, list[int]]:
    found = {
        name: [place.a.data_ptr(), *(b.data_ptr() for b in place.b)] for name, place in made.matrices.items()
    }
    return found | {name: [place.data_ptr()] for name, place in made.vectors.items()}


def test_a_parameter_is_not_taken_for_its_neighbour_in_memory(llama):
    """Where parameters lie is the allocator's; a row of one, counted from another, may seem to be of that."""
    layers, weights = llama.perturbation.layers, llama.weights
    ordered = sorted([*layers.matrices, *layers.vectors], key=lambda one: (one.dim(), one.shape[-1]))
    sizes = [one.numel() for one in ordered]
    before = {one: one.data for one in ordered}
    moved, live = copy.copy(weights), dict(weights.live)
    try:
        for parameter, room in zip(ordered, torch.empty(sum(sizes)).split(sizes), strict=True):
            old, parameter.data = parameter.data, room.view_as(parameter).copy_(parameter.data)
            for name, view in weights.live.items():
                if old.data_ptr() <= view.data_ptr() < old.data_ptr() + old.nbytes:
                    place = (view.data_ptr() - old.data_ptr()) // view.itemsize
                    live[name] = room[place : place + view.numel()].view_as(view)
        moved.live = live
        assert all(live[name] is not weights.live[name] for name in live)
        assert places_of(lowrank.BlocksInVllm(moved, layers)) == places_of(llama.perturbation)
    finally:
        for parameter, old in before.items():
            parameter.data = old


def test_a_smaller_block_leaves_no_member_of_the_larger_one(llama):
    llama.perturbation.set(MEMBERS, SIGMA)
    whole = ids_of(llama.engine.generate_block(PROMPTS, 3))
    llama.perturbation.set(MEMBERS[2:], SIGMA)
    assert ids_of(llama.engine.generate_block(PROMPTS, 1)) == whole[2:]


def test_members_whose_answers_end_at_different_times(llama):
    """Some at a stop token, others at the limit: rows leave, and others take their places."""
    whole = [answers_by_transformers(llama, own_weights(llama, member))[0] for member in MEMBERS]
    plain = llama.engine.text.stops
    for stop in {token for answers in whole for ids in answers for token in ids[1:]}:
        cut = [[ids[: ids.index(stop) + 1] if stop in ids else ids for ids in answers] for answers in whole]
        lengths = [[len(ids) for ids in answers] for answers in cut]
        if len({str(row) for row in lengths}) == len(MEMBERS) and any(NEW in row for row in lengths):
            break
    else:
        pytest.fail("no token ends the members' answers at different times")
    llama.perturbation.set(MEMBERS, SIGMA)
    try:
        llama.engine.text.stops = plain | {stop}
        assert ids_of(llama.engine.generate_block(PROMPTS, len(MEMBERS))) == cut
    finally:
        llama.engine.text.stops = plain


def test_a_layer_given_other_rows_than_tokens_is_refused(llama):
    llama.perturbation.set(MEMBERS, SIGMA)
    (model,) = llama.engine.llm.collective_rpc(lambda worker: worker.get_model())
    with pytest.raises(InputError, match=r"given 3 rows, where a step has"):
        model.model.layers[0].mlp.gate_up_proj(torch.zeros(3, SHAPE["hidden_size"]))


def test_a_block_of_one_member_leaves_nobody_without_noise(world, tmp_path):
    """The test at the start has two members, however few a block has."""
    made = build(world, save(tmp_path / "model", "Llama"), "es.block=1")
    for place in made.perturbation.matrices.values():
        assert not place.a[-1].any() and len(place.a) == 3
    with pytest.raises(AssertionError, match="3 members"):
        made.perturbation.set(MEMBERS, SIGMA)
    made.perturbation.set(MEMBERS[1:2], SIGMA)
    expected = answers_by_transformers(made, own_weights(made, MEMBERS[1]))[0]
    assert ids_of(made.engine.generate_block(PROMPTS, 1)) == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 48},  # prompts in chunks, of several members in a step
        {"max_num_seqs": 2},  # most requests wait
    ],
    ids=lambda options: next(iter(options)),
)
def test_however_vllm_schedules(world, tmp_path, monkeypatch, options):
    """Chunks of prompts, requests that wait; steps that are prepared while another runs are for GPUs."""
    from vllm import LLM

    plain = LLM.__init__
    monkeypatch.setattr(
        LLM, "__init__", lambda self, *given, **named: plain(self, *given, **(named | options))
    )
    made = build(world, save(tmp_path / "model", "Llama"))
    ((option, value),) = options.items()
    assert getattr(made.engine.llm.llm_engine.vllm_config.scheduler_config, option) == value
    expected = [answers_by_transformers(made, own_weights(made, member))[0] for member in MEMBERS]
    made.perturbation.set(MEMBERS, SIGMA)
    assert ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS))) == expected


def test_requests_that_lose_their_cache_and_begin_again(world, tmp_path, monkeypatch):
    """A cache for some of the answers at once, which grow until there is no room for all."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    plain = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler,
        "_preempt_request",
        lambda self, request, *rest, **named: (
            preempted.append(request),
            plain(self, request, *rest, **named),
        )[1],
    )
    few = dataclasses.replace  # of the cache: two answers' worth of blocks, where seven run at once
    monkeypatch.setattr(
        Room, "bytes", lambda self, c, d, rows=None, plain=Room.bytes: plain(few(self, rows=2), c, d, rows)
    )
    prompts = ["2,4,6,8," * 15, "1,3,5,7," * 15, "9,8,7,6," * 15]  # 120 tokens: a block is 128
    made = build(world, save(tmp_path / "model", "Llama"), "engine.max_new_tokens=20")
    made.engine.text.stops = set()
    made.perturbation.set(MEMBERS, SIGMA)
    together = ids_of(made.engine.generate_block(prompts, len(MEMBERS)))
    assert preempted
    alone = []
    for member in MEMBERS:
        made.perturbation.set([member], SIGMA)
        alone.append([ids_of(made.engine.generate_block([prompt], 1))[0][0] for prompt in prompts])
    assert together == alone


@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma3Text", "StableLm"])
def test_by_torchs_operations_as_on_gpus(world, tmp_path, monkeypatch, architecture):
    """The fused products and norms are for CPUs."""
    monkeypatch.setattr(noise.lowrank_cpu, "knows", lambda tensor: False)
    made = build(world, save(tmp_path / "model", architecture))
    expected = [answers_by_transformers(made, own_weights(made, member))[0] for member in MEMBERS]
    made.perturbation.set(MEMBERS, SIGMA)
    assert ids_of(made.engine.generate_block(PROMPTS, len(MEMBERS))) == expected


@pytest.fixture(params=["float32", "bfloat16"])
def in_dtype(request) -> str:
    """In 16 bits rounding is as much as one kind of parameter's noise, unless it is strong and alone."""
    return f"model.dtype={request.param}"


def test_a_member_index_off_by_one_is_found_at_start(world, tmp_path, monkeypatch, in_dtype):
    plain = members.Members.assign
    monkeypatch.setattr(
        members.Members,
        "assign",
        lambda self, own, counts: plain(self, [(m + 1) % (self.nobody + 1) for m in own], counts),
    )
    with pytest.raises(InputError, match=r"lowrank in vLLM computes LlamaForCausalLM otherwise than its"):
        build(world, save(tmp_path / "model", "Llama"), in_dtype)


def spoil_sums(monkeypatch):
    """Noise of the last part of fused matrices is forgotten."""
    plain = lowrank._matrix
    monkeypatch.setattr(
        lowrank,
        "_matrix",
        lambda *given: (
            (found := plain(*given)) and dataclasses.replace(found, b=found.b[:-1] or found.b)
            if given[0].endswith("qkv_proj.weight")
            else plain(*given)
        ),
    )


def spoil_norms(monkeypatch):
    monkeypatch.setitem(norms.FUSED, next(iter(norms.FUSED)), True)


def spoil_rows(monkeypatch):
    """The output layer takes tokens' members for those of rows."""
    plain = layers.MemberEmbedding.apply

    def apply(self, layer, x, bias=None):
        rows = self.layers.members.rows
        rows.array[: rows.count] = rows.array[: rows.count][::-1].copy()
        return plain(self, layer, x, bias)

    monkeypatch.setattr(layers.MemberEmbedding, "apply", apply)


@pytest.mark.parametrize(
    "spoil, architecture", [(spoil_sums, "Phi3"), (spoil_norms, "Llama"), (spoil_rows, "Qwen2")]
)
def test_layers_that_compute_otherwise_are_found_at_start(
    world, tmp_path, monkeypatch, spoil, architecture, in_dtype
):
    spoil(monkeypatch)
    with pytest.raises(InputError, match=r"lowrank in vLLM computes \w+ otherwise than its (un)?perturbed"):
        build(world, save(tmp_path / "model", architecture), in_dtype)


def test_sixteen_bits_start_and_leave_nothing(world, tmp_path):
    """As in production: members move, and going back gives the first answers."""
    made = build(world, save(tmp_path / "model", "Qwen2"), "model.dtype=bfloat16")
    test_strong_perturbation_and_back_leaves_nothing(made)


@pytest.mark.parametrize(
    "architecture, changes, why",
    [
        (
            "GPT2",
            {"n_embd": 128, "n_layer": 2, "n_head": 4},
            r"does not know vLLM's Embedding at transformer",
        ),
        ("SmolLM3", {}, r"engine\.name: vllm has no smollm3 of its own|TPAwareRMSNorm"),
    ],
)
def test_models_with_other_layers_are_refused_by_name(world, tmp_path, architecture, changes, why):
    with pytest.raises(InputError, match=why):
        build(world, save(tmp_path / "model", architecture, **changes))


def test_batch_invariance_is_refused_on_cpus(world, tmp_path):
    """vLLM would take the setting, and do nothing."""
    with pytest.raises(InputError, match=r"^engine\.batch_invariant: vllm has no such kernels for cpus"):
        build(world, save(tmp_path / "model", "Llama"), "engine.batch_invariant=true")


def test_a_blocks_buffers_are_as_large_as_was_reckoned(made):
    """But for rows that pad a vocabulary."""
    matrices, vectors = made.perturbation.layers.matrices.values(), made.perturbation.layers.vectors.values()
    made_bytes = sum(one.a.nbytes + one.b.nbytes for one in matrices) + sum(one.nbytes for one in vectors)
    padding = sum(one.padding for one in matrices) * RANK * (len(MEMBERS) + 1) * torch.float32.itemsize
    assert made_bytes - padding == Noise(len(MEMBERS), RANK).bytes(made.weights.base, torch.float32)


def test_a_block_that_does_not_fit_is_refused_with_numbers():
    room = Room(8, 64)
    shape = transformers.LlamaConfig(**SHAPE, vocab_size=99)
    base = {"m": torch.zeros(100, 50), "v": torch.zeros(7)}
    noise = Noise(1000, 3).bytes(base, torch.bfloat16)
    assert noise == 1001 * (3 * 150 + 7) * 2
    with pytest.raises(InputError, match=r"the noise of a block 11 GB.* use a smaller es\.block"):
        cache_bytes(room, shape, torch.bfloat16, "cpu", 10**6, 2**33, 10**10 + 10**9)


def test_tolerances_are_far_from_both_sides(made, monkeypatch):
    """What the start's test found of this model: its own rounding, and what a perturbation changes."""
    seen = []
    monkeypatch.setattr(
        selftest, "rms", lambda values: seen.append(float(np.sqrt(np.mean(values**2)))) or seen[-1]
    )
    selftest.check_members(made.model, made.weights, made.perturbation, made.engine)
    members, least = selftest.TOLERANCES[torch.float32].members, selftest.LEAST
    for effect, unmoved, moved in zip(*[iter(seen)] * 3, strict=True):
        tolerated = max(members * effect, least)
        assert max(unmoved, moved) < tolerated / 10 and effect > 25 * tolerated
