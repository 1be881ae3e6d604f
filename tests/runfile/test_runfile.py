"""The run file: its schema, what readers see while it is written, and what is left of a killed writer."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from mpies.errors import InputError, StorageError
from mpies.runfile import SCHEMA_VERSION, RunFile, layout, open_for_reading, read_history, storage
from mpies.runfile.checksum import Damage

# New processes begin with what takes long to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "mpies.runfile"])

N = 4
ATTRIBUTES = {
    "model_path": "some/model",
    "model_digest": np.uint64(2**64 - 3),
    "parameters": 123,
    "dtype": "float32",
}
SETTINGS = "es: {sigma: 0.5}\n"
START = {"world_size": 2, "hosts": "a,b", "devices": "cpu,cpu", "versions": "{}", "reason": "new"} | {
    "rewards": "{}"
}

# Schema 2, a contract: what studies of run files rely on. Shape by table; kind of number, or text.
SCHEMA = {
    "start": "generation:i8 utc:text world_size:i4 hosts:text devices:text versions:text reason:text"
    " rewards:text checksum:u8",
    "generation": "reward_mean:f8 reward_std:f8 reward_min:f8 reward_max:f8 unscored:i4 sigma:f8 alpha:f8"
    " anchor_decay:f8"
    " digest:u8 seconds:f8 seconds_perturb:f8 seconds_generate:f8 seconds_reward:f8 seconds_communicate:f8"
    " seconds_wait:f8 seconds_update:f8 seconds_log:f8 imbalance:f8 tokens:i8 bytes_communicated:i8"
    " bytes_gathered:i8 identical_pairs:f8 pairs_with_signal:f8 prompts_disagreeing:f8 distinct_answers:f8"
    " truncated:f8 checksum:u8",
    "member": "seed:u8 sign:i1 reward:f8 coefficient:f4 rank:i4 tokens:i8 seconds:f4 turns:i8 calls:i8"
    " bad_calls:i8 cut:i8 failed:i8 replies:u8",
    "evaluation": "generation:i8 split:text reward_mean:f8 accuracy:f8 kl:f8 tokens:i8 drift_l2:f8"
    " answer_tokens:f8 checksum:u8",
    "metric": "generation:i8 split:text name:text mean:f8 checksum:u8",
    "sample": "generation:i8 split:text prompt:text completion:text messages:text reward:f8 checksum:u8",
    "prompt": "generation:i8 split:text number:i4 reward:f8 accuracy:f8 tokens:i4 checksum:u8",
}

# Row numbers at the root, which name the dimensions of the tables' datasets.
DIMENSIONS = {
    "start": ["starts"],
    "generation": ["generations"],
    "member": ["generations", "members"],
    "evaluation": ["evaluations"],
    "metric": ["metrics"],
    "sample": ["samples"],
    "prompt": ["prompts"],
}


def row_of(generation: int) -> tuple[dict, dict]:
    """A generation's row and its members' rows; every number tells which generation it belongs to."""
    names = [column.split(":")[0] for column in SCHEMA["generation"].split()]
    row = dict.fromkeys(names, float(generation + 1))
    row |= {"digest": 2**63 + generation, "tokens": generation, "unscored": 0}
    row |= {"bytes_communicated": 64, "bytes_gathered": 96}
    members = {
        "seed": np.arange(N, dtype=np.uint64) + np.uint64(2**63 + 1000 * (generation + 1)),
        "sign": np.array([1, -1] * (N // 2), dtype=np.int8),
        "reward": np.full(N, -generation - 0.5),
        "coefficient": np.full(N, generation / 8, dtype=np.float32),
        "rank": np.zeros(N),
        "tokens": np.full(N, generation),
        "seconds": np.full(N, 0.5),
        **{
            name: np.full(N, generation)
            for name in ("turns", "calls", "bad_calls", "cut", "failed", "replies")
        },
    }
    return row, members


def assert_whole(file: h5py.File, committed: int) -> None:
    """The committed rows are all there, and each is the one that was written."""
    assert file.attrs["generations_committed"] == committed
    rows = [row_of(generation) for generation in range(committed)]
    for part, table in enumerate(("generation", "member")):
        for name in file[table].keys() - {"checksum"}:
            dataset, expected = file[table][name], [row[part][name] for row in rows]
            assert np.array_equal(dataset[:committed].tolist(), np.array(expected).tolist()), (
                f"{table}/{name}"
            )


def evaluation_of(generation: int, split: str = "train") -> dict:
    row = {"reward_mean": -1.5, "accuracy": math.nan, "kl": math.nan, "tokens": 7, "drift_l2": math.nan}
    return {"generation": generation, "split": split, "answer_tokens": 3.5, **row}


def metric_of(generation: int, name: str = "format") -> dict:
    return {"generation": generation, "split": "train", "name": name, "mean": 0.25}


def sample_of(text: str, generation: int = 0) -> dict:
    return {"generation": generation, "split": "train", "prompt": text, "completion": text, "reward": -1.0}


def prompts_of(generation: int, accuracies: list[float], split: str = "held_out") -> dict:
    """Rows of /prompt, by column."""
    n = len(accuracies)
    where = {"generation": np.full(n, generation), "split": np.full(n, split, dtype=object)}
    measured = {"reward": np.arange(n) / 2, "accuracy": np.array(accuracies), "tokens": np.arange(n) + 5}
    return {**where, "number": np.arange(n), **measured}


def new_run(path: Path, generations: int = 20) -> RunFile:
    return RunFile.create(path, SETTINGS, START, population=N, generations=generations, **ATTRIBUTES)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "some" / "run.h5"


@pytest.fixture
def create(path):
    """create(generations=...) -> a writer."""
    made = []

    def make(generations: int = 20) -> RunFile:
        made.append(new_run(path, generations))
        return made[-1]

    yield make
    for log in made:
        log.file.close()


@pytest.fixture(scope="module")
def elsewhere():
    """elsewhere(function, *arguments): its result in another process, the same one for all calls.

    Within a process, HDF5 gives a reader the file that the writer has open, whatever is on disk.
    """
    with ProcessPoolExecutor(1, FORKS) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def read(path: Path, committed: int, locking: bool | None = None) -> None:
    """Read everything as this package does, or, with locking=False, as any user may."""
    with open_for_reading(path) if locking is None else h5py.File(path, "r", locking=locking) as file:
        assert_whole(file, committed)


# Schema


def test_every_dataset_of_the_schema_is_there(create, path):
    create().close()
    with open_for_reading(path) as file:
        assert set(file) == {*SCHEMA, "config", *itertools.chain(*DIMENSIONS.values())}
        for table, columns in SCHEMA.items():
            kinds = dict(column.split(":") for column in columns.split())
            assert set(file[table]) == set(kinds)
            for name, kind in kinds.items():
                dataset = file[table][name]
                if kind == "text":
                    assert h5py.check_string_dtype(dataset.dtype).encoding == "utf-8"
                else:
                    assert dataset.dtype == np.dtype(kind)
                assert dataset.shape[1:] == ((N,) if table == "member" else ())
                assert isinstance(dataset.attrs["units"], str)
                assert dataset.attrs["description"]


def test_numbers_have_units(create, path):
    create().close()
    with open_for_reading(path) as file:
        for table, columns in SCHEMA.items():
            for name, kind in (column.split(":") for column in columns.split()):
                assert kind == "text" or file[table][name].attrs["units"], f"{table}/{name}"
        assert file["generation/seconds_wait"].attrs["units"] == "s"
        assert file["generation/bytes_communicated"].attrs["units"] == "B"


def test_attributes(create, path):
    create().close()
    with open_for_reading(path) as file:
        assert file.attrs["schema_version"] == SCHEMA_VERSION == 2
        assert file.attrs["program"] == "mpies"
        assert file.attrs["population"] == N
        assert file.attrs["generations_committed"] == 0
        assert file.attrs["model_digest"] == 2**64 - 3 and file.attrs["model_digest"].dtype == np.uint64
        assert (file.attrs["model_path"], file.attrs["parameters"]) == ("some/model", 123)
        for name in ("program_version", "run_uuid", "created_utc"):
            assert file.attrs[name]


def test_runs_have_names_of_their_own(tmp_path):
    logs = [new_run(tmp_path / name / "run.h5") for name in ("a", "b")]
    assert logs[0].run_uuid != logs[1].run_uuid
    for log in logs:
        log.close()


# Writing and reading


def test_rows_come_back(create, path):
    log = create()
    for generation in range(5):
        log.append(*row_of(generation))
        assert log.committed == generation + 1
    log.close()
    with open_for_reading(path) as file:
        assert_whole(file, 5)


def test_text_comes_back(create, path):
    log = create()
    log.add_evaluation(evaluation_of(0), [sample_of("Name one primary color:"), sample_of("")])
    log.add_evaluation(evaluation_of(0, "held_out"), [])
    log.start("es: {sigma: 0.25}\n", {**START, "reason": "resumed"})
    log.close()
    with open_for_reading(path) as file:
        assert file["sample/prompt"].asstr()[:].tolist() == ["Name one primary color:", ""]
        assert file["evaluation/split"].asstr()[:].tolist() == ["train", "held_out"]
        assert file["evaluation/reward_mean"][:].tolist() == [-1.5, -1.5]
        assert np.isnan(file["evaluation/kl"][:]).all()
        assert file["start/reason"].asstr()[:].tolist() == ["new", "resumed"]
        assert [file[f"config/{name}"].asstr()[()] for name in sorted(file["config"])] == [
            SETTINGS,
            "es: {sigma: 0.25}\n",
        ]


def test_unscored_members_are_nan(create, path):
    log = create()
    row, members = row_of(0)
    members["reward"] = np.array([1.0, math.nan, 3.0, math.nan])
    log.append({**row, "unscored": 2}, members)
    log.close()
    with open_for_reading(path) as file:
        assert np.isnan(file["member/reward"][0]).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\r\n\ttab",
        "Zwölf Boxkämpfer 中文 العربية 🙂 e\u0301",
        "".join(map(chr, range(1, 256))),
        "\ufffd \ufeff \u2028 \U0010ffff",
        "x" * 100_000,
    ],
    ids=["lines", "scripts", "latin 1", "odd", "long"],
)
def test_any_text_in_samples(create, path, text):
    log = create()
    log.add_evaluation(evaluation_of(0), [sample_of(text)])
    log.close()
    with open_for_reading(path) as file:
        assert file["sample/completion"].asstr()[0] == text
        assert file["sample/prompt"].asstr()[0] == text


@pytest.mark.parametrize("text", ["\0", "a\0b", "a\0", "half of a pair: \ud83d", "\udcff"])
def test_text_that_hdf5_cannot_hold_is_replaced_not_cut(create, path, text):
    log = create()
    log.add_evaluation(evaluation_of(0), [sample_of(text + " and more")])
    log.close()
    with open_for_reading(path) as file:
        kept = file["sample/completion"].asstr()[0]
        assert kept.endswith(" and more") and len(kept) == len(text + " and more")


def test_rows_are_allocated_as_the_run_grows(create, path, elsewhere, monkeypatch):
    """Beyond what was allocated, the file is laid out anew; nothing that was committed may change."""
    monkeypatch.setattr(layout, "ALLOCATION", 1)
    log = create(generations=9)
    for generation in range(9):
        log.append(*row_of(generation))
        elsewhere(read, path, generation + 1)
    log.close()


def test_a_run_goes_on_with_more_generations(create, path):
    log = create(generations=2)
    for generation in range(2):
        log.append(*row_of(generation))
    log.close()
    log = RunFile.reopen(path, generations=5)
    assert log.committed == 2
    log.start(SETTINGS, {**START, "reason": "resumed"})
    for generation in range(2, 5):
        log.append(*row_of(generation))
    log.close()
    with open_for_reading(path) as file:
        assert_whole(file, 5)
        assert file["start/generation"][:].tolist() == [0, 2]


def test_history(create, path, elsewhere):
    log = create()
    for generation in range(3):
        log.append(*row_of(generation))
    log.add_evaluation(evaluation_of(2, "held_out"), [])
    history = elsewhere(read_history, path)
    assert history.generations == 3
    assert history.digest.tolist() == [2**63, 2**63 + 1, 2**63 + 2]
    assert history.seed.shape == history.coefficient.shape == (3, N)
    assert (history.model_path, history.model_digest) == ("some/model", 2**64 - 3)
    assert history.settings == SETTINGS
    assert history.held_out == {2: -1.5}
    assert history.first(1).digest.tolist() == [2**63]


# Readers while it is written


@pytest.mark.parametrize("locking", [None, False], ids=["reader", "plain h5py"])
def test_readers_see_committed_rows_only(create, path, elsewhere, locking):
    log = create()
    for generation in range(4):
        elsewhere(read, path, generation, locking)
        log.append(*row_of(generation))
        elsewhere(read, path, generation + 1, locking)
        log.add_evaluation(evaluation_of(generation), [sample_of("x", generation)])
    elsewhere(read, path, 4, locking)


def rows_beyond(path: Path, committed: int) -> bool:
    with open_for_reading(path) as file:
        return bool(
            file["member/seed"][committed:].any()
            or file["generation/digest"][committed:].any()
            or np.isfinite(file["generation/reward_mean"][committed:]).any()
        )


def test_rows_beyond_the_committed_ones_are_empty(create, path, elsewhere):
    log = create(generations=6)
    log.append(*row_of(0))
    assert not elsewhere(rows_beyond, path, 1)
    assert elsewhere(rows_beyond, path, 0)


def test_rows_that_a_killed_job_left_are_emptied(create, path):
    log = create(generations=6)
    log.append(*row_of(0))
    log.close()
    with h5py.File(path, "r+") as file:
        file["member/seed"][1] = 7
        file["generation/digest"][1] = 7
    log = RunFile.reopen(path, 6)
    log.start(SETTINGS, START)
    log.close()
    assert not rows_beyond(path, 1)


held = {}


def hold(path: Path) -> None:
    held[path] = open_for_reading(path)


def release(path: Path, committed: int) -> None:
    with held.pop(path) as file:
        assert_whole(file, committed)


def test_a_reader_that_stays_does_not_disturb_the_writer(create, path, elsewhere):
    log = create()
    log.append(*row_of(0))
    log.append(*row_of(1))
    elsewhere(hold, path)
    for generation in range(2, 5):
        log.add_evaluation(evaluation_of(generation), [])
        log.append(*row_of(generation))
    elsewhere(release, path, 2)
    elsewhere(read, path, 5)


def test_a_reader_minds_nobodys_lock(create, path, elsewhere):
    create().close()
    held[path] = h5py.File(path, "r+", locking=True)
    try:
        elsewhere(read, path, 0)
    finally:
        held.pop(path).close()


def write_impatiently(path: Path) -> None:
    clock = itertools.count(0, 5)
    storage.time = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    RunFile.reopen(path, 5)


def test_a_second_writer_is_refused(create, path, elsewhere):
    log = create()
    for generation in range(2):
        with pytest.raises(InputError, match=r"run\.directory: .* is in use by another job"):
            elsewhere(write_impatiently, path)
        log.append(*row_of(generation))
    log.add_evaluation(evaluation_of(2), [])  # the file is another one now
    with pytest.raises(InputError, match=r"run\.directory: .* is in use by another job"):
        elsewhere(write_impatiently, path)
    elsewhere(read, path, 2)


# Killed writers


def test_generations_overwrite_what_was_laid_out(create, path):
    """A kill cannot damage a structure that is not being changed."""
    log = create()
    before = path.stat()
    for generation in range(3):
        log.append(*row_of(generation))
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


def test_the_structure_is_changed_on_a_copy(create, path):
    log = create()
    log.append(*row_of(0))
    with open(path, "rb") as old:
        before = old.read()
        log.add_evaluation(evaluation_of(1), [sample_of("x")])
        log.start(SETTINGS, START)
        old.seek(0)
        # All but the superblock's marks of being open.
        assert old.read()[24:] == before[24:]
        assert path.stat().st_ino != os.fstat(old.fileno()).st_ino


def write_for_ever(path: Path, started) -> None:
    """Write as a job does, but as fast as possible."""
    layout.ALLOCATION = 1  # lays the file out anew often
    if path.exists():
        log = RunFile.reopen(path, 10**6)
        log.start(SETTINGS, START)
    else:
        log = new_run(path, 10**6)
    for generation in itertools.count(log.committed):
        if generation % 3 == 0:
            log.add_evaluation(evaluation_of(generation), [sample_of("x" * 1000, generation)])
        log.append(*row_of(generation))
        started.set()


@pytest.mark.lengthy
def test_a_killed_writer_leaves_a_whole_file(path):
    """SIGKILL at random moments; after each, the file is read, and the next writer goes on with it."""
    moments = random.Random(1)
    committed = 0
    for _ in range(30):
        started = FORKS.Event()
        job = FORKS.Process(target=write_for_ever, args=(path, started), daemon=True)
        job.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.1))
        job.kill()
        job.join()
        with open_for_reading(path) as file:
            before, committed = committed, int(file.attrs["generations_committed"])
            assert committed > before, "nothing that was committed is lost"
            assert_whole(file, committed)
            for table in ("start", "evaluation", "sample"):
                for dataset in file[table].values():
                    dataset[:]


# What is no run file, or cannot be written


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_for_reading(path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "no.h5") == "there is no such file"


@pytest.mark.parametrize(
    "content", [b"", b"no HDF5\n" * 100, b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 600]
)
def test_file_that_is_not_hdf5(tmp_path, content):
    path = tmp_path / "other.h5"
    path.write_bytes(content)
    assert "not a readable HDF5 file" in refusal(path)


def test_folder_instead_of_a_file(tmp_path):
    assert "a folder, not a run file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"schema_version": 1},
        {"program": "mpies"},
        {"program": "other", "schema_version": 1},
        {"program": "mpies", "schema_version": "one"},
        {"program": 3, "schema_version": 1},
    ],
)
def test_hdf5_file_of_another_program(tmp_path, attributes):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file["data"] = [1, 2, 3]
    assert refusal(path) == "an HDF5 file, but not a run file of mpies"


def test_newer_schema(create, path):
    create().close()
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    line = refusal(path)
    assert "schema 3 is newer than this program's 2" in line and "update mpies" in line


def test_incomplete_run_file(create, path):
    create().close()
    with h5py.File(path, "r+") as file:
        del file["member/seed"]
    with pytest.raises(InputError, match="a damaged run file") as error:
        read_history(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_is_there_is_not_overwritten(create, path):
    log = create()
    log.append(*row_of(0))
    log.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"run\.directory: ") as error:
        new_run(path)
    assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run.h5"
    with pytest.raises(InputError, match=rf"run\.directory: cannot write {path} \(\w") as error:
        new_run(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_cannot_be_begun_leaves_nothing(tmp_path, path, there):
    """As on a disk that is full."""
    if there:
        path.parent.mkdir(parents=True)
        (path.parent / "mine").write_text("")
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"^run.directory: cannot write {path} \(File too large\)$"):
            new_run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.rglob("*")) == before
    log = new_run(path)  # and no lock is held
    log.close()


def test_a_file_that_was_removed_is_not_written_on(create, path):
    log = create()
    log.append(*row_of(0))
    path.unlink()
    for write in (lambda: log.append(*row_of(1)), lambda: log.add_evaluation(evaluation_of(1), [])):
        with pytest.raises(StorageError, match="removed or replaced") as error:
            write()
        assert len(str(error.value).splitlines()) == 1
    assert not path.exists()


def test_only_the_run_file_is_left(create, path):
    log = create()
    log.append(*row_of(0))
    log.add_evaluation(evaluation_of(0), [sample_of("x")])
    log.close()
    assert set(os.listdir(path.parent)) <= {"run.h5", "run.lock"}


# Dimensions


def assert_dimensions(file: h5py.File) -> None:
    """Every dataset's dimensions are named by scales of its length, which count rows."""
    for table, columns in SCHEMA.items():
        for column in (column.split(":")[0] for column in columns.split()):
            dataset = file[table][column]
            assert [dims.keys() for dims in dataset.dims] == [[name] for name in DIMENSIONS[table]], (
                dataset.name
            )
            for name, length in zip(DIMENSIONS[table], dataset.shape, strict=True):
                assert file[name][:].tolist() == list(range(length)), dataset.name


