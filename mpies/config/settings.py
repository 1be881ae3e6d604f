"""Every setting with its meaning, unit, default and check.

Paper: arXiv 2509.24372; its values are the defaults where it has one.
"""

from __future__ import annotations

import io
import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from mpies import plain_yaml, time_limit
from mpies.config.section import Role, Section
from mpies.errors import InputError

MOST_THREADS = 4096  # OpenMP ends the process where it cannot have them
MOST = 10**7  # members, generations, prompts: every rank lists them, and the run file has a row for each


class ModelSettings(Section):
    """The language model that is tuned."""

    # A model is its weights, wherever they lie: their digest is compared. Of the dtype, it is compared what
    # it comes to; see resume.py.
    path: Annotated[str, Role.JOB] = Field(
        description="folder or hub id of a causal language model (safetensors), or 'quickstart'"
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Role.JOB] = Field(
        "auto",
        description="dtype of the live weights that the engine computes with; auto: bfloat16 where the device"
        " has fast bfloat16, else float32",
    )
    master: Literal["float32", "live"] = Field(
        "float32",
        description="dtype of the base weights that are updated; live: that of the live weights. In bfloat16"
        " they take 2 bytes a parameter instead of 4; updates are rounded at random, exactly repeatable",
    )
    base: Annotated[Literal["device", "host"], Role.JOB] = Field(
        "device",
        description="where a GPU's rank keeps the base weights; host: in the host's memory, 4 bytes a"
        " parameter less on the GPU. They are copied to it anew for each member's perturbation, and for"
        " each update",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Role.JOB] = Field(
        "auto", description="where ranks compute; auto: a GPU if any is visible. One GPU a rank"
    )
    allow_download: Annotated[bool, Role.JOB] = Field(
        False, description="may a hub id be downloaded? Otherwise the local cache only"
    )

    @model_validator(mode="after")
    def _rounds_to_bfloat16(self):
        if self.master == "live" and self.dtype == "float16":
            raise ValueError("model.master: live is not for float16; set model.dtype=bfloat16 or leave it")
        return self


def _weights(given: Any) -> dict[str, Any]:
    """`task.reward` as a mapping function -> weight; a name or a list of names weigh 1 each."""
    names = [given] if isinstance(given, str) and given else given
    made = dict.fromkeys(names, 1.0) if isinstance(names, list) else names
    wanted = "FILE.py:FUNCTION, a list of such, or a mapping FILE.py:FUNCTION: weight"
    good = isinstance(made, dict) and all(
        isinstance(name, str) and all(name.rpartition(":")) and type(weight) in (int, float)
        for name, weight in made.items()
    )
    if not good:
        raise ValueError(f"task.reward: given {plain_yaml.given(given)}, allowed is {wanted}")
    return {name: float(weight) for name, weight in made.items()}


def _list(given: Any) -> Any:
    """One name stands for a list of it."""
    return [given] if isinstance(given, str) and given else given or []


