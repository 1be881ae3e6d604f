"""Run files as arrays and frames: the same numbers as h5py reads, with nothing but light libraries."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import launching
import made_up
import numpy as np
import pytest

from mpies.analyze import open_run, series
from mpies.analyze.commands import main
from mpies.analyze.export import scalars
from mpies.analyze.run import open_runs, short_names
from mpies.errors import InputError
from mpies.runfile import SCHEMA_VERSION, RunFile

# Made by the program, on 2 ranks, and kept for ever. The first was written before dimensions had names;
# the second was begun on 2 ranks and went on with 3.
DATA = launching.DATA
REFERENCES = [DATA / "schema-1-first.h5", DATA / "schema-1.h5", DATA / "schema-2.h5"]

BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ImportError
"""


@pytest.fixture(params=REFERENCES, ids=lambda path: path.stem)
def reference(request) -> Path:
    return request.param


def test_every_schema_has_a_reference_file():
    versions = set()
    for path in REFERENCES:
        with h5py.File(path) as file:
            versions.add(int(file.attrs["schema_version"]))
    assert versions == set(range(1, SCHEMA_VERSION + 1))


def columns_of(table: h5py.Group) -> list[tuple[str, h5py.Dataset]]:
    return [(name, dataset) for name, dataset in table.items() if name != "checksum"]


def test_frames_hold_what_is_in_the_file(reference):
    run = open_run(reference)
    with h5py.File(reference) as file:
        n = file.attrs["generations_committed"]
        assert (run.committed, run.population) == (n, file.attrs["population"]) == (5, 6)
        for name, dataset in columns_of(file["generation"]):
            assert np.array_equal(run.generations[name], dataset[:n], equal_nan=True), name
            assert run.generations[name].dtype == dataset.dtype
        for name, dataset in columns_of(file["member"]):
            frame = run.members[name].unstack()
            assert np.array_equal(frame, dataset[:n], equal_nan=True), name
        for table, frame in (
            ("evaluation", run.evaluations),
            ("sample", run.samples),
            ("start", run.starts),
        ):
            assert set(frame) == set(file[table]) - {"checksum"}
            for name in frame:
                dataset = file[table][name]
                text = h5py.check_string_dtype(dataset.dtype)
                expected = dataset.asstr()[:].tolist() if text else dataset[:].tolist()
                assert np.array_equal(frame[name].tolist(), expected, equal_nan=not text), f"{table}/{name}"
        assert run.configs == [file[f"config/{name}"].asstr()[()] for name in sorted(file["config"])]
        assert run.attributes["run_uuid"] == file.attrs["run_uuid"]
    assert run.generations.index.tolist() == list(range(5))
    assert run.members.index.names == ["generation", "member"]


def test_columns_come_in_the_order_of_the_schema(reference):
    run = open_run(reference)
    assert list(run.generations)[:2] == ["reward_mean", "reward_std"]
    assert list(run.members) == ["seed", "sign", "reward", "coefficient", "rank", "tokens", "seconds"]


def test_seeds_keep_all_their_bits(reference):
    run = open_run(reference)
    with h5py.File(reference) as file:
        assert run.members.seed.max() == file["member/seed"][:5].max() > 2**53


def test_settings_are_those_of_the_latest_start():
    run = open_run(REFERENCES[1])
    assert [run.settings["es"]["sigma"], run.settings["es"]["antithetic"]] == [0.02, True]
    assert (len(run.configs), run.target) == (2, 5)
    assert run.starts.world_size.tolist() == [2, 3] and run.starts.generation.tolist() == [0, 3]


def test_rows_beyond_the_committed_ones_are_left_out(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=20)
    made_up.rewind(path, 7)
    run = open_run(path)
    assert len(run.generations) == 7 and len(run.members) == 7 * 16
    assert run.evaluations.generation.max() == 0, "one at 10 would be of weights that are not there"
    assert run.samples.generation.max() == 0


def test_a_run_without_a_generation(tmp_path):
    run = open_run(made_up.write_run(tmp_path / "run", generations=0))
    assert (run.committed, len(run.generations), len(run.members)) == (0, 0, 0)
    assert series.expected_drift(run).tolist() == [0.0]


