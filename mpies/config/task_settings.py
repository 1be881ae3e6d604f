"""The settings of a task: its prompts, its reward, its environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mpies import plain_yaml
from mpies.config.section import MOST, Role, Section, as_list


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


def _factories(given: Any) -> Any:
    """`task.environment_factory`: a name, or a mapping of names to such."""
    names = given.items() if isinstance(given, dict) else [("only", given)]
    if not all(isinstance(text, str) for pair in names for text in pair):
        wanted = "FILE.py:CLASS, or a mapping NAME: FILE.py:CLASS"
        raise ValueError(f"task.environment_factory: given {plain_yaml.given(given)}, allowed is {wanted}")
    return given


def names_file(code: str) -> bool:
    """Is this FILE.py:NAME? Else it is MODULE:NAME."""
    return code.rpartition(":")[0].endswith(".py")


def short_name(code: str) -> str:
    """The user's code without its file's folder, which may be another tomorrow: FILE.py:NAME, MODULE:NAME."""
    place, _, name = code.rpartition(":")
    return f"{Path(place).name if names_file(code) else place}:{name}"


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
    image_column: str = Field(
        "",
        description="custom: the data's column with a prompt's images, one or a list: files' paths, bytes, or"
        " images of datasets; empty: those in chat messages only",
    )
    reward: Annotated[dict[str, float], BeforeValidator(_weights)] = Field(
        {},
        description="your reward, with TRL's signature: FILE.py:FUNCTION, a list of such, or a mapping"
        " FILE.py:FUNCTION: weight; empty: the task's own",
    )
    expects: str = Field(
        "",
        description="what should have been in an answer: FILE.py:FUNCTION, with a reward's signature, which"
        " returns (kept, expected) for each answer; rewards get `log_probabilities` of what is expected",
    )
    environment: str = Field(
        "",
        description="your own environment, in which the model acts over several turns: FILE.py:CLASS with"
        " reset(**row) -> prompt and step(answer) -> (observation, reward, done)",
    )
    environment_factory: Annotated[str | dict[str, str], BeforeValidator(_factories)] = Field(
        "",
        description="your own environment with tools, as TRL has it: FILE.py:CLASS, whose public methods are"
        " tools; or a mapping of names to such, of which a row's column `environment` names one",
    )
    tools: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [],
        description="functions that the model can call, as TRL has them: FILE.py:FUNCTION, or a list of such",
    )
    agent: str = Field(
        "",
        description="your own agent: FILE.py:FUNCTION, which is called with (row, base_url, api_key), asks"
        " the model there, as OpenAI's clients do, and returns a reward",
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
        description="CPU time that a call of an environment, or an agent from an answer to its next request,"
        " may take, s; by the clock, ten times as much",
    )
    failure_reward: float = Field(
        0.0, description="reward of an episode whose environment or agent fails: raises, dies, takes too long"
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
        return bool(self.environment or self.factories or self.tools or self.agent)

    @property
    def code(self) -> list[str]:
        """What is the user's, and runs: FILE.py:NAME or MODULE:NAME."""
        return [name for names in self.code_by_setting.values() for name in names]

    @property
    def code_by_setting(self) -> dict[str, list[str]]:
        """The same by the settings that name it."""
        return {
            "reward": list(self.reward),
            "expects": as_list(self.expects),
            "environment": as_list(self.environment),
            "agent": as_list(self.agent),
            "environment_factory": list(self.factories.values()),
            "tools": self.tools,
        }

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, given: Any) -> Any:
        """A reward without a task's name means one's own task; Countdown's prompts are raw text."""
        if not isinstance(given, dict):
            return given
        keys = ("reward", "environment", "environment_factory", "tools", "agent")
        own = any(given.get(key) for key in keys)
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
                f"task.name: given {self.name}, allowed is custom with an environment, tools or an agent"
            )
        if self.eval_data and not self.train_data and self.name != "countdown":
            raise ValueError("task.train_data: missing; task.eval_data alone makes no task")
        return self

    @model_validator(mode="after")
    def _expects(self):
        given = plain_yaml.given(self.expects)
        if self.expects and not self.reward:
            raise ValueError(
                f"task.expects: given {given}, but there is no task.reward to make use of `log_probabilities`"
            )
        if self.expects and self.in_environments:
            raise ValueError(f"task.expects: given {given}, allowed is none for episodes of several turns")
        return self

    @model_validator(mode="after")
    def _told_apart(self):
        """Run files and messages name code without its folder."""
        known: dict[str, str] = {}
        for code in self.code:
            other = known.setdefault(short_name(code), code)
            if other != code:
                raise ValueError(
                    f"task: {other} and {code} are both called {short_name(code)}; give one file another name"
                )
        return self

    @model_validator(mode="after")
    def _environments(self):
        if self.environment and (self.factories or self.tools):
            raise ValueError(
                f"task.environment: given {plain_yaml.given(self.environment)}, allowed is none with"
                " task.environment_factory or task.tools: it takes answers as they are"
            )
        if self.agent and (self.environment or self.factories or self.tools):
            raise ValueError(
                f"task.agent: given {plain_yaml.given(self.agent)}, allowed is none with task.environment,"
                " task.environment_factory or task.tools: an agent brings its own"
            )
        if (self.factories or self.tools or self.agent) and not self.chat_template:
            raise ValueError(
                "task.chat_template: given false, allowed is true with tools or an agent, which need it"
            )
        return self

    @model_validator(mode="after")
    def _names_of_code(self):
        for key, names in self.code_by_setting.items():
            for name in names:
                if not all(name.rpartition(":")):
                    what = "CLASS" if key in ("environment", "environment_factory") else "FUNCTION"
                    raise ValueError(f"task.{key}: given {plain_yaml.given(name)}, allowed is FILE.py:{what}")
        return self