def test_dimensions_are_named_and_grow_with_the_tables(create, path):
    log = create(generations=6)
    for generation in range(3):
        log.append(*row_of(generation))
    log.add_evaluation(evaluation_of(3), [sample_of("a"), sample_of("b")])
    log.close()
    with open_for_reading(path) as file:
        assert_dimensions(file)
        assert [len(file[name]) for name in ("starts", "generations", "members")] == [1, 6, N]
        assert [len(file[name]) for name in ("evaluations", "samples")] == [1, 2]


def test_a_file_without_dimensions_gets_them(create, path):
    """As the first version 0.1.0 wrote them."""
    create().close()
    with h5py.File(path, "r+") as file:
        for table in SCHEMA:
            for dataset in file[table].values():
                for dims in dataset.dims:
                    for scale in dims.values():
                        dims.detach_scale(scale)
        for name in {*itertools.chain(*DIMENSIONS.values())}:
            del file[name]
    log = RunFile.reopen(path, 20)
    log.start(SETTINGS, START)
    log.append(*row_of(0))
    log.close()
    with open_for_reading(path) as file:
        assert_whole(file, 1)
        assert_dimensions(file)


# Files of earlier versions


def test_a_file_of_an_earlier_version_gets_what_it_lacks_when_it_is_continued(create, path):
    log = create()
    log.append(*row_of(0))
    log.add_evaluation(evaluation_of(0), [])
    log.close()
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 1
        for table in SCHEMA.keys() - {"member"}:
            del file[table]["checksum"]
        del file["metric"], file["evaluation/answer_tokens"], file["generation/anchor_decay"]
        del file["member/seconds"]
    assert read_history(path).anchor_decay.tolist() == [0]
    log = RunFile.reopen(path, 20)
    log.start(SETTINGS, START)
    log.append(*row_of(1))
    log.add_evaluation(evaluation_of(1), [], [metric_of(1)])
    log.close()
    with open_for_reading(path) as file:
        for table, columns in SCHEMA.items():
            assert set(file[table]) == {column.split(":")[0] for column in columns.split()}
        assert np.isnan(file["generation/anchor_decay"][0]) and file["generation/anchor_decay"][1] == 2
        assert np.isnan(file["evaluation/answer_tokens"][0]) and file["evaluation/answer_tokens"][1] == 3.5
        assert file["member/seconds"].shape == (20, N) and file["metric/name"].asstr()[:].tolist() == [
            "format"
        ]
        assert file["member/reward"][:2].tolist() == [[-0.5] * N, [-1.5] * N]
        assert file.attrs["schema_version"] == SCHEMA_VERSION
    assert read_history(path).damage == Damage()