def test_columns_of_later_versions(tmp_path):
    """What is in the file is in the frame; what is not is NaN in `column`."""
    path = made_up.write_run(tmp_path / "run", generations=10)
    with h5py.File(path, "r+") as file:
        file["generation/answers"] = np.arange(10)
        del file["generation/unscored"]
        made_up.seal_all(file)
    run = open_run(path)
    assert run.generations.answers.tolist() == list(range(10))
    assert "unscored" not in run.generations
    assert np.isnan(run.column("generation/unscored")).tolist() == [True] * 10


def test_a_folder_stands_for_its_run_file(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=2)
    assert open_run(tmp_path / "run").path == path


def test_xarray_opens_the_tables():
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    with xarray.open_datatree(REFERENCES[1], engine="h5netcdf") as tree:
        members = tree["member"].to_dataset()
        assert members.reward.dims == ("generations", "members")
        assert members.reward.shape == (5, 6)
        assert members.generations.values.tolist() == list(range(5))
        assert members.reward.attrs["units"] == "reward"
        assert np.allclose(members.reward.mean("members"), tree["generation"]["reward_mean"])
        assert tree["sample"]["prompt"].dims == ("samples",)
        assert len(tree["sample"]["prompt"]) == len(open_run(REFERENCES[1]).samples)


# While it is written


def test_reads_what_a_job_has_written_so_far(tmp_path):
    """In another process, since within one, HDF5 would share the writer's view."""
    path = made_up.write_run(tmp_path / "run", generations=20)
    made_up.rewind(path, 3)
    log = RunFile.reopen(path, 20)
    try:
        assert _committed_elsewhere(path) == "3 3"
        _append_last_row_again(log)
        assert _committed_elsewhere(path) == "4 4"
    finally:
        log.close()


def test_a_lock_of_hdf5_keeps_nobody_out(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=3)
    with h5py.File(path, "r+", locking=True):
        assert _committed_elsewhere(path) == "3 3"


def test_a_file_that_is_open_here_in_another_way():
    with h5py.File(REFERENCES[0], "r"):
        assert open_run(REFERENCES[0]).committed == 5


def _committed_elsewhere(path: Path) -> str:
    code = "import sys; from mpies.analyze import open_run; r = open_run(sys.argv[1])"
    ended = launching.python("-c", f"{code}; print(r.committed, len(r.generations))", path)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def _append_last_row_again(log: RunFile) -> None:
    last = log.committed - 1
    rows = ({name: d[last] for name, d in columns_of(log.file[table])} for table in ("generation", "member"))
    log.append(*rows)


# What it needs


def test_imports_no_heavy_library():
    """A laptop has no MPI and no torch; pandas and Matplotlib are loaded when they are used."""
    blocked = {
        "torch",
        "mpi4py",
        "numba",
        "transformers",
        "safetensors",
        "pydantic",
        "pandas",
        "matplotlib",
        "jinja2",
    }
    code = (
        BLOCKED.format(blocked=blocked)
        + "import mpies.analyze.commands; mpies.analyze.commands.make_parser()"
    )
    ended = launching.python("-c", code)
    assert ended.returncode == 0, ended.stderr


