"""Checksums: whatever value of a run file is changed, its row is named; nothing else is."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import h5py
import launching
import numpy as np
import pytest

from mpies.errors import InputError
from mpies.runfile import ALL_TABLES, RunFile, read_history
from mpies.runfile.checksum import Damage
from mpies.runfile.schema import ATTRIBUTES

REFERENCE = launching.DATA / "schema-2.h5"
GENERATIONS, MEMBERS = 5, 6


@pytest.fixture
def path(tmp_path) -> Path:
    return Path(shutil.copy(REFERENCE, tmp_path / "run.h5"))


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bytes):
        return value.decode() + "!"
    if isinstance(value, np.floating):
        return 1.5 if value != 1.5 else 2.5
    return value ^ value.dtype.type(1)


def columns() -> list[str]:
    with h5py.File(REFERENCE) as file:
        return [f"{table}/{name}" for table in ALL_TABLES.keys() & file.keys() for name in file[table]]


def test_a_whole_file_has_no_damage():
    assert read_history(REFERENCE).damage == Damage() and str(Damage()) == ""


@pytest.mark.parametrize("column", sorted(columns()))
def test_a_changed_value_is_named_with_its_row(path, column):
    table = column.split("/")[0]
    with h5py.File(path, "r+") as file:
        where = (1, 2) if table == "member" else 1
        if not len(file[column]):
            pytest.skip("this table has no rows here")
        file[column][where] = changed(file[column][where])
    damage = read_history(path).damage
    if table in ("generation", "member"):
        assert (damage.good, damage.damaged) == (1, ("generation 2",))
        assert str(damage) == "damaged: generation 2; generations 1 to 1 are good"
    else:
        assert damage.good == math.inf and len(damage.damaged) == 1
        assert damage.damaged[0].startswith(table) and damage.damaged[0].endswith(" 1")


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name not in ("program", "population")])
def test_a_changed_attribute_is_named(path, name):
    with h5py.File(path, "r+") as file:
        value = file.attrs.get(name, "")  # there is no `left_out` where everything is tuned
        file.attrs.modify(name, value + "!" if isinstance(value, str) else value + type(value)(1))
    damage = read_history(path).damage
    assert damage.damaged == ("start, settings or attributes: 0", "start, settings or attributes: 1")


def test_changed_settings_are_named(path):
    with h5py.File(path, "r+") as file:
        text = file["config/001"].asstr()[()]
        del file["config/001"]
        file["config/001"] = text.replace("sigma: 0.02", "sigma: 0.03")
    assert read_history(path).damage.damaged == ("start, settings or attributes: 1",)


def test_a_checksum_is_what_the_docs_say(path):
    """Computed again from the words of docs/run-file.md."""
    with h5py.File(path) as file:
        checksum = file["evaluation/checksum"]
        total = hashlib.blake2b((3).to_bytes(8, "little"), digest_size=8)
        for name in checksum.attrs["covers"].split():
            value = file[name][3]
            data = value if isinstance(value, bytes) else value.tobytes()
            total.update(name.encode() + b"\0")
            total.update(len(data).to_bytes(8, "little") + data if isinstance(value, bytes) else data)
        assert int.from_bytes(total.digest(), "little") == checksum[3]


def test_what_users_add_is_no_damage(path):
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "the good one"
        file["generation/mine"] = np.arange(GENERATIONS)
        file["notes/first"] = "hello"
    assert read_history(path).damage == Damage()
    RunFile.reopen(path, GENERATIONS).close()


# The counter


@pytest.mark.parametrize("count", [-3, GENERATIONS + 1, 2**40])
def test_a_counter_that_cannot_be_is_refused(path, count):
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", count)
    with pytest.raises(InputError, match=rf"damaged run file \(.*{count} generations"):
        read_history(path)


def test_a_counter_that_counts_rows_which_are_empty_is_named(path):
    log = RunFile.reopen(path, GENERATIONS + 8)
    log.start("es: {generations: 13}\n", dict.fromkeys(("hosts", "devices", "versions"), "") | OTHER)
    log.close()
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", GENERATIONS + 1)
    assert read_history(path).damage.damaged == (f"generation {GENERATIONS + 1}",)
    assert read_history(path).damage.good == GENERATIONS


OTHER = {"world_size": 1, "reason": "resumed", "rewards": "{}"}


def test_a_counter_that_forgets_generations_is_named(path):
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", 3)
    damage = read_history(path).damage
    assert damage.damaged == ("the counter, which says 3, though 2 more generations are there",)
    with pytest.raises(InputError, match="the counter"):
        RunFile.reopen(path, GENERATIONS)


def test_one_generation_that_a_killed_job_did_not_count_is_no_damage(path):
    with h5py.File(path, "r+") as file:
        file.attrs.modify("generations_committed", GENERATIONS - 1)
    assert read_history(path).damage == Damage(uncounted=1)
    RunFile.reopen(path, GENERATIONS).close()


# Going on


def test_columns_of_different_lengths_are_named(path):
    with h5py.File(path, "r+") as file:
        file["evaluation/kl"].resize(len(file["evaluation/kl"]) + 4, axis=0)
    assert read_history(path).damage.damaged == ("evaluation, whose columns differ in length",)


def test_a_link_that_leads_nowhere_is_a_damaged_file(path):
    with h5py.File(path, "r+") as file:
        del file["member/tokens"]
        file["member/tokens"] = h5py.SoftLink("/nowhere")
    with pytest.raises(InputError, match="damaged run file"):
        read_history(path)


def test_a_damaged_file_is_not_written_to(path):
    with h5py.File(path, "r+") as file:
        file["member/tokens"][2, 1] += 1
    before = path.read_bytes()
    with pytest.raises(InputError) as refused:
        RunFile.reopen(path, GENERATIONS + 1)
    assert "damaged: generation 3; generations 1 to 2 are good" in str(refused.value)
    assert "Put back a copy" in str(refused.value)
    assert path.read_bytes() == before


def test_a_file_that_claims_terabytes_is_refused_before_it_is_read(path):
    with h5py.File(path, "r+") as file:
        file["evaluation/tokens"].resize(10**11, axis=0)
    with pytest.raises(InputError, match="/evaluation/tokens claims 800000000000 bytes"):
        read_history(path)


def test_a_file_of_schema_1_has_checksums_once_a_job_goes_on_with_it(tmp_path):
    path = Path(shutil.copy(launching.DATA / "schema-1.h5", tmp_path / "run.h5"))
    assert read_history(path).damage == Damage()
    log = RunFile.reopen(path, GENERATIONS)
    log.start("es: {generations: 5}\n", dict.fromkeys(("hosts", "devices", "versions"), "") | OTHER)
    log.close()
    with h5py.File(path, "r+") as file:
        assert file.attrs["schema_version"] == 2 and (file["generation/checksum"][:] != 0).all()
        assert read_history(path).damage == Damage()
        file["generation/tokens"][4] += 1
    assert read_history(path).damage.damaged == ("generation 5",)