def test_further_figures(create, path):
    log = create()
    log.add_evaluation(evaluation_of(0), [], [metric_of(0), metric_of(0, "normalised")])
    log.close()
    with open_for_reading(path) as file:
        assert file["metric/name"].asstr()[:].tolist() == ["format", "normalised"]
        assert file["metric/mean"][:].tolist() == [0.25, 0.25]
        assert file["metric/split"].asstr()[:].tolist() == ["train", "train"]


def test_what_every_prompt_came_to(create, path):
    log = create()
    log.add_evaluation(evaluation_of(0), [], None, prompts_of(0, [1.0, 0.0, math.nan]))
    log.add_evaluation(evaluation_of(5), [], None, prompts_of(5, [1.0, 1.0]))
    log.close()
    with open_for_reading(path) as file:
        table = file["prompt"]
        assert table["generation"][:].tolist() == [0, 0, 0, 5, 5]
        assert table["split"].asstr()[:].tolist() == ["held_out"] * 5
        assert table["number"][:].tolist() == [0, 1, 2, 0, 1] and table["tokens"][:].tolist() == [
            5,
            6,
            7,
            5,
            6,
        ]
        assert np.isnan(table["accuracy"][2]) and table["reward"][2] == 1.0
        assert_dimensions(file)
    assert read_history(path).damage == Damage()
    with h5py.File(path, "r+") as file:
        file["prompt/reward"][3] = 7.0
    assert read_history(path).damage.damaged == ("prompt row 3",)


