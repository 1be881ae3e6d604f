"""One rank's replica: its device, task, model, weights, engine; and that all ranks' replicas are alike.

Every command that computes with a model begins with `settle`, which finds out what is cheap to know, and
`load`, which makes the replica. The ranks agree once in each.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mpies
from mpies import config
from mpies.config import Settings
from mpies.engines import selftest, turns, vllm
from mpies.engines.base import Engine, Prompt
from mpies.engines.image import images_in
from mpies.engines.membertest import MEMBERS
from mpies.engines.text import Text
from mpies.engines.unused import find_left_out, leaves_out
from mpies.engines.vision import Vision
from mpies.errors import InputError
from mpies.model import initial, linear_cpu, loading, perturbation
from mpies.model.anchor import Anchor
from mpies.model.initial import InitialWeights
from mpies.model.output_layer import close_gaps
from mpies.model.perturbation import Perturbation
from mpies.model.processor import load_processor
from mpies.model.weights import Weights, room_for, take_base, take_over
from mpies.noise import kernels_for
from mpies.ranks.agreement import Brought, agree, together
from mpies.ranks.devices import Place, device_for, local_rank, place_of, shares
from mpies.ranks.gpu import make_ready
from mpies.ranks.watchdog import watched
from mpies.tasks import expected, fitting, making, rewards, users_code
from mpies.tasks.base import Task

if TYPE_CHECKING:
    from mpi4py.MPI import Comm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mpies.engines.vllm.host import Host
    from mpies.runfile import History

# Software that takes part in the arithmetic: it has to be the same on every rank.
SOFTWARE = ("torch", "transformers", "tokenizers", "numpy", "numba")


@dataclass(frozen=True)
class Setup:
    """What is settled before the model is loaded: what to do, and where."""

    task: Task
    device: torch.device
    dtype: torch.dtype
    """Of the live weights."""
    dtype_reason: str
    versions: dict[str, str]
    """Of the software that computes."""
    reward_digests: dict[str, str]
    """SHA-256 of the files with the user's reward functions, by the functions' names."""
    places: tuple[Place, ...] = ()
    """Of all ranks."""
    left_out: tuple[str, ...] | None = None
    """Modules that are not tuned, where a run file says so; None: as es.leave_out says."""
    model_class: str | None = None
    """transformers' class of the model, where a run file says so: see `loading.load`."""

    def of_run(self, history: History) -> Setup:
        """The same, for going on with a run: what is tuned of which model stays."""
        return replace(self, left_out=history.left_out, model_class=history.model_class)

    @property
    def memory(self) -> int:
        """Bytes that every rank can have, as on the rank that has least: what depends on it is alike."""
        return min(shares(self.places))

    def leaves_out(self, settings: Settings) -> tuple[str, ...]:
        """What is not tuned, as es.leave_out has it: the run file's, or the setting's. Raises InputError."""
        return leaves_out(settings, self.task.has_images) if self.left_out is None else self.left_out


@dataclass(frozen=True)
class InitialUse:
    """What the initial weights are needed for once the base has moved."""

    anchored: bool = False
    """The base is pulled to them."""
    compared_with: str | None = None
    """The path of those that evaluations compare with, if they do."""

    @classmethod
    def of_training(cls, settings: Settings) -> InitialUse:
        compared = settings.run.kl_samples or settings.run.measure_drift
        return cls(settings.es.anchor_decay > 0, settings.model.path if compared else None)