class TaskSettings(Section):
    """The prompts and the reward."""

    name: Literal["questions", "conciseness", "countdown", "math", "custom"] = Field(
        "conciseness",
        description="the task; custom: your own task.train_data with task.reward, or your task.environment",
    )
    train_data: Annotated[str, AfterValidator(os.path.expanduser), Role.DATA] = Field(
        "",
        description="training prompts: a .json, .jsonl or .parquet file, or a folder written by"
        " datasets.save_to_disk; empty: the task's own",
    )
    eval_data: Annotated[str, AfterValidator(os.path.expanduser), Role.DATA] = Field(
        "", description="held-out prompts, which are evaluated only; in the same formats"
    )
    train_size: int = Field(
        0,
        ge=0,
        le=MOST,
        description="training prompts: the data's first; 0: all, or 200 that countdown makes up",
    )
    eval_size: int = Field(
        0,
        ge=0,
        le=MOST,
        description="held-out prompts: the first of task.eval_data, else of task.train_data after"
        " task.train_size; 0: all of the former, none of the latter, or 2000 that countdown makes up",
    )
    prompts_per_generation: int = Field(
        0,
        ge=0,
        description="prompts that the members of a generation answer, drawn without replacement in an"
        " epoch; 0: all",
    )
    prompt_column: str = Field("prompt", min_length=1, description="the data's column with the prompts")
    reward: Annotated[dict[str, float], BeforeValidator(_weights)] = Field(
        {},
        description="your reward, with TRL's signature: FILE.py:FUNCTION, a list of such, or a mapping"
        " FILE.py:FUNCTION: weight; empty: the task's own",
    )
    environment: str = Field(
        "",
        description="your own environment, in which the model acts over several turns: FILE.py:CLASS with"
        " reset(**row) -> prompt and step(answer) -> (observation, reward, done)",
    )
    environment_factory: str | dict[str, str] = Field(
        "",
        description="your own environment with tools, as TRL has it: FILE.py:CLASS, whose public methods are"
        " tools; or a mapping of names to such, of which a row's column `environment` names one",
    )
    tools: Annotated[list[str], BeforeValidator(_list)] = Field(
        [],
        description="functions that the model can call, as TRL has them: FILE.py:FUNCTION, or a list of such",
    )
    max_turns: int = Field(10, ge=1, le=10_000, description="answers of the model in an episode, at most")
    episode_tokens: int = Field(
        4096,
        ge=1,
        description="tokens of an episode's whole conversation: one that has no room for another answer of"
        " engine.max_new_tokens ends; never more than the model has positions for",
    )
    call_seconds: int = Field(
        10,
        ge=1,
        le=10**6,
        description="CPU time that a call of an environment may take, s; by the clock, ten times as much",
    )
    failure_reward: float = Field(
        0.0, description="reward of an episode whose environment fails: raises, dies, takes too long"
    )
    services: bool = Field(
        False,
        description="does the environment ask services that may answer otherwise at another time?"
        " Otherwise its episodes have to begin alike each time",
    )
    chat_template: bool = Field(
        True,
        description="wrap prompts that are text in the model's chat template; for countdown, if not"
        " set, false",
    )
    numbers: list[Literal[3, 4]] = Field(
        [3, 4], min_length=1, description="how many numbers the problems have that countdown makes up"
    )
    seed: int = Field(42, ge=0, lt=2**64, description="of the problems that countdown makes up")

    @property
    def factories(self) -> dict[str, str]:
        """Environments with tools, by their names; one that all rows have is called ''."""
        given = self.environment_factory
        return given if isinstance(given, dict) else {"": given} if given else {}

    @property
    def in_environments(self) -> bool:
        """Are there episodes of several turns?"""
        return bool(self.environment or self.factories or self.tools)

    @property
    def code(self) -> list[str]:
        """What is the user's, and runs: FILE.py:NAME or MODULE:NAME."""
        return [*self.reward, *filter(None, [self.environment]), *self.factories.values(), *self.tools]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, given: Any) -> Any:
        """A reward without a task's name means one's own task; Countdown's prompts are raw text."""
        if not isinstance(given, dict):
            return given
        own = any(given.get(key) for key in ("reward", "environment", "environment_factory", "tools"))
        name = given.get("name", "custom" if own else "conciseness")
        return {"name": name, "chat_template": name != "countdown", **given}

    @model_validator(mode="after")
    def _complete(self):
        if self.name == "custom":
            for key in ("reward", "train_data"):
                if not getattr(self, key) and not self.in_environments:
                    raise ValueError(f"task.{key}: missing; task.name=custom needs it")
        elif self.in_environments:
            raise ValueError(
                f"task.name: given {self.name}, allowed is custom where there are an environment or tools"
            )
        if self.eval_data and not self.train_data and self.name != "countdown":
            raise ValueError("task.train_data: missing; task.eval_data alone makes no task")
        return self

    @model_validator(mode="after")
    def _environments(self):
        if self.environment and (self.factories or self.tools):
            raise ValueError(
                "task.environment: it takes answers as they are, and has no tools; leave out"
                " task.environment_factory and task.tools, or it"
            )
        if (self.factories or self.tools) and not self.chat_template:
            raise ValueError("task.chat_template: tools need it; leave out task.chat_template=false")
        for key, names in (
            ("environment", [self.environment] if self.environment else []),
            ("environment_factory", list(self.factories.values())),
            ("tools", self.tools),
        ):
            for name in names:
                if not all(name.rpartition(":")):
                    what = "FUNCTION" if key == "tools" else "CLASS"
                    raise ValueError(f"task.{key}: given {plain_yaml.given(name)}, allowed is FILE.py:{what}")
        return self


