"""Images in data: the same to a task wherever they come from; what cannot be is refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import datasets
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import seeing
from transformers.image_utils import load_image

from mpies import config, replica
from mpies.engines.base import prompt_text
from mpies.engines.image import images_in
from mpies.errors import InputError
from mpies.tasks import making
from mpies.tasks.base import Task

PICTURE, OTHER = seeing.picture(24, 16), seeing.picture(8, 8, 1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    (tmp_path / "pictures" / "b.png").write_bytes(OTHER)
    (tmp_path / "rewards.py").write_text("def reward(prompts, **_): return [0.0] * len(prompts)")
    return tmp_path


def task_of(path: Path, folder: Path, **settings: str) -> Task:
    reward = {f"{folder / 'rewards.py'}:reward": 1}
    return making.make(config.TaskSettings(reward=reward, train_data=str(path), **settings))


def written(folder: Path, *rows: dict) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row_of(folder: Path) -> list[dict]:
    data = written(folder, {"prompt": "a", "image": "pictures/a.png"})
    return task_of(data, folder, image_column="image").train


def message(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


TEXT = {"type": "text", "text": "What is it?"}


def test_the_same_images_from_everywhere(folder, monkeypatch):
    """A column of paths, of bytes in parquet, of a saved data set; parts of messages."""
    rows = [{"prompt": "What is it?", "image": "pictures/a.png"}]
    made = [task_of(written(folder, *rows), folder, image_column="image")]
    table = {"prompt": ["What is it?"], "image": [{"bytes": PICTURE, "path": None}]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train.parquet")
    made.append(task_of(folder / "train.parquet", folder, image_column="image"))
    saved = datasets.Dataset.from_dict({"prompt": ["What is it?"], "image": [str(folder / "pictures/a.png")]})
    saved.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    made.append(task_of(folder / "saved", folder, image_column="image"))
    bare = [{"prompt": message({"type": "image"}, TEXT), "image": ["pictures/a.png"]}]
    made.append(task_of(written(folder, *bare), folder, image_column="image"))
    monkeypatch.chdir("/")  # paths are relative to the data
    assert len({task.digest for task in made}) == 1
    for source in ({"image": "pictures/a.png"}, {"path": "pictures/a.png"}):
        made.append(task_of(written(folder, {"prompt": message({"type": "image", **source}, TEXT)}), folder))
    for task in made:
        (image,) = images_in(task.train[0]["prompt"])
        assert image.open().size == (24, 16) and copy.deepcopy(image) is image
        assert prompt_text(task.train[0]["prompt"]) == "<image>What is it?"
        assert task.has_images


def test_a_digest_is_of_what_images_hold(folder):
    data = written(folder, {"prompt": "a", "image": "pictures/a.png"})
    before = task_of(data, folder, image_column="image").digest
    (folder / "pictures" / "a.png").write_bytes(OTHER)
    assert task_of(data, folder, image_column="image").digest != before


@pytest.mark.parametrize("held, size", [(1, (24, 16)), (3, (24, 16)), (6, (16, 24)), (8, (16, 24))])
def test_a_picture_stands_as_its_camera_was_held(folder, held, size):
    """As transformers opens it."""
    place = folder / "pictures" / "a.png"
    with PIL.Image.open(place) as picture:
        kept = PIL.Image.Exif()
        kept[0x0112] = held
        picture.convert("RGB").save(folder / "pictures" / "a.jpg", exif=kept)
    (folder / "pictures" / "a.jpg").rename(place)
    (image,) = row_of(folder)[0]["image"]
    assert image.size == image.open().size == size == load_image(str(place)).size
    assert image.open().tobytes() == load_image(str(place)).tobytes()


def test_an_image_that_changes_meanwhile(folder):
    (row,) = row_of(folder)
    (folder / "pictures" / "a.png").write_bytes(OTHER)
    with pytest.raises(InputError, match=r"a\.png has changed since the job began$"):
        row["image"][0].open()


FILM, TWO = message({"type": "video", "video": "a.mp4"}), message({"type": "image"}, {"type": "image"})
BAD = {
    "missing": ("no.png", "a", r"image\[0\]: cannot read the image \S+no\.png \(No such file"),
    "text": ("train.jsonl", "a", r"train\.jsonl is no image that can be read \(cannot identify"),
    "number": (3, "a", r"image\[0\]: given 3, needed is a file's path, or its bytes$"),
    "address": ("https://a.b/c.png", "a", r"needed is a file's path.*nothing is downloaded$"),
    "too many": (["pictures/a.png"] * 300, "a", r"given 300 images, allowed are up to 256$"),
    "fewer": (
        "pictures/a.png",
        TWO,
        r"2 part\(s\) of type image without an image, but the row has 1 image\(s\); ",
    ),
    "none": (None, TWO, r"2 part\(s\) of type image without an image, but the row has 0 image\(s\); "),
    "a film": (None, FILM, r"a part of type 'video'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be(folder, case):
    image, prompt, words = BAD[case]
    data = written(folder, {"prompt": prompt, "image": image})
    with pytest.raises(InputError, match=words) as error:
        task_of(data, folder, image_column="image")
    line = str(error.value)
    assert "\n" not in line and line.startswith("task.train_data: ") and "line 1: " in line


def test_a_damaged_image(folder):
    """Its head is good: what is wrong is told when it is decoded, before the first generation."""
    (folder / "pictures" / "a.png").write_bytes(PICTURE[: len(PICTURE) // 2])
    (row,) = row_of(folder)
    with pytest.raises(InputError, match=r"a\.png is no image that can be read \("):
        row["image"][0].open()


def test_images_for_a_model_that_reads_text(alone, folder, tiny_model):
    data = written(folder, {"prompt": "a", "image": "pictures/a.png"})
    task = task_of(data, folder, image_column="image")
    given = [f"model.path={tiny_model()}", "run.directory=none", "model.device=cpu"]

    with pytest.raises(
        InputError, match=r"^task\.train_data: its prompts have images, but LlamaForCausalLM reads text"
    ):
        replica.build(alone, config.load([*given, "task.name=conciseness"]), task)