def test_evaluations_by_command_add_what_prompts_came_to_once(create, path):
    log = create()
    log.add_evaluation(evaluation_of(0, "held_out"), [], None, prompts_of(0, [1.0, 0.0]))
    rows = [evaluation_of(g, "held_out") for g in (0, 3)]
    log.add_command(rows, [], [], [], [], [prompts_of(0, [0.0, 0.0]), prompts_of(3, [0.0, 1.0])])
    log.close()
    with open_for_reading(path) as file:
        assert file["prompt/generation"][:].tolist() == [0, 0, 3, 3]
        assert file["prompt/accuracy"][:].tolist() == [1, 0, 0, 1]


# A task's own figures


def own_row(generation: int, **figures: float) -> tuple[dict, dict]:
    row, members = row_of(generation)
    row |= {f"cosine_{name}": value for name, value in figures.items()}
    members |= {f"metric_{name}": np.full(N, value) for name, value in figures.items()}
    return row, members


def test_a_figure_gets_a_column_when_it_is_measured_first(create, path):
    log = create()
    log.append(*row_of(0))
    log.append(*own_row(1, accuracy=0.5))
    log.append(*row_of(2))
    log.append(*own_row(3, accuracy=0.25, format=-1.0))
    log.close()
    with open_for_reading(path) as file:
        assert_dimensions(file)
        np.testing.assert_array_equal(file["generation/cosine_accuracy"][:4], [math.nan, 0.5, math.nan, 0.25])
        np.testing.assert_array_equal(file["generation/cosine_format"][:4], [*[math.nan] * 3, -1])
        assert file["member/metric_format"].shape == (20, N)
        assert file["member/metric_format"][3].tolist() == [-1] * N
        assert "accuracy" in file["member/metric_accuracy"].attrs["description"]
    assert read_history(path).damage == Damage()
    with h5py.File(path, "r+") as file:
        file["member/metric_accuracy"][1, 2] = 0.75
    assert read_history(path).damage.damaged == ("generation 2",)