class EsSettings(Section):
    """Evolution strategies (paper, section 3)."""

    population: int = Field(30, ge=1, le=MOST, description="N, members evaluated per generation")
    generations: Annotated[int, Role.JOB] = Field(
        500, ge=0, le=MOST, description="T, updates in the whole run"
    )
    sigma: float = Field(0.001, gt=0, le=1e30, description="standard deviation of the perturbations")
    alpha: float = Field(0.0005, ge=0, le=1e30, description="learning rate, the estimator's 1/sigma absorbed")
    seed: int = Field(42, ge=0, lt=2**64, description="all randomness of the run follows from it")
    antithetic: bool = Field(False, description="members 2j and 2j+1 share a seed, with signs + and -")
    perturbation: Literal["full", "lowrank"] = Field(
        "full",
        description="noise of a matrix. full: every element its own, one member at a time;"
        " lowrank: A B^T / sqrt(rank), a block of members in one batch",
    )
    rank: int = Field(1, ge=1, description="rank of low-rank noise")
    block: int = Field(
        8, ge=1, description="members that one rank evaluates in one batch (lowrank only; full: 1)"
    )
    fitness: Literal["zscore", "centered_rank"] = Field(
        "zscore",
        description="how rewards become coefficients. zscore: distance from the mean in standard deviations;"
        " centered_rank: rank among the members, from -1/2 to 1/2",
    )
    sigma_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how sigma goes to es.sigma_end over the generations"
    )
    sigma_end: float = Field(
        0.1, gt=0, description="what a linear or cosine schedule ends at, as a share of es.sigma"
    )
    sigma_warmup: int = Field(0, ge=0, description="generations in which sigma rises to es.sigma")
    alpha_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how alpha goes to es.alpha_end over the generations"
    )
    alpha_end: float = Field(
        0.1, ge=0, description="what a linear or cosine schedule ends at, as a share of es.alpha"
    )
    alpha_warmup: int = Field(0, ge=0, description="generations in which alpha rises to es.alpha")
    anchor_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the distance to the initial weights that every update takes back; the"
        " initial weights are read from disk each time. 0: none",
    )

    @property
    def block_size(self) -> int:
        """Members of a block, of which there are no more than in the population."""
        return min(self.block, self.population) if self.perturbation == "lowrank" else 1

    @property
    def noise_rank(self) -> int:
        """Rank of the noise of matrices; 0: full."""
        return self.rank if self.perturbation == "lowrank" else 0

    @model_validator(mode="after")
    def _pairs(self):
        if self.antithetic and self.population % 2:
            raise ValueError(
                f"es.population: given {self.population}, allowed is an even number, since"
                " es.antithetic makes pairs"
            )
        return self


class EngineSettings(Section):
    """What turns prompts into completions."""

    name: Literal["hf", "vllm"] = Field("hf", description="hf: Hugging Face transformers; vllm: vLLM")
    max_new_tokens: int = Field(1024, ge=1, description="longest completion, in tokens")
    batch_size: int = Field(32, ge=1, description="prompts decoded together; results may depend on it")
    batch_invariant: bool = Field(
        False,
        description="vLLM on GPUs: slower kernels, whose results do not depend on the rest of the batch",
    )

    @model_validator(mode="after")
    def _invariant_in_vllm(self):
        if self.batch_invariant and self.name != "vllm":
            raise ValueError(
                f"engine.batch_invariant: given true, allowed is false with engine.name={self.name}, which"
                " has no such kernels"
            )
        return self