@dataclass(frozen=True)
class Facts:
    """What is known of a replica, for the banner and the run file; the same on all ranks."""

    model_path: str
    model_name: str
    parameters: int
    model_digest: int
    """Of the weights as they were loaded."""
    dtype: str
    dtype_reason: str
    base_dtype: str
    engine: str = ""
    """What is to be known of it, in words."""
    turns: str = ""
    """What is done with keys and values from turn to turn, in words, where episodes have several."""
    left_out: tuple[str, ...] = ()
    """Modules whose parameters are not tuned."""
    model_class: str = ""
    """transformers' name for it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model whose parameters are live weights over a base, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights


@dataclass(frozen=True)
class Replica(LoadedModel):
    task: Task
    perturbation: Perturbation
    engine: Engine
    device: torch.device
    facts: Facts
    anchor: Anchor | None
    """What the base decays to, if it does."""
    initial: InitialWeights | None
    """Where to read the initial weights from, if they are compared with."""

    def synchronize(self) -> None:
        """Wait for the device's queued work."""
        synchronize(self.device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; nothing is queued on a CPU."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def settle(comm: Comm, settings: Settings, task: Task | None = None) -> Setup:
    """Device, dtype, task (unless it is given) on every rank. Collective; the ranks agree once.

    Raises RefusedError when a rank has not what the settings name, or when software, devices, dtypes, data
    or reward functions differ.
    """
    setup, places = agree(comm, "software, devices or data", _settle, comm, settings, task)
    return replace(setup, places=tuple(places))


def load(comm: Comm, settings: Settings, setup: Setup, use: InitialUse) -> Replica:
    """The replica. Collective; the ranks agree once, on the digest of what they have loaded.

    Raises RefusedError when a rank cannot load the model, its engine or the initial weights, or when the
    ranks' weights differ.
    """
    if settings.model.allow_download:  # by one rank of a node; the others use it
        download = loading.load if local_rank(comm) == 0 else lambda *_: None
        together(comm, download, settings.model.path, True, timeout=float("inf"))

    def make() -> Brought[Replica]:
        made = _make(settings, setup, local_rank(comm), use)
        digest = f"{made.facts.model_digest:016x}"
        # A rank that reads turns anew computes other last bits, and which members it has is a matter of time.
        return Brought(made, {"digest": digest, "keys and values from turn to turn": made.facts.turns})

    made, _ = agree(comm, "model.path: the loaded models", make)
    return made


def build(comm: Comm, settings: Settings, task: Task | None = None) -> Replica:
    """`settle` and `load` as training does, with nothing in between."""
    return load(comm, settings, settle(comm, settings, task), InitialUse.of_training(settings))


def load_model(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    master: torch.dtype,
    rank: int,
    threads: int,
    left_out: tuple[str, ...] = (),
    model_class: str | None = None,
) -> LoadedModel:
    """A model with live weights of `dtype` over a base of `master`; noise of matrices of rank `rank`.

    `left_out`: modules that are not tuned. `model_class`: as `loading.load` has it. Raises InputError when
    the model cannot be loaded, or not computed with.
    """
    model, tokenizer = loading.load(path, False, model_class)
    weights = take_over(model, dtype, device, kernels_for(device, threads), rank, master)
    _refuse_unfit(path, weights)
    weights.leave_out(left_out)
    return LoadedModel(model, tokenizer, weights)


def versions(engine: str) -> dict[str, str]:
    """The versions of the software that computes."""
    others = {name: version(name) for name in SOFTWARE}
    if engine == "vllm":
        others["vllm"] = vllm.version() or "none"
    return {"mpies": mpies.__version__, "python": platform.python_version(), **others}


def _settle(comm: Comm, settings: Settings, task: Task | None) -> Brought[Setup]:
    if settings.engine.name == "vllm":
        vllm.refuse_unsupported()
    torch.set_num_threads(settings.run.threads)
    device = device_for(comm, settings.model.device)
    make_ready(device)
    if settings.engine.batch_invariant:
        vllm.refuse_without_invariance(device)
    dtype, why = loading.choose_dtype(settings.model.dtype, device)
    # A call of the user's code lasts no longer than the ranks are set to wait for one another.
    load_rewards = watched(comm, rewards.load, "task.reward: the import of its functions", InputError)
    load_expects = watched(comm, expected.load, "task.expects: the import of its function", InputError)
    task = task or making.make(settings.task, settings.es.seed, load_rewards, load_expects)
    task = replace(task, reward=watched(comm, task.reward, f"the reward function of task {task.name}"))
    if task.expects:
        task = replace(task, expects=watched(comm, task.expects, "the function of task.expects"))
    software, functions = versions(settings.engine.name), users_code.digests(settings.task.code)
    if task.has_images:
        software["pillow"] = version("pillow")
    same = {
        **{f"the version of {name}": number for name, number in software.items()},
        # A rank that fell back to its CPU would answer differently.
        "model.device": device.type,
        "model.dtype": str(dtype).removeprefix("torch."),
        "task.train_data": task.digest,
        "task.environment: how its first episodes begin": repr(_openings(task, settings)),
        **{config.short_name(name): digest for name, digest in functions.items()},
    }
    return Brought(Setup(task, device, dtype, why, software, functions), same, place_of(device))


def _openings(task: Task, settings: Settings) -> list[Prompt]:
    """Of the episodes that were begun at the start, where all ranks have to see the same."""
    return task.environments.openings if task.environments and not settings.task.services else []


def _make(settings: Settings, setup: Setup, local: int, use: InitialUse) -> Replica:
    """Load and assemble everything on this rank. Raises InputError."""
    path, device, dtype = settings.model.path, setup.device, setup.dtype
    model, tokenizer = loading.load(path, settings.model.allow_download, setup.model_class)
    fitting.refuse_messages_without_template(setup.task, tokenizer)
    text = Text(
        model, tokenizer, settings.task.chat_template, _vision(settings, setup.task, model, tokenizer)
    )
    new = settings.engine.max_new_tokens
    fitting.refuse_prompts_of_wrong_length(setup.task, text, new)
    host = _host(settings, setup, model, text, local) if settings.engine.name == "vllm" else None
    master = loading.base_dtype(settings.model.master, dtype)
    kernels = kernels_for(device, settings.run.threads)
    base = take_base(model, device, master, settings.model.base)
    live = host.hold(model, base) if host else room_for(base, dtype, device)
    weights = (host.weigh if host else Weights)(model, base, live, kernels, settings.es.noise_rank)
    _refuse_unfit(path, weights)
    if device.type == "cpu":
        linear_cpu.install(model)
    close_gaps(model)
    digest = weights.digest()
    left_out = find_left_out(setup.leaves_out(settings), model, weights)
    weights.leave_out(left_out)
    blocks = host.perturb_in_blocks(weights) if host and host.noise else None
    perturbed: Perturbation = blocks or perturbation.make(settings.es, model, weights)
    engine = _engine(settings, setup.task, model, text, weights, perturbed, host)
    images, reads = two_with_images(setup.task.prompts, text.encode), setup.task.expects is not None
    selftest.check(model, weights, perturbed, engine, images, reads)
    if host:
        from mpies.engines.vllm.selftest import check_vllm

        check_vllm(model, weights, blocks, engine, reads)
    facts = _facts_of(path, setup, weights, digest, master, host)
    return Replica(
        model=model,
        tokenizer=tokenizer,
        weights=weights,
        task=setup.task,
        perturbation=perturbed,
        engine=engine,
        device=device,
        facts=replace(
            facts,
            left_out=left_out,
            turns=turns.tell(engine) if setup.task.has_turns else "",
            model_class=type(model).__name__,
        ),
        anchor=Anchor(path, weights, digest) if use.anchored else None,
        initial=_initial(path, model, weights, digest, use.compared_with),
    )


def _vision(settings: Settings, task: Task, model: Any, tokenizer: Any) -> Vision | None:
    """What makes pixels of prompts' images; None if the task has none. Raises InputError if it cannot."""
    if not task.has_images:
        return None
    if settings.engine.name == "vllm":
        raise InputError("engine.name: vllm is given no images; use engine.name=hf")
    return Vision(model, load_processor(settings.model.path, model, tokenizer))


def two_with_images(prompts: Iterable[Prompt], encode: Callable[[Prompt], list[int]]) -> list[Prompt]:
    """Two prompts with images, of different lengths if there are such; none without images."""
    shown = [prompt for prompt in prompts if images_in(prompt)]
    if not shown:
        return []
    first = len(encode(shown[0]))
    return [shown[0], next((prompt for prompt in shown if len(encode(prompt)) != first), shown[-1])]


def _refuse_unfit(path: str, weights: Weights) -> None:
    """Raise InputError if the weights that were loaded cannot be computed with."""
    unfit = weights.find_unfit()
    if unfit:
        raise InputError(f"model.path: {path}: {unfit}")


def _facts_of(
    path: str, setup: Setup, weights: Weights, digest: int, master: torch.dtype, host: Host | None
) -> Facts:
    return Facts(
        model_path=path,
        model_name=Path(loading.locate(path)).name,
        parameters=weights.size,
        model_digest=digest,
        dtype=str(setup.dtype).removeprefix("torch."),
        dtype_reason=setup.dtype_reason,
        base_dtype=str(master).removeprefix("torch."),
        engine=host.tell_room() if host else "",
    )


def _initial(
    path: str, model: PreTrainedModel, weights: Weights, digest: int, compared_with: str | None
) -> InitialWeights | None:
    """The weights at `compared_with`: if that is the model's own path, those with its digest."""
    if not compared_with:
        return None
    known = digest if compared_with == path else None
    return initial.find_initial(compared_with, weights, known, type(model).__name__)


def _host(settings: Settings, setup: Setup, model: Any, text: Text, local: int) -> Host:
    """The vLLM whose memory the live weights will be in."""
    from mpies.engines.vllm.host import Host, Noise, Room

    es = settings.es
    members = max(es.block_size, len(MEMBERS))  # those of the test at the start, at least
    noise = Noise(members, es.rank) if es.perturbation == "lowrank" else None
    new, tells = settings.engine.max_new_tokens, setup.task.expects is not None
    room = Room.of(text, setup.task.prompts, settings.engine.batch_size, new, tells)
    room = replace(room, tokens=max(room.tokens, setup.task.most_tokens(text) or 0))
    folder = loading.folder_of(settings.model.path)
    given = folder, model.config, room, setup.dtype, setup.device, setup.memory, local, noise
    return Host(*given, invariant=settings.engine.batch_invariant, turns=setup.task.has_turns)


def _engine(
    settings: Settings,
    task: Task,
    model: Any,
    text: Text,
    weights: Weights,
    perturbed: Perturbation,
    host: Host | None,
) -> Engine:
    from mpies.engines.hf import HfEngine

    limit = settings.engine.max_new_tokens
    # Beside vLLM, it reads the answers that KL divergence is estimated on.
    rows = min(settings.engine.batch_size, host.rows_besides) if host else settings.engine.batch_size
    options: dict[str, Any] = {"max_new_tokens": limit, "batch_size": rows, "on_rows": perturbed.rows}
    version = (lambda: weights.version) if task.has_turns and host is None else None
    engine = HfEngine(model, text, **options, version=version)
    if host is None:
        engine.refuse_dependent(task.prompts, task.most_tokens(text))
        return engine
    from mpies.engines.vllm.engine import VllmEngine

    return VllmEngine(host, text, engine, max_new_tokens=limit)
