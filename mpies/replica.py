"""A rank's replica of the model: device, weights, engine; and that all ranks' replicas are alike."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mpies
from mpies import tasks
from mpies.config import Settings
from mpies.engines import selftest, vllm
from mpies.engines.base import Engine
from mpies.engines.text import Text
from mpies.errors import RefusedError
from mpies.model import linear_cpu, loading, perturbation
from mpies.model.perturbation import Perturbation
from mpies.model.weights import Weights, room_for, take_base
from mpies.noise import kernels_for
from mpies.ranks import collectives, devices
from mpies.ranks.memory import available
from mpies.tasks.base import Task

if TYPE_CHECKING:
    from mpi4py.MPI import Comm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mpies.engines.vllm.host import Host

# Software that takes part in the arithmetic: it has to be the same on every rank.
SOFTWARE = ("torch", "transformers", "tokenizers", "numpy", "numba")


@dataclass
class Replica:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    perturbation: Perturbation
    engine: Engine
    device: torch.device
    facts: dict[str, Any]
    """For the banner and the run file: names, sizes, digest, dtype and why."""

    def synchronize(self) -> None:
        """Wait for the device's queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def versions(engine: str) -> dict[str, str]:
    """The versions of the software that computes."""
    others = {name: version(name) for name in SOFTWARE}
    if engine == "vllm":
        others["vllm"] = vllm.version() or "none"
    return {"mpies": mpies.__version__, "python": platform.python_version(), **others}


def build(comm: Comm, settings: Settings, task: Task | None = None) -> Replica:
    """Load the model on every rank and check that the ranks agree. Collective.

    `task`: what it is to answer. Raises RefusedError when a rank cannot load the model, or when software,
    dtype or weights differ.
    """
    if settings.engine.name == "vllm":
        collectives.together(comm, vllm.refuse_unsupported)
    collectives.require_equal(comm, versions(settings.engine.name), "software versions")
    torch.set_num_threads(settings.run.threads)
    device = collectives.together(comm, devices.device_for, comm, settings.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A rank that fell back to its CPU would answer differently.
    collectives.require_equal(comm, {"device": device.type}, "devices")
    dtype, reason = loading.choose_dtype(settings.model.dtype, device)
    collectives.require_equal(comm, {"dtype": str(dtype)}, "live weights")
    model, tokenizer = _load(comm, settings)
    if task:
        collectives.together(comm, tasks.refuse_messages_without_template, task, tokenizer)
    text = collectives.together(comm, Text, model, tokenizer, settings.task.chat_template)
    host = _host(comm, settings, model, text, task, device, dtype)
    kernels = kernels_for(device, settings.run.threads)
    master = loading.base_dtype(settings.model.master, dtype)
    base = collectives.together(comm, take_base, model, device, master)
    live = collectives.together(comm, host.hold, base) if host else room_for(base, dtype)
    weights = collectives.together(comm, Weights, model, base, live, kernels, settings.es.noise_rank)
    if device.type == "cpu":
        linear_cpu.install(model)
    digest = weights.digest()
    _refuse_diverged(comm, digest)
    perturbed = collectives.together(comm, perturbation.make, settings.es, model, weights)
    engine = collectives.together(comm, _engine, settings, model, text, perturbed, host)
    collectives.together(comm, selftest.check, model, weights, perturbed, engine)
    facts = {
        "model_path": settings.model.path,
        "model_name": Path(loading.locate(settings.model.path)).name,
        "parameters": weights.size,
        "model_digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "base_dtype": str(master).removeprefix("torch."),
    }
    return Replica(model, tokenizer, weights, perturbed, engine, device, facts)


def place(device: torch.device) -> dict[str, Any]:
    """Where this rank runs, for the banner and the run file."""
    name = str(device)
    if device.type == "cuda":
        name = f"{device} {torch.cuda.get_device_name(device)}"
    return {"host": collectives.host(), "device": name}


def _load(comm: Comm, settings: Settings):
    """The model and its tokenizer; a download is made by one rank per node, the others use it."""
    arguments = (settings.model.path, settings.model.allow_download)
    if settings.model.allow_download:
        first, _ = devices.local_rank(comm)
        download = loading.load if first == 0 else lambda *_: None
        collectives.together(comm, download, *arguments, timeout=float("inf"))
    return collectives.together(comm, loading.load, *arguments)


def _host(comm: Comm, settings: Settings, model, text: Text, task: Task | None, device, dtype) -> Host | None:
    """Where the live weights will be, if that is not in memory of their own. Collective."""
    if settings.engine.name != "vllm":
        return None
    from mpies.engines.vllm.host import Host, Room

    prompts = task.prompts if task else ()
    room = Room.of(text, prompts, settings.engine.batch_size, settings.engine.max_new_tokens)
    folder = collectives.together(comm, loading.folder_of, settings.model.path)
    free, (local, _) = available(comm, device), devices.local_rank(comm)
    return collectives.together(comm, Host, folder, model.config, room, dtype, device, free, local)


def _engine(settings: Settings, model, text: Text, perturbation: Perturbation, host: Host | None) -> Engine:
    from mpies.engines.hf import HfEngine

    limit = settings.engine.max_new_tokens
    # Beside vLLM, it reads the answers that KL divergence is estimated on.
    rows = min(settings.engine.batch_size, host.rows_besides) if host else settings.engine.batch_size
    engine = HfEngine(model, text, max_new_tokens=limit, batch_size=rows, on_rows=perturbation.rows)
    if host is None:
        return engine
    from mpies.engines.vllm.engine import VllmEngine

    return VllmEngine(host, text, engine, max_new_tokens=limit)


def _refuse_diverged(comm: Comm, digest: int) -> None:
    differing = collectives.diverged(collectives.allgather_objects(comm, digest))
    if differing:
        raise RefusedError(
            f"model.path: ranks {differing} loaded other weights than the rest;"
            " is the same model on every node?"
        )
