"""One rank's replica: what is settled, what is loaded, and that ranks that differ are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import sys
import threading
from dataclasses import replace
from importlib.metadata import version

import games
import pytest
import small
import threads
import tiny
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpies
from mpies import config, replica
from mpies.engines.hf import HfEngine
from mpies.errors import InputError, RefusedError
from mpies.model import loading
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Full
from mpies.ranks.devices import Place
from mpies.ranks.memory import free_on_node
from mpies.replica import InitialUse, build, load, load_model, settle
from mpies.tasks.base import Task

HOSTS = ("alpha", "beta")


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield runs


def settings_of(runs: small.Runs, **changes) -> config.Settings:
    return config.load(runs.arguments(1, **changes))


def refusals(ranks: int, function) -> str:
    errors = threads.run(ranks, function, hosts=HOSTS)
    assert all(type(error) is RefusedError for error in errors), errors
    (text,) = {str(error) for error in errors}
    return text


# Settling


def test_what_is_settled_before_a_model_is_loaded(alone, runs):
    setup = settle(alone, settings_of(runs, model__path="./none", model__dtype="bfloat16", run__threads=1))
    assert setup.task.name == "custom" and setup.task.train == small.TRAIN
    assert (setup.device, setup.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert torch.get_num_threads() == 1
    (place,) = setup.places
    assert (place.device, place.gpu) == ("cpu", None)
    assert setup.memory == place.free == pytest.approx(free_on_node(), rel=0.2)


def test_a_task_that_is_given_is_the_task(alone, runs):
    task = Task("mine", [{"prompt": "a"}], [], lambda completions, **_: [3.0 for _ in completions])
    setup = settle(alone, settings_of(runs), task)
    assert setup.task.name == "mine" and setup.task.score(task.train, ["x"]).tolist() == [3]


def test_all_ranks_have_what_the_rank_with_least_can_have(alone, runs):
    """What depends on memory has to be alike."""
    places = [Place("n1", "cpu", None, 100), Place("n1", "cpu", None, 90), Place("n2", "cpu", None, 40)]
    setup = dataclasses.replace(settle(alone, settings_of(runs)), places=tuple(places))
    assert setup.memory == 40
    assert dataclasses.replace(setup, places=tuple(places[:2])).memory == 45


def test_software_that_computes_is_compared():
    found = replica.versions("hf")
    assert found["torch"] == version("torch") and found["mpies"] == mpies.__version__
    assert found["python"] == platform.python_version() == sys.version.split()[0]
    assert set(found) == {"mpies", "python", "torch", "transformers", "tokenizers", "numpy", "numba"}
    assert set(replica.versions("vllm")) == {*found, "vllm"}


def settle_both(runs: small.Runs, *changes: dict) -> str:
    """What is refused where ranks 0 and 1 have settings with these changes."""
    settings = [settings_of(runs, **change) for change in changes]
    return refusals(2, lambda comm: settle(comm, settings[comm.rank]))


def test_ranks_that_see_other_data_are_refused(runs):
    said = settle_both(runs, {}, {"task__eval_data": ""})
    assert said.startswith("software, devices or data differ between ranks: task.train_data is ")
    assert "rank 1 on beta" in said


def test_ranks_that_see_another_reward_function_are_refused(runs, tmp_path):
    files = [tmp_path / "a" / "rewards.py", tmp_path / "b" / "rewards.py"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"def reward(completions, **_):\n    return [{number}.0 for _ in completions]\n")
    said = settle_both(runs, *({"task__reward": f"{file}:reward"} for file in files))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert (
        f"differ between ranks: rewards.py:reward is '{digests[0]}' on rank 0" in said and digests[1] in said
    )


@pytest.mark.parametrize("key, values", [("model.dtype", ("float32", "bfloat16"))])
def test_ranks_that_would_compute_otherwise_are_refused(runs, key, values):
    said = settle_both(runs, *({key.replace(".", "__"): value} for value in values))
    assert said == (
        f"software, devices or data differ between ranks: {key} is '{values[0]}' on rank 0 on alpha"
        f" and '{values[1]}' on rank 1 on beta"
    )


def test_ranks_with_other_software_are_refused(runs, monkeypatch):
    own, others = replica.versions, iter([{}, {"numba": "0.1"}])
    monkeypatch.setattr(replica, "versions", lambda engine: own(engine) | next(others))
    said = settle_both(runs, {}, {})
    assert "differ between ranks: the version of numba is " in said and "'0.1'" in said


def test_what_a_rank_has_not_all_refuse(runs):
    said = settle_both(runs, {}, {"task__train_data": "none.jsonl"})
    assert said.startswith("rank 1 on beta: task.train_data: none.jsonl: there is no such file")


# Loading


@pytest.fixture
def loads(monkeypatch):
    """Whether each load of a model might have downloaded it. Threads take turns: transformers needs that."""
    load_really, lock, calls = loading.load, threading.Lock(), []

    def in_turns(path, allow_download, model_class=None):
        with lock:
            calls.append(allow_download)
            return load_really(path, allow_download, model_class)

    monkeypatch.setattr(loading, "load", in_turns)
    return calls


@pytest.mark.parametrize(
    "perturbation, kind, rank", [("full", Full, 0), ("lowrank", LowRank, 3)], ids=["full", "lowrank"]
)
def test_a_replica_is_made_as_the_settings_say(alone, runs, perturbation, kind, rank):
    changes = {"es__perturbation": perturbation, "es__rank": 3, "engine__batch_size": 7}
    made = build(alone, settings_of(runs, model__dtype="bfloat16", **changes))
    assert isinstance(made.perturbation, kind) and made.weights.rank == rank
    assert isinstance(made.engine, HfEngine)
    assert (made.engine.batch_size, made.engine.max_new_tokens) == (7, 4)
    assert made.engine.model is made.model and made.device == torch.device("cpu")
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.data_ptr() == made.weights.live[name].data_ptr(), "the engine computes with live"
        assert torch.equal(parameter, made.weights.base[name].bfloat16()), "which is unperturbed at first"
    assert made.anchor is None and made.initial is None
    made.synchronize()


@pytest.mark.parametrize("master, base", [("float32", "float32"), ("live", "bfloat16")])
def test_facts_of_a_replica(alone, runs, master, base):
    made = build(alone, settings_of(runs, model__dtype="bfloat16", model__master=master))
    facts = made.facts
    assert (facts.model_path, facts.model_name) == (str(runs.model), runs.model.name)
    assert facts.parameters == sum(p.numel() for p in made.model.parameters()) == made.weights.size
    assert facts.model_digest == made.weights.digest()
    assert (facts.dtype, facts.dtype_reason, facts.base_dtype) == ("bfloat16", "as set", base)
    assert {str(tensor.dtype) for tensor in made.weights.base.values()} == {f"torch.{base}"}


def test_the_digest_is_of_the_weights_as_they_were_loaded(alone, runs, tiny_model):
    one, other = (build(alone, settings_of(runs, model__path=tiny_model(seed=s))).facts for s in (0, 1))
    assert one.model_digest != other.model_digest
    assert one.model_digest == runs.build().facts.model_digest


@pytest.mark.parametrize(
    "changes, anchored, compared",
    [
        ({}, False, False),
        ({"es__anchor_decay": 0.1}, True, False),
        ({"run__kl_samples": 2}, False, True),
        ({"run__measure_drift": True}, False, True),
        ({"es__anchor_decay": 0.1, "run__measure_drift": True}, True, True),
    ],
)
def test_initial_weights_are_at_hand_where_they_are_needed(alone, runs, changes, anchored, compared):
    settings = settings_of(runs, **changes)
    use = InitialUse.of_training(settings)
    assert use == InitialUse(anchored, str(runs.model) if compared else None)
    made = build(alone, settings)
    assert (made.anchor is not None, made.initial is not None) == (anchored, compared)
    for name, value in made.initial.items(made.weights) if made.initial else ():
        assert torch.equal(value, made.weights.base[name])


def test_what_is_compared_with_may_be_another_model_of_its_kind(alone, runs, tiny_model):
    settings = settings_of(runs)
    setup = settle(alone, settings)
    made = load(alone, settings, setup, InitialUse(compared_with=str(tiny_model(seed=1))))
    other = dict(made.initial.items(made.weights))
    assert any(not torch.equal(value, made.weights.base[name]) for name, value in other.items())
    with pytest.raises(RefusedError, match="has other parameters"):
        load(alone, settings, setup, InitialUse(compared_with=str(tiny_model(kind="qwen2"))))


def test_ranks_that_load_other_weights_are_refused(runs, tiny_model, alone, loads):
    settings = [settings_of(runs, model__path=tiny_model(seed=seed)) for seed in (0, 1)]
    setup = settle(alone, settings[0])
    said = refusals(2, lambda comm: load(comm, settings[comm.rank], setup, InitialUse()))
    digests = [f"{build(alone, one).facts.model_digest:016x}" for one in settings]
    assert said == (
        f"model.path: the loaded models differ between ranks: digest is '{digests[0]}' on rank 0 on alpha"
        f" and '{digests[1]}' on rank 1 on beta"
    )


def test_ranks_that_go_from_turn_to_turn_in_different_ways_are_refused(runs, alone, loads):
    """Which members such a rank has is a matter of time, and their last bits would be."""
    own = {"task__name": "custom", "task__reward": {}, "task__train_data": "", "task__eval_data": ""}
    own |= {"task__environment": f"{games.__file__}:Echo", "task__train_size": 2}
    settings = settings_of(runs, **own)
    setup = settle(alone, settings)
    limits = replace(setup.task.environments.limits, turns=1)
    single = replace(setup.task, environments=replace(setup.task.environments, limits=limits))
    setups = [setup, replace(setup, task=single)]
    said = refusals(2, lambda comm: load(comm, settings, setups[comm.rank], InitialUse()))
    assert said.startswith(
        "model.path: the loaded models differ between ranks: keys and values from turn to turn is"
        " 'keys and values are kept from one to the next' on rank 0"
    )


def test_a_model_that_a_rank_cannot_load_is_refused_by_all(runs, alone, tmp_path, loads):
    settings = [settings_of(runs), settings_of(runs, model__path=tmp_path / "none")]
    setup = settle(alone, settings[0])
    said = refusals(2, lambda comm: load(comm, settings[comm.rank], setup, InitialUse()))
    assert said.startswith("rank 1 on beta: model.path: ") and "no such folder" in said


@pytest.mark.parametrize(
    "lengths, new, said",
    [
        ((100, 412), 100, None),
        (
            (100, 413),
            100,
            "training prompt 2 has 413 tokens and its answer up to 100, but the model knows 512"
            " positions; use an engine.max_new_tokens of 99 or less, or leave the row out",
        ),
        (
            (512,),
            1,
            "training prompt 1 has 512 tokens and its answer up to 1, but the model knows 512"
            " positions; leave the row out",
        ),
    ],
)
def test_prompts_that_leave_no_room_for_an_answer_are_refused(alone, runs, tmp_path, lengths, new, said):
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"prompt": "a" * n}) for n in lengths))
    changes = {"task__train_data": tmp_path / "long.jsonl", "task__chat_template": False}
    changes |= {"engine__max_new_tokens": new}
    if said is None:
        assert runs.build(**changes)
        return
    with pytest.raises(RefusedError) as error:
        runs.build(**changes)
    assert str(error.value) == f"task.train_data: {said}"


def test_a_held_out_prompt_that_is_too_long_is_named(alone, runs, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 600}))
    with pytest.raises(RefusedError, match=r"^task.eval_data: held-out prompt 1 has 600 tokens"):
        runs.build(task__eval_data=tmp_path / "long.jsonl", task__chat_template=False)


TEMPLATES = {
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError: "),
    "name": ("{{ messages[0].nothing.at_all }}", "UndefinedError: "),
    "refuses": ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
    "type": ("{{ messages + 1 }}", "TypeError: "),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_is_broken_is_refused_before_anything_is_written(runs, tmp_path, kind):
    template, words = TEMPLATES[kind]
    model = shutil.copytree(runs.model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(RefusedError) as error:
        runs.train(1, model__path=model)
    (line,) = str(error.value).splitlines()
    assert (
        line.startswith("task.chat_template: this model's template cannot write the prompt '3 + 5 ='")
        and words in line
    )
    assert not runs.folder.exists()
    assert runs.train(1, model__path=model, task__chat_template=False) == 0


def test_chat_messages_need_a_template(alone, runs, tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "a"}]}]
    task = Task("mine", chat, [], lambda completions, **_: [0.0])
    assert build(alone, settings_of(runs), task).task.train == chat
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in runs.model.iterdir():
        if "chat_template" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RefusedError, match=r"^task\.train_data: its prompts are chat messages"):
        build(alone, settings_of(runs, model__path=bare, task__chat_template=False), task)


@pytest.mark.parametrize("allowed, downloads", [(True, 2), (False, 0)])
def test_one_rank_of_a_node_downloads_and_then_all_load(runs, alone, loads, allowed, downloads):
    settings = settings_of(runs, model__allow_download=allowed)
    setup = settle(alone, settings)
    found = threads.run(3, lambda c: load(c, settings, setup, InitialUse()), hosts=("alpha", "alpha", "beta"))
    assert len({made.facts.model_digest for made in found}) == 1
    assert loads == [allowed] * (downloads + 3)


def test_a_model_without_a_job(runs):
    """As replay has it."""
    given = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "master": torch.float32}
    made = load_model(str(runs.model), **given, rank=2, threads=1)
    assert made.weights.rank == 2 and made.weights.digest() == runs.build().weights.digest()
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert made.tokenizer("ab")["input_ids"]


def test_prompts_that_would_depend_on_one_another_are_refused_before_any_is_answered(alone, runs, tmp_path):
    """Beyond what the model was trained on at first, its positions depend on the longest row of a batch."""
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    longest = max(len(row["prompt"]) for row in [*small.TRAIN, *small.HELD_OUT])
    first = longest + 4
    model = zoo.build("phi3", rope_parameters=long, original_max_position_embeddings=first)
    for part in (model, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "phi3")
    changes = {"model__path": tmp_path / "phi3", "task__chat_template": False}
    fits = settings_of(runs, engine__max_new_tokens=4, **changes)
    load(alone, fits, settle(alone, fits), InitialUse())
    beyond = settings_of(runs, engine__max_new_tokens=5, **changes)
    setup = settle(alone, beyond)
    with pytest.raises(RefusedError, match=f"may have {first + 1} tokens, but beyond {first} what Phi3"):
        load(alone, beyond, setup, InitialUse())


def test_a_model_that_cannot_be_computed_with_is_refused_without_a_job(tiny_model, tmp_path):
    """As by a job: what is exported of it would be infinite."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.get_parameter("model.norm.weight").data[0] = 7e4
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    options = {"device": torch.device("cpu"), "master": torch.float32, "rank": 0, "threads": 1}
    load_model(str(tmp_path), dtype=torch.float32, **options)
    with pytest.raises(InputError) as refused:
        load_model(str(tmp_path), dtype=torch.float16, **options)
    assert str(refused.value) == (
        f"model.path: {tmp_path}: model.norm.weight has values up to 7e+04, and float16 ends at 6.55e+04"
    )
