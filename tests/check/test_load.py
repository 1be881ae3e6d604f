"""The check refuses to go on with a run where the job would, with the same words."""

from __future__ import annotations

import re
import shutil

import pytest
import small
from safetensors.torch import load_file, save_file

from mpies.check.__main__ import main
from mpies.errors import RefusedError
from mpies.text import size


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    """A run of one generation, of a model of its own."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    with small.Runs(alone, model, tmp_path) as runs:
        assert runs.train(1) == 0
        yield runs


def problems_of(runs: small.Runs, capsys, **changes) -> list[str]:
    """What the check says that the job would fail for; the job fails with it."""
    capsys.readouterr()
    code = main(runs.comm, runs.arguments(2, **changes))
    out, err = capsys.readouterr()
    last, problems = out.splitlines()[-1], [line.removeprefix("mpies: ") for line in err.splitlines()]
    assert (code, last) == ((2, "verdict: this job would fail") if problems else (0, last))
    if problems:
        with pytest.raises(RefusedError) as refused:
            runs.begin(2, **changes)
        assert str(refused.value) == problems[0]
    return problems


def test_how_long_a_start_takes(runs, capsys):
    assert problems_of(runs, capsys) == []
    main(runs.comm, runs.arguments(2))
    table = capsys.readouterr().out
    assert re.search(r"ok +start +[\d.]+ .* before the first generation: .* to import, .* to load", table)
    weights = (runs.model / "model.safetensors").stat().st_size
    assert f"; {size(weights)} loaded in " in table


def test_another_dtype(runs, capsys):
    assert problems_of(runs, capsys, model__dtype="bfloat16") == [
        "model.dtype: the run was begun with float32, but here it would be bfloat16; set model.dtype=float32"
    ]
    assert problems_of(runs, capsys) == []


def test_a_model_with_a_changed_tensor(runs, capsys):
    path = runs.model / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    (problem,) = problems_of(runs, capsys)
    assert problem.startswith(f"model.path: {runs.model} has digest ")
    assert problem.endswith(": another model, or a changed one")