class RunSettings(Section):
    """The job."""

    role: ClassVar[Role] = Role.JOB

    directory: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1, description="where run.h5 and the tuned model go"
    )
    threads: Annotated[int, Role.RESULT] = Field(
        1, ge=1, le=MOST_THREADS, description="CPU threads of a rank; a model's answers may depend on it"
    )
    evaluate_every: int = Field(
        0,
        ge=0,
        description="generations between evaluations on held-out prompts; 0: first and last only",
    )
    keep_samples: int = Field(8, ge=0, description="answers kept in the run file per evaluation and split")
    kl_samples: int = Field(
        0,
        ge=0,
        le=10**6,
        description="answers sampled per prompt at every evaluation, to estimate the KL divergence from the"
        " initial model (the paper: 20); 0: it is not measured",
    )
    kl_prompts: int = Field(
        8,
        ge=1,
        description="prompts for that: the first held-out ones, or training ones if none are held out",
    )
    measure_drift: bool = Field(
        False, description="note the distance from the initial weights at every evaluation, by layers"
    )
    progress: Literal["auto", "bar", "lines"] = Field(
        "auto", description="bar on a terminal, else a plain line per generation"
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="go on with the directory's run file: if there is one, never, or it must be there"
    )
    changed_reward: Literal["refuse", "accept"] = Field(
        "refuse",
        description="what to do if a reward function's file is not what the run went on with before; accept:"
        " go on, and note it in the run file",
    )
    checkpoint_every: int = Field(
        0, ge=0, description="generations between weight checkpoints, which only save replay time; 0: none"
    )
    time_limit: Annotated[str, BeforeValidator(str)] = Field(
        "auto",
        description="stop in time, resumable: none, minutes, [days-]hours:minutes:seconds;"
        " auto: the end of the Slurm job",
    )
    grace: int = Field(
        30, ge=0, description="seconds to finish in after a signal, where no time limit is known"
    )
    collective_timeout: int = Field(
        3600,
        ge=1,
        description="seconds that ranks wait for one another, and for a call of the reward function, before"
        " the job gives up",
    )

    @model_validator(mode="after")
    def _time_limit(self):
        try:
            time_limit.check(self.time_limit)
        except InputError as error:
            raise ValueError(str(error)) from None
        return self


class Settings(Section):
    """All settings of a run."""

    model: ModelSettings
    task: TaskSettings = TaskSettings()
    es: EsSettings = EsSettings()
    engine: EngineSettings = EngineSettings()
    run: RunSettings

    def flat(self) -> dict[str, Any]:
        """Full key -> value."""
        tree = self.model_dump()
        return {f"{section}.{key}": value for section in tree for key, value in tree[section].items()}

    def to_yaml(self) -> str:
        """The resolved settings as YAML, in the order of this file."""
        stream = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
        yaml.default_flow_style = False
        yaml.width = 10**6  # a long path stays on its line
        yaml.dump(self.model_dump(), stream)
        return stream.getvalue()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
# Full key -> what pydantic knows of the setting.
FIELDS: dict[str, FieldInfo] = {
    f"{name}.{key}": field
    for name, section in SECTIONS.items()
    for key, field in section.model_fields.items()
}


def role_of(key: str) -> Role:
    """What a setting decides, by its full key; one that only another version knows: as its section."""
    own = FIELDS[key].metadata if key in FIELDS else ()
    section = SECTIONS.get(key.partition(".")[0], Section)
    return next((mark for mark in own if isinstance(mark, Role)), section.role)


# What may change when a run goes on.
CHANGEABLE = tuple(key for key in FIELDS if role_of(key) is not Role.RESULT)
