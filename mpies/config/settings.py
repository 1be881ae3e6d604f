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

from mpies import time_limit
from mpies.config.section import MOST, Role, Section, as_list
from mpies.config.task_settings import TaskSettings
from mpies.errors import InputError

MOST_THREADS = 4096  # OpenMP ends the process where it cannot have them


class ModelSettings(Section):
    """The language model that is tuned."""

    # A model is its weights, wherever they lie: their digest is compared. Of the dtype, what it
    # comes to is compared; see run/continuity.py.
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
        " parameter less on the GPU, 2 with master=live in 16 bits. They are copied to it anew for each"
        " member's perturbation, and for each update",
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


class EsSettings(Section):
    """Evolution strategies (paper, section 3)."""

    population: int = Field(30, ge=1, le=MOST, description="N, members evaluated per generation")
    generations: Annotated[int, Role.JOB] = Field(
        500, ge=0, le=MOST, description="T, updates in the whole run"
    )
    sigma: float = Field(0.001, gt=0, le=1e30, description="standard deviation of the perturbations")
    alpha: float = Field(0.0005, ge=0, le=1e30, description="learning rate, the estimator's 1/sigma absorbed")
    seed: int = Field(
        42, ge=0, lt=2**64, description="of members' noise, prompts drawn, episodes and samples"
    )
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

    leave_out: Annotated[list[Annotated[str, Field(pattern=r"^[^\s]+$")]], BeforeValidator(as_list)] = Field(
        ["auto"],
        description="what is not tuned: paths of modules, such as model.visual, or names of parameters; auto:"
        " what no answer can depend on, such as the image tower where no prompt has images; []: nothing",
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
    assignment: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="who evaluates which block of members. dynamic: the next rank that is free, so that no"
        " one waits for a slow one long; static: by a plan made beforehand. No result depends on it",
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
    metrics: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "",
        description="a file that rank 0 writes after every generation with its figures, in Prometheus's text"
        " format; its exporter reads those whose names end in .prom. empty: none",
    )
    slurm_comment: bool = Field(
        False, description="show progress in the Slurm job's comment, changed once a minute by scontrol"
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
