"""Settings that are hardly meant are named; ordinary ones are not."""

from __future__ import annotations

import pytest

from mpies import config


@pytest.mark.parametrize(
    "given, key",
    [
        (["es.population=1", "es.antithetic=false"], "es.population"),
        (["es.perturbation=full", "es.block=4"], "es.block"),
        (["es.perturbation=full", "es.rank=2"], "es.rank"),
        (["es.generations=10", "es.sigma_warmup=11"], "es.sigma_warmup"),
        (["es.generations=10", "es.alpha_warmup=20"], "es.alpha_warmup"),
        (["model.base=host", "model.device=cpu"], "model.base"),
        (["task.image_column=image"], "task.image_column"),
        (["task.name=custom", "task.environment=a.py:A", "task.image_column=image"], "task.image_column"),
        (["es.sigma_end=0.5"], "es.sigma_end"),
        (["task.max_turns=3"], "task.max_turns"),
        (["task.services=true"], "task.services"),
        (["task.failure_reward=-1"], "task.failure_reward"),
        (["task.seed=7"], "task.seed"),
        (["task.name=math", "task.numbers=[3]"], "task.numbers"),
        (["run.kl_prompts=3"], "run.kl_prompts"),
        (["es.alpha_end=0"], "es.alpha_end"),
    ],
)
def test_what_has_no_effect_is_named(given, key):
    (line,) = config.remark(config.load(given))
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["es.perturbation=full"],  # the quickstart's own block is nobody's mistake
        ["model.base=host"],
        ["es.generations=0", "es.sigma_warmup=3"],
        ["es.generations=10", "es.sigma_warmup=10"],
        ["es.sigma_schedule=cosine", "es.sigma_end=0.5"],
        ["es.rank=4", "es.block=8"],
        ["task.name=custom", "task.environment=a.py:A", "task.max_turns=3", "task.call_seconds=5"],
        ["task.name=countdown", "task.seed=7", "task.numbers=[3]"],
        ["run.kl_samples=2", "run.kl_prompts=3"],
    ],
)
def test_what_is_meant_is_not(given):
    assert config.remark(config.load(given)) == []


def test_a_value_that_ends_like_a_file_is_a_value(tmp_path):
    settings = config.load([f"run.directory={tmp_path}/x.yaml", "task.train_data=rows.yml"])
    assert settings.run.directory == f"{tmp_path}/x.yaml" and settings.task.train_data == "rows.yml"


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "sigma=0.1.yaml").write_text("model: {path: x}\nrun: {directory: y}\nes: {sigma: 0.1}\n")
    assert config.load([str(tmp_path / "sigma=0.1.yaml")]).es.sigma == 0.1
