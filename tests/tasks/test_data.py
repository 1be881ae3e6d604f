"""The user's own data: every format, and one clear line for what is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.tasks import making

REWARD = "def length(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
ROWS = [
    {"prompt": "Say hello.", "answer": "hello", "level": 1},
    {"prompt": "Say no.", "answer": "no", "level": 2},
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]


@pytest.fixture
def make(tmp_path):
    """make(train file, ...) -> the task of a reward function and data files."""
    (tmp_path / "rewards.py").write_text(REWARD)

    def build(train: Path, **settings):
        reward = f"{tmp_path / 'rewards.py'}:length"
        return making.make(config.TaskSettings(reward=reward, train_data=str(train), **settings))

    return build


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def json_list(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def json_line(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows))
    return path


def parquet(path: Path, rows: list) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def saved(path: Path, rows: list) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


FORMATS = {
    "train.jsonl": jsonl,
    "lines.json": jsonl,
    "list.json": json_list,
    "line.json": json_line,
    "train.parquet": parquet,
    "folder": saved,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(make, tmp_path, name):
    task = make(FORMATS[name](tmp_path / name, ROWS))
    assert (task.name, task.train, task.held_out) == ("custom", ROWS, [])
    assert task.digest == make(jsonl(tmp_path / "other.jsonl", ROWS)).digest
    assert task.score(task.train, ["abc", ""]).tolist() == [-3, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_chat_messages(make, tmp_path, name):
    task = make(FORMATS[name](tmp_path / name, [{"prompt": CHAT}, {"prompt": CHAT[1:]}]))
    assert [row["prompt"] for row in task.train] == [CHAT, CHAT[1:]]


def text_parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", FORMATS)
def test_content_in_parts_is_joined(make, tmp_path, name):
    """As chat templates join them; a parquet file has a column for every key of every part."""
    user = {"role": "user", "content": text_parts("Say ", "hello.")}
    rows = [{"prompt": [user]}, {"prompt": [{"role": "system", "content": text_parts("Be brief.")}, user]}]
    task = make(FORMATS[name](tmp_path / name, rows))
    assert [row["prompt"] for row in task.train] == [CHAT[1:], CHAT]


def test_parts_may_have_keys_without_values(make, tmp_path):
    part = {"type": "text", "text": "Say hello.", "image": None, "cache_control": {"type": "ephemeral"}}
    user = {"role": "user", "content": [part], "tool_calls": None}
    (row,) = make(jsonl(tmp_path / "train.jsonl", [{"prompt": [user]}])).train
    assert row["prompt"] == [{"role": "user", "content": "Say hello.", "tool_calls": None}]


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_without_end_is_refused_before_it_becomes_tokens(make, tmp_path, chat):
    def rows(size: int) -> list[dict]:
        content = "a" * size
        return [{"prompt": "a"}, {"prompt": [{"role": "user", "content": content}] if chat else content}][
            chat:
        ]

    path = tmp_path / "train.jsonl"
    line = told(make, jsonl(path, rows(10_000_000)))
    assert (
        f"line {2 - chat}: prompt: given 10,000,000 characters, allowed are up to 1,000,000; shorten" in line
    )
    assert make(jsonl(path, rows(1_000_000))).train


def test_missing_values_are_none(make, tmp_path):
    task = make(jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": "c"}]))
    assert task.train == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "c"}]


def test_files_of_other_systems(make, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa9\xe2\x80\xa8"}')
    assert [row["prompt"] for row in make(path).train] == ["a", "é\u2028"]


def test_another_column_with_the_prompts(make, tmp_path):
    path = jsonl(tmp_path / "train.jsonl", [{"question": "Why?", "prompt": "not this"}])
    assert make(path, prompt_column="question").train == [{"prompt": "Why?", "question": "Why?"}]


def test_train_and_eval_data(make, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [{"prompt": str(i)} for i in range(10)])
    held_out = jsonl(tmp_path / "eval.jsonl", [{"prompt": f"e{i}"} for i in range(10)])

    def prompts(**settings) -> tuple[str, str]:
        task = make(train, **settings)
        return tuple(" ".join(row["prompt"] for row in rows) for rows in (task.train, task.held_out))

    assert prompts(train_size=3) == ("0 1 2", "")
    assert prompts(train_size=3, eval_size=2) == ("0 1 2", "3 4")
    assert prompts(train_size=3, eval_size=2, eval_data=str(held_out)) == ("0 1 2", "e0 e1")
    assert prompts(eval_data=str(held_out)) == ("0 1 2 3 4 5 6 7 8 9", "e0 e1 e2 e3 e4 e5 e6 e7 e8 e9")


def test_the_digest_is_that_of_the_rows(make, tmp_path):
    def digest(rows, held_out=ROWS):
        held_out = jsonl(tmp_path / "eval.jsonl", held_out)
        return make(jsonl(tmp_path / "train.jsonl", rows), eval_data=str(held_out)).digest

    other = [ROWS[0], ROWS[1] | {"level": 3}]
    assert len({digest(ROWS), digest(other), digest(ROWS[::-1]), digest(ROWS, other), digest(ROWS[:1])}) == 5
    assert digest(ROWS) == digest([dict(reversed(row.items())) for row in ROWS])


# What is wrong


def told(make, path: Path, **settings) -> str:
    with pytest.raises(InputError) as error:
        make(path, **settings)
    (line,) = str(error.value).splitlines()
    assert path.name in line
    return line


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("d.jsonl", GOOD + '{"prompt": "b"', "line 2 is not JSON"),
        ("d.jsonl", GOOD + "\n\nprompt\n", "line 4 is not JSON (Expecting value)"),
        ("d.jsonl", GOOD + "[1]\n", "line 2: given [1], needed is an object"),
        (
            "d.jsonl",
            GOOD + '{"question": "b", "answer": 1}',
            "line 2: no column 'prompt', only question, answer",
        ),
        ("d.jsonl", GOOD + '{"prompt": 5}', "line 2: prompt: given 5, needed is text, or chat messages"),
        ("d.jsonl", GOOD + '{"prompt": ""}', "line 2: prompt: given ''"),
        ("d.jsonl", GOOD + '{"prompt": []}', "line 2: prompt: given []"),
        ("d.jsonl", GOOD + '{"prompt": [{"role": "user"}]}', "line 2: prompt: given [{'role': 'user'}]"),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"role": "user", "content": ["a"]}]}',
            'line 2: prompt[0].content[0]: given \'a\', needed is a part such as {"type": "text"',
        ),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}',
            "line 2: prompt[0].content[0]: given {'type': 'text'}, needed is a part",
        ),
        (
            "d.jsonl",
            GOOD
            + '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}',
            "line 2: its prompt has 1 part(s) of type image without an image, but the row has 0 image(s)",
        ),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"role": "user", "content": []}]}',
            "line 2: prompt[0].content: given [], needed is text",
        ),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null,'
            ' "tool_calls": [{"type": "function"}]}]}',
            "line 2: prompt[1].content: given None, needed is text; write what the message's tool_calls say",
        ),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"role": "user", "content": null}]}',
            "line 2: prompt[0].content: given None, needed is text, or parts such as",
        ),
        (
            "d.jsonl",
            GOOD + '{"prompt": [{"content": "a"}]}',
            "line 2: prompt: given [{'content': 'a'}], needed is text, or chat messages",
        ),
        ("d.jsonl", GOOD + '{"prompt": "b", "completions": 1}', "line 2: column 'completions'"),
        ("d.jsonl", "", "it has no rows"),
        ("d.jsonl", "\n\n", "it has no rows"),
        ("d.json", "[]", "it has no rows"),
        ("d.json", '[\n{"prompt": "a"},\n{"prompt": 5}\n]', "line 3: prompt: given 5"),
        ("d.json", '[\n{"prompt":\n "a"},\n\n{"prompt" "b"}\n]', "line 5 is not JSON"),
        ("d.json", '[{"prompt": "a"}', "line 1 is not JSON"),
        ("d.json", '[{"prompt": "a"}\n,', "line 2 is not JSON"),
        ("d.json", '[{"prompt": "a"} {"prompt": "b"}]', "line 1 is not JSON"),
        ("d.json", '[{"prompt": "a"}] and more', "line 1 is not JSON"),
        ("d.json", '{"data": [{"prompt": "a"}]}', "line 1: no column 'prompt', only data"),
        ("d.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("d.csv", "prompt\na\n", "cannot tell its kind; needed is a .json, .jsonl or .parquet file"),
    ],
)
def test_one_line_says_what_and_where(make, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    line = told(make, tmp_path / name)
    assert line.startswith("task.train_data: ") and words in line


def test_what_is_not_there(make, tmp_path):
    assert "there is no such file or folder" in told(make, tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["openai/gsm8k", "imdb"])
def test_a_data_set_of_a_hub_is_told_how_it_is_taken(make, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = told(make, Path(name))
    assert "there is no such file or folder" in line
    assert line.endswith(
        "; if it is a data set of a hub, download it first:"
        f" datasets.load_dataset('{name}', split='train').save_to_disk(FOLDER)"
    )


def test_what_is_not_text(make, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "\xff"}')
    assert "not UTF-8 text (byte 12)" in told(make, tmp_path / "train.jsonl")


def test_what_is_not_parquet(make, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_text("prompt")
    assert "cannot be read" in told(make, tmp_path / "train.parquet")


def test_folders_of_other_kinds(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "other").mkdir()
    assert "was not written by datasets.save_to_disk" in told(make, tmp_path / "other")
    parts = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)
    )
    parts.save_to_disk(str(tmp_path / "parts"))
    line = told(make, tmp_path / "parts")
    assert "the splits train, test" in line and line.endswith(str(tmp_path / "parts" / "train"))
    assert make(tmp_path / "parts" / "train").train == ROWS


@pytest.mark.parametrize("name, module", [("train.parquet", "pyarrow.parquet"), ("folder", "datasets")])
def test_libraries_that_are_missing_are_named(make, tmp_path, monkeypatch, name, module):
    FORMATS[name](tmp_path / name, ROWS)
    monkeypatch.setitem(sys.modules, module, None)
    package = module.split(".")[0]
    assert f"needs {package}: pip install {package}" in told(make, tmp_path / name)


def test_bad_eval_data_are_named_so(make, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError, match=r"^task.eval_data: .*none.jsonl: there is no such file"):
        make(train, eval_data=str(tmp_path / "none.jsonl"))


def test_too_few_rows(make, tmp_path):
    path = jsonl(tmp_path / "train.jsonl", ROWS)
    assert "task.train_size: given 3, but" in told(make, path, train_size=3)
    with pytest.raises(InputError, match=r"^task.prompts_per_generation: given 3, but there are 2 training"):
        make(path, prompts_per_generation=3)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (
            {"train_size": 2, "eval_size": 1},
            "task.eval_size: given 1, but {path}, behind the 2 for training, has 0",
        ),
        (
            {"train_size": 1, "eval_size": 5},
            "task.eval_size: given 5, but {path}, behind the 1 for training, has 1",
        ),
        (
            {"eval_size": 1},
            "task.eval_size: given 1, but without task.train_size all rows of {path} are for training",
        ),
        ({"eval_size": 3, "eval_data": "{path}"}, "task.eval_size: given 3, but {path} has 2 rows"),
        ({"train_size": 3, "eval_data": "{path}"}, "task.train_size: given 3, but {path} has 2 rows"),
    ],
)
def test_more_rows_than_there_are(make, tmp_path, sizes, words):
    path = jsonl(tmp_path / "train.jsonl", ROWS)
    sizes = {key: str(path) if value == "{path}" else value for key, value in sizes.items()}
    assert told(make, path, **sizes).startswith(words.format(path=path))


@pytest.mark.parametrize("name", ["questions", "conciseness", "countdown", "math"])
@pytest.mark.parametrize("key", ["train_size", "eval_size"])
def test_more_rows_than_a_task_of_ours_has(name, key):
    size = {"countdown": 100_001, "questions": 101}.get(name, 29)
    with pytest.raises(InputError, match=rf"^task\.{key}: given {size}, but [^\n]*$"):
        making.make(config.TaskSettings(name=name, **{key: size}))


def test_rows_of_our_own_are_the_first():
    task = making.make(config.TaskSettings(train_size=1, eval_size=3))
    whole = making.make(config.TaskSettings())
    assert (task.train, task.held_out) == (whole.train[:1], whole.held_out[:3])


@pytest.mark.parametrize("key", ["prompts", "chat", "parts"])
def test_half_a_character_is_no_text(make, tmp_path, key):
    content = {"parts": text_parts("a", "b\ud800")}.get(key, "b\ud800")
    prompt = content if key == "prompts" else [{"role": "user", "content": content}]
    place = {"prompts": "prompt", "chat": "prompt[0].content", "parts": "prompt[0].content[1]"}[key]
    line = told(make, jsonl(tmp_path / "train.jsonl", [{"prompt": prompt}]))
    assert line.endswith(
        f"line 1: {place}: character 2 is '\\ud800', half of a character; correct the text,"
        " or leave the row out"
    )


def test_text_and_chat_messages_do_not_mix(make, tmp_path):
    path = jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": CHAT}])
    with pytest.raises(
        InputError, match=r"^task.train_data: some prompts are text and some are chat messages"
    ):
        make(path)


# Prompts per generation


@pytest.fixture
def sampled(make, tmp_path):
    """sampled(n of 10 prompts, seed) -> generation -> the prompts of that generation."""

    def build(size: int, seed: int = 7):
        path = jsonl(tmp_path / "train.jsonl", [{"prompt": str(i)} for i in range(10)])
        reward = f"{tmp_path / 'rewards.py'}:length"
        settings = config.TaskSettings(reward=reward, train_data=str(path), prompts_per_generation=size)
        task = making.make(settings, seed)
        return lambda generation: [int(row["prompt"]) for row in task.rows(generation)]

    return build


@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_epoch_uses_every_prompt_once(sampled, size):
    prompts = sampled(size)
    turns = 10 // size
    for epoch in range(20):
        used = [p for turn in range(turns) for p in prompts(epoch * turns + turn)]
        assert sorted(used) == list(range(10))
    assert len({tuple(prompts(turns * epoch)) for epoch in range(20)}) > (5 if size == 1 else 15)


@pytest.mark.parametrize("size", [3, 4, 6, 9])
def test_what_does_not_divide_sits_an_epoch_out(sampled, size):
    prompts, turns = sampled(size), 10 // size
    left_out = set()
    for epoch in range(40):
        used = [p for turn in range(turns) for p in prompts(epoch * turns + turn)]
        assert len(used) == len(set(used)) == turns * size
        left_out |= set(range(10)) - set(used)
    assert left_out == set(range(10))


def test_prompts_follow_from_seed_and_generation(sampled):
    one, same, other = sampled(3), sampled(3), sampled(3, seed=8)
    assert [one(g) for g in range(30)] == [same(g) for g in reversed(range(30))][::-1]
    assert [one(g) for g in range(30)] != [other(g) for g in range(30)]
    # Pinned: a resumed run has to use the same prompts, with every version.
    assert [one(g) for g in range(3)] == [[7, 2, 6], [1, 9, 3], [4, 5, 0]]


def test_every_prompt_is_as_likely(sampled):
    prompts = sampled(4)
    counts = np.bincount([p for g in range(2000) for p in prompts(g)], minlength=10)
    assert (abs(counts - 800) < 5 * np.sqrt(800 * 0.6)).all(), counts


@pytest.mark.parametrize("size", [0, 10])
def test_all_prompts_are_in_their_own_order(sampled, size):
    assert sampled(size)(5) == list(range(10))


def test_evaluations_do_not_answer_all_of_many_training_prompts(make, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [{"prompt": str(i)} for i in range(10)])
    sizes = {n: len(rows) for n, rows in make(train, prompts_per_generation=2).splits.items()}
    assert sizes == {"train": 2}
    task = make(train, prompts_per_generation=2, train_size=6, eval_size=4)
    assert {n: len(rows) for n, rows in task.splits.items()} == {"train": 4, "held_out": 4}
    task = make(train, train_size=6, eval_size=4)
    assert {n: len(rows) for n, rows in task.splits.items()} == {"train": 6, "held_out": 4}