def test_a_run_goes_on_with_the_columns_of_its_figures(create, path):
    log = create(generations=2)
    log.append(*own_row(0, accuracy=0.5))
    log.close()
    log = RunFile.reopen(path, 5)
    log.start(SETTINGS, START)
    for generation in range(1, 5):
        log.append(*own_row(generation, accuracy=0.5 + generation))
    log.close()
    with open_for_reading(path) as file:
        assert file["generation/cosine_accuracy"][:5].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
        assert_dimensions(file)
    assert read_history(path).damage == Damage()


def test_figures_have_any_name_and_there_are_not_endlessly_many(create, path):
    log = create()
    inode = path.stat().st_ino
    log.append(*own_row(0, **{"a/b": 1.0, "x\0\n": 2.0, "ü" * 200: 3.0}))
    assert path.stat().st_ino != inode, "the structure was changed on a copy"
    for generation in range(1, 5):
        log.append(*own_row(generation, **{f"at step {generation}.{i}": 1.0 for i in range(20)}))
    inode = path.stat().st_ino
    log.append(*own_row(5, **{"a/b": 5.0, "another": 4.0}))
    assert path.stat().st_ino == inode
    log.close()
    with open_for_reading(path) as file:
        own = [name for name in file["generation"] if name.startswith("cosine_")]
        assert len(own) == 32 and {"cosine_a_b", "cosine_x__", "cosine_" + "ü" * 93} < set(own)
        assert file["generation/cosine_a_b"][5] == 5
    assert read_history(path).damage == Damage()


