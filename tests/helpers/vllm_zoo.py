"""The zoo's architectures in vLLM: each is started in a process of its own, and compared with what is right.

    PYTHONPATH=tests/helpers python tests/helpers/vllm_zoo.py [NAME ...]

prints lines of JSON: versions; then for each its name, whether noise is of low rank, what it came to. Low
rank is tried where full noise is computed. For the whole zoo: `make models-vllm`. vLLM on CPUs wants larger
shapes than those of zoo.py.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
import zoo
from transformers import AutoConfig

from mpies import config, replica
from mpies.engines import vllm
from mpies.engines.vllm.engine import Told
from mpies.engines.vllm.environment import set_environment
from mpies.engines.vllm.selftest import LogProbabilities
from mpies.errors import InputError
from mpies.replica import Replica
from mpies.tasks.base import Task

# Of what an architecture has of these, in place of its own. Attention is for heads of 32 numbers at least,
# and experts' matrices have a multiple of 32.
LARGER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_d_ssm": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 32,
}
# What transformers' configuration lacks, and checkpoints have. And a window that no prompt reaches beyond:
# vLLM sees a token more.
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True},
    "cohere2": {"sliding_window": 512},
    "lfm2": {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128},
    "zamba2": {"head_dim": 64},
}

# Longer than windows; they end at different times.
PROMPTS = ["Solve: 3 + 5 =", "a", "2,4,6,8," * 20, "zz", "Name a color:"]
NEW, ROWS, SIGMA = 10, 7, 0.05
LIKELIEST = 20  # tokens
CLOSE = 1e-3  # of log-probabilities, nat
SECONDS = 600


def sizes(name: str) -> dict[str, Any]:
    """What an architecture's configuration has otherwise here.

    vLLM reads of config.json what transformers' class of the model ignores (a Llama's `sliding_window`): it
    gets none of that.
    """
    own = zoo.SIZES | zoo.ARCHITECTURES[name]
    plain = AutoConfig.for_model(zoo.kind_of(name))
    plain.allow_global_per_layer_attribute_access = True  # only to see which there are
    changes = {key: value for key, value in LARGER.items() if own.get(key) is not None}
    changes |= {key: None for key in own if not hasattr(plain, key)}
    if "text_config" in own:
        changes["text_config"] = own["text_config"] | {k: v for k, v in LARGER.items() if k in zoo.SIZES}
    return changes | OWN.get(name, {})


def save(name: str, folder: Path) -> Path:
    """A folder with a tiny random model."""
    zoo.build(name, **sizes(name)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def build(folder: Path, lowrank: bool) -> Replica:
    """As training builds it, in float32."""
    from mpi4py import MPI

    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.name=conciseness", "task.chat_template=false", "engine.name=vllm"]
    given += [f"engine.max_new_tokens={NEW}", f"engine.batch_size={ROWS}"]
    given += ["es.perturbation=lowrank", "es.block=3", "es.population=6"] if lowrank else []
    given += [] if lowrank else ["es.perturbation=full"]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    return replica.build(MPI.COMM_WORLD, config.load(given), task)


def outcome(name: str, lowrank: bool) -> str:
    """'yes', 'no: ' and the refusal, or WRONG: what differs."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            made = build(save(name, Path(directory)), lowrank)
        except InputError as error:
            return f"no: {error}"
        return next((f"WRONG: {said}" for said in compared(made, lowrank) if said), "yes")


def compared(made: Replica, lowrank: bool) -> Iterator[str]:
    """What is wrong with members' greedy answers and log-probabilities; '' for each that is right.

    By transformers, with members' own weights.
    """
    prompts, plain = [made.engine.text.encode(prompt) for prompt in PROMPTS], LogProbabilities(made.model)
    if lowrank:
        made.perturbation.set(zoo.MEMBERS, SIGMA)
        told = made.engine.tell(prompts, len(zoo.MEMBERS), NEW, LIKELIEST)
        made.perturbation.clear()
        for number, member in enumerate(zoo.MEMBERS):
            mine = told[number * len(prompts) :][: len(prompts)]
            with made.weights.lending(dict(zoo.materialised(made.weights, member, SIGMA))):
                right = LogProbabilities(made.model).of(mine)
            yield difference(mine, right, plain.of(mine))
        return
    for seed in (1, 2):
        made.weights.perturb(seed, SIGMA)
        mine = made.engine.tell(prompts, 1, NEW, LIKELIEST)
        right = LogProbabilities(made.model).of(mine)
        made.weights.show_base()
        yield difference(mine, right, plain.of(mine))


def difference(told: list[Told], right: np.ndarray, unperturbed: np.ndarray) -> str:
    """What a member is told to answer, against what is right; '' if it is that, and is seen to be."""
    found = np.array([value for one in told for place in one.places for value in place.values()])
    if not np.allclose(found, right, atol=CLOSE, rtol=CLOSE):
        return f"log-probabilities are {np.abs(found - right).max():.2g} apart"
    if np.abs(right - unperturbed).max() < 100 * CLOSE:
        return "the perturbation is not seen"
    answers = [token for one in told for token in one.answer]
    likeliest = [max(place, key=place.get) for one in told for place in one.places]
    return "" if answers == likeliest else "answers are not greedy"


def tried(name: str, lowrank: bool) -> str:
    """`outcome`, in a process of its own: one that crashes or hangs is CRASH."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                said = outcome(name, lowrank)
            except BaseException as error:
                traceback.print_exc()
                said = f"CRASH: {type(error).__name__}: {error}"
            with os.fdopen(writing, "w") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(writing)
    timer = threading.Timer(SECONDS, os.killpg, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    return said or f"CRASH: status {status}"


def main(given: list[str]) -> None:
    torch.set_num_threads(1)
    set_environment(0)
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda inspect: inspect()  # else each model's class, in a Python of its own
    for module in ("vllm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3_moe"):
        importlib.import_module(module)  # once for all that are tried
    versions = {"vLLM": str(vllm.version()), "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    for name in given or [name for name in zoo.ARCHITECTURES if name not in zoo.missing()]:
        for lowrank in (False, True):
            said = tried(name, lowrank)
            print(json.dumps([name, lowrank, said]), flush=True)
            if said != "yes":
                break  # the same would stand in the way of low rank, or another layer


if __name__ == "__main__":
    main(sys.argv[1:])