def test_commands_need_neither_torch_nor_mpi(tmp_path):
    blocked = {"torch", "mpi4py", "numba", "transformers", "safetensors", "tokenizers", "scipy"}
    runs = [*map(str, REFERENCES)]
    commands = [
        ["summary", *runs],
        ["compare", *runs],
        ["plot", *runs, "--panels", "learning", "--output", str(tmp_path / "figure.svg")],
    ]
    code = BLOCKED.format(blocked=blocked) + (
        f"from mpies.analyze.commands import main; sys.exit(sum(main(a) for a in {commands!r}))"
    )
    ended = launching.python("-c", code)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("pandas", ["export", "--format", "csv", "--output", "out"]),
        ("pyarrow", ["export", "--format", "parquet", "--output", "out"]),
        ("tensorboardX", ["export", "--to", "tensorboard", "--output", "out"]),
        ("wandb", ["export", "--to", "wandb-offline", "--output", "out"]),
        ("matplotlib", ["plot", "--output", "out.png"]),
        ("jinja2", ["report", "--output", "out.html"]),
    ],
)
def test_a_missing_library_is_said_in_a_line(library, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, str(REFERENCES[0])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mpies: ") and said.count("\n") == 1
    assert f"needs {library}" in said and "pip install" in said
    assert not list(tmp_path.iterdir()), "nothing half done"


# Files that are none


def _newer(path: Path) -> None:
    made_up.write_run(path.parent / "made", generations=2).rename(path)
    with h5py.File(path, "r+") as file:
        file.attrs.modify("schema_version", SCHEMA_VERSION + 1)


def _foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = [1, 2, 3]


def _without_table(path: Path) -> None:
    made_up.write_run(path.parent / "made", generations=2).rename(path)
    with h5py.File(path, "r+") as file:
        del file["sample"]


def _more_committed_than_there_is(path: Path) -> None:
    made_up.write_run(path.parent / "made", generations=2).rename(path)
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", 5)


def _no_yaml(path: Path) -> None:
    made_up.write_run(path.parent / "made", generations=2).rename(path)
    with h5py.File(path, "r+") as file:
        del file["config/000"]
        file["config/000"] = "es: [sigma"


def _cut(path: Path) -> None:
    whole = REFERENCES[1].read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


FAULTY = {
    "missing": (lambda path: None, "there is no such file"),
    "folder without": (lambda path: path.mkdir(), "there is no such file"),
    "empty": (lambda path: path.touch(), "not a readable HDF5 file"),
    "text": (lambda path: path.write_text("es:\n  sigma: 1\n" * 99), "not a readable HDF5 file"),
    "truncated": (_cut, "its end is missing"),
    "foreign": (_foreign, "not a run file of mpies"),
    "newer": (_newer, "newer than this program's"),
    "no table": (_without_table, "damaged"),
    "counter": (_more_committed_than_there_is, "damaged"),
    "settings": (_no_yaml, "damaged"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_file_is_told_in_a_line(fault, tmp_path):
    spoil, told = FAULTY[fault]
    path = tmp_path / "faulty.h5"
    spoil(path)
    with pytest.raises(InputError) as caught:
        open_run(path)
    assert str(path) in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_among_many_the_good_ones_are_read(tmp_path):
    for name, (spoil, _) in FAULTY.items():
        spoil(tmp_path / f"{name}.h5")
    paths = [tmp_path / f"{name}.h5" for name in FAULTY]
    runs, problems = open_runs([paths[0], REFERENCES[0], *paths[1:], REFERENCES[1], REFERENCES[0]])
    assert [run.path for run in runs] == REFERENCES[:2], "each once"
    assert len(problems) == len(FAULTY)


def test_names_tell_runs_apart(tmp_path):
    paths = [
        made_up.write_run(tmp_path / place, generations=1) for place in ("a/wide/s1", "a/narrow/s1", "b/s2")
    ]
    runs, _ = open_runs(paths)
    assert short_names(runs) == ["wide/s1", "narrow/s1", "s2"]
    assert short_names(runs[:1]) == ["s1"]
    assert short_names([open_run(path) for path in REFERENCES]) == ["schema-1-first", "schema-1", "schema-2"]


# Series, against sums written out


def test_expected_drift_is_what_the_weights_moved(tmp_path):
    """By the definition: independent directions, pairs merged, variance 1 per parameter."""
    run = open_run(REFERENCES[1])
    with h5py.File(REFERENCES[1]) as file:
        signed = (file["member/sign"][:5] * file["member/coefficient"][:5]).astype(float)
        parameters = file.attrs["parameters"]
    pairs = signed[:, 0::2] + signed[:, 1::2]  # members of a pair share a seed
    expected = np.sqrt(parameters * np.cumsum((pairs**2).sum(axis=1)))
    assert np.allclose(series.expected_drift(run)[1:], expected)


def test_seconds_of_ranks(reference):
    run = open_run(reference)
    busy = series.rank_seconds(run)
    with h5py.File(reference) as file:
        ranks, seconds = file["member/rank"][:5], file["member/seconds"][:5]
    assert np.allclose(busy.sum(axis=1), seconds.sum(axis=1))
    for rank in range(busy.shape[1]):
        assert np.allclose(busy[:, rank], np.where(ranks == rank, seconds, 0).sum(axis=1))


def test_ranks_of_each_generation():
    assert series.world_sizes(open_run(REFERENCES[1])).tolist() == [2, 2, 2, 3, 3]


def test_phases_make_up_a_generation_and_its_logging(reference):
    run = open_run(reference)
    seconds = series.phase_seconds(run)
    frame = run.generations
    for phase in ("perturb", "generate", "wait", "update", "log"):
        assert seconds[phase].tolist() == frame[f"seconds_{phase}"].tolist()
    known = sum(frame[c] for c in frame if c.startswith("seconds_"))
    assert np.allclose(sum(seconds.values()), np.maximum(frame.seconds + frame.seconds_log, known))


def test_the_number_of_prompts_is_told_only_if_it_is_known(tmp_path):
    run = open_run(REFERENCES[0])  # 2 training prompts, and up to 3 answers were kept
    assert series.prompts_per_member(run) == 2
    kept = replace(run, settings={**run.settings, "run": {"keep_samples": 2}})
    assert series.prompts_per_member(kept) is None, "there may be more than the two that were kept"
    drawn = replace(run, settings={**run.settings, "task": {"prompts_per_generation": 32}})
    assert series.prompts_per_member(drawn) == 32
    made = made_up.write_run(tmp_path / "run", "task.name=conciseness", generations=2)
    assert series.prompts_per_member(open_run(made)) is None and series.held_out_prompts(open_run(made)) == 3
    made_up.tell(made, {0: [1, 0, 1, 1], 2: [1, 1, 1, 1]})  # a row for each, however few answers were kept
    assert series.held_out_prompts(open_run(made)) == 4


def test_running_means_leave_out_what_is_missing():
    values = np.arange(60.0)
    assert series.smooth(values)[30] == 30.0 and len(series.smooth(values)) == 60
    values[30] = np.nan
    assert series.smooth(values)[30] == 30.0
    assert series.smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


def test_json_of_attributes(reference):
    json.dumps(open_run(reference).attributes)


def test_frames_carry_their_origin(reference):
    assert open_run(reference).generations.attrs["run_uuid"]


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "model: !!python/object/apply:os.system ['echo hi']",
            "not valid YAML (could not determine a constructor",
        ),
        ("a: &a [" + "x, " * 200 + "]\nb: [" + "*a, " * 200 + "]", "it holds more than 10,000 values"),
        ("[" * 3000, "not valid YAML (brackets within brackets"),
        ("hello", "its settings are not sections"),
    ],
    ids=["code", "bomb", "deep", "text"],
)
def test_settings_that_others_have_written_are_one_line(tmp_path, capfd, text, words):
    path = made_up.write_run(tmp_path / "run", generations=1)
    with h5py.File(path, "r+") as file:
        del file["config/000"]
        file["config/000"] = text
    assert main(["summary", str(path)]) == 2
    (line,) = launching.problems(capfd.readouterr().err)
    assert (
        line.startswith(f"{path}: a damaged run file (")
        and words in line
        and len(line) < 400 + len(str(path))
    )


def test_what_others_have_put_into_tables_does_no_harm(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=4)
    with h5py.File(path, "r+") as file:
        file.create_group("generation/notes")
        file["generation/words"] = ["a"] * 4
        file["member/one"] = 3.0
        file["evaluation/short"] = [1.0]
        file["evaluation/mine"] = np.arange(len(file["evaluation/generation"]))
    run = open_run(path)
    assert run.tables["evaluation"]["mine"].tolist() == list(range(len(run.tables["evaluation"]["mine"])))
    assert "words" in run.tables["generation"] and "short" not in run.tables["evaluation"]
    assert not {"notes", "one"} & {*run.tables["generation"], *run.tables["member"]}
    assert all(isinstance(v, float) for _, _, values in scalars(run) for v in values.values())