# How large it is


@pytest.mark.parametrize(
    "population, generations, most",
    [(32, 16, 260_000), (32, 1, 260_000), (30, 500, 1_700_000), (8192, 100, 4_480_000)],
)
def test_a_file_without_rows_is_as_large_as_it_has_to_be(tmp_path, population, generations, most):
    """Rows of all generations, up to 4 MB, are there from the start; what is rarely filled takes no more."""
    path = tmp_path / "run.h5"
    given = {"population": population, "generations": generations}
    RunFile.create(path, SETTINGS, START, **given, **ATTRIBUTES).close()
    assert path.stat().st_size < most


def test_a_short_run_that_becomes_a_long_one_is_still_as_small(tmp_path):
    path = tmp_path / "run.h5"
    RunFile.create(path, SETTINGS, START, population=32, generations=1, **ATTRIBUTES).close()
    longer = RunFile.reopen(path, 1000)
    longer.start(SETTINGS, START)
    longer.close()
    with h5py.File(path) as file:
        data = sum(d.nbytes for table in ("member", "generation") for d in file[table].values())
    assert data < path.stat().st_size < 1.3 * data + 300_000


def test_a_lock_file_that_another_job_has_made_anew_is_not_ours(tmp_path, monkeypatch):
    """As when a job that could not begin takes its file away, and a third one comes, while we open it."""
    path, plain = tmp_path / "run.h5", storage._lock

    def interrupted(given):
        descriptor = plain(given)
        monkeypatch.undo()
        given.with_name(storage.LOCK).unlink()
        given.with_name(storage.LOCK).touch()
        return descriptor

    monkeypatch.setattr(storage, "_lock", interrupted)
    descriptor = storage.lock_folder(path)
    assert os.path.samestat(os.fstat(descriptor), path.with_name(storage.LOCK).stat())
    os.close(descriptor)
