"""What can be but is hardly meant: settings that have no effect, or that let nothing be learned."""

from __future__ import annotations

from collections.abc import Iterator

from mpies.config.reading import quickstart
from mpies.config.settings import FIELDS, Settings


def remark(settings: Settings) -> list[str]:
    """A line for each such setting, with its full name; said at a run's start and by the check."""
    return [
        *_about_the_model(settings),
        *_about_the_task(settings),
        *_about_the_population(settings),
        *_about_schedules(settings),
    ]


# What is of use with something else only.
OF_EPISODES = ("max_turns", "episode_tokens", "call_seconds", "failure_reward", "services")
OF_COUNTDOWN = ("numbers", "seed")


def _about_the_model(settings: Settings) -> Iterator[str]:
    if settings.model.base == "host" and settings.model.device == "cpu":
        yield "model.base: has no effect with model.device=cpu, where all weights are in the host's memory"


def _about_the_task(settings: Settings) -> Iterator[str]:
    task = settings.task
    for name in () if task.in_environments else OF_EPISODES:
        if _is_set(settings, f"task.{name}"):
            yield f"task.{name}: has no effect without an environment, tools or an agent"
    for name in () if task.name == "countdown" else OF_COUNTDOWN:
        if _is_set(settings, f"task.{name}"):
            yield f"task.{name}: has no effect with task.name={task.name}, only with countdown"
    if not settings.run.kl_samples and _is_set(settings, "run.kl_prompts"):
        yield "run.kl_prompts: has no effect without run.kl_samples"
    if task.image_column and task.in_environments:
        yield "task.image_column: has no effect with an environment, tools or an agent, which see text only"
    elif task.image_column and task.name != "custom":
        yield f"task.image_column: has no effect with task.name={task.name}, only with custom"


def _about_the_population(settings: Settings) -> Iterator[str]:
    es = settings.es
    if es.population == 1:
        yield "es.population: a single member has nothing to be compared with, so that nothing is learned"
    for key in ("block", "rank"):
        if es.perturbation == "full" and _is_set(settings, f"es.{key}"):
            yield f"es.{key}: has no effect with es.perturbation=full, only with lowrank"


def _about_schedules(settings: Settings) -> Iterator[str]:
    es = settings.es
    for name in ("sigma", "alpha"):
        warmup = getattr(es, f"{name}_warmup")
        if warmup > es.generations > 0:
            yield (
                f"es.{name}_warmup: given {warmup}, but es.generations is {es.generations}, so that {name}"
                f" never gets to es.{name}"
            )
        if getattr(es, f"{name}_schedule") == "constant" and _is_set(settings, f"es.{name}_end"):
            yield f"es.{name}_end: has no effect with es.{name}_schedule=constant"


def _is_set(settings: Settings, key: str) -> bool:
    """Has it another value than its default, and than the quickstart, which one may have begun with?"""
    section, name = key.split(".")
    known = FIELDS[key].default, quickstart().get(section, {}).get(name)
    return settings.flat()[key] not in known
