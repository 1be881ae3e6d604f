"""Loading a model: from a folder, without a hub, and a clear line for everything that is no model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpies.errors import InputError
from mpies.model import embedded, loading

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever reaches for a hub is caught, with or without a network."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried, "a connection to the network was tried"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a model that may be damaged."""
    return shutil.copytree(tiny_model(), tmp_path / "model")


def the_line(path: Path | str) -> str:
    """The message with which a model is refused: one line."""
    with pytest.raises(InputError) as error:
        loading.load(str(path), allow_download=False)
    (line,) = str(error.value).splitlines()
    return line


def complaint(folder: Path) -> str:
    """What is said about a folder, without its name."""
    line = the_line(folder)
    assert line.startswith("model.path: ") and str(folder) in line
    return line.replace(str(folder), "")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# What is loaded


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folder(tiny_model, kind, dtype):
    path = tiny_model(kind=kind, dtype=dtype)
    model, tokenizer = loading.load(str(path), allow_download=False)
    assert model.config.model_type == kind
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.device for p in model.parameters()} == {CPU}
    assert not model.training
    for name, tensor in load_file(path / WEIGHTS).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    assert tokenizer.chat_template


def test_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for path in ("model", "./model/", "../" + folder.parent.name + "/model"):
        assert loading.load(path, allow_download=False)


def test_path_in_the_home_folder(folder, monkeypatch):
    """The shell leaves the ~ of model.path=~/model as it is."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert loading.load("~/model", allow_download=False)


def test_a_tokenizer_without_padding_token_pads_with_the_end(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))
    _, tokenizer = loading.load(str(folder), allow_download=False)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


# Models of other kinds

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHER_KINDS = {
    "t5": ({"is_encoder_decoder": True}, "an encoder-decoder model"),
    "bart": ({"is_encoder_decoder": True}, "an encoder-decoder model"),
    "whisper": ({"is_encoder_decoder": True}, "an encoder-decoder model"),
    "clip": ({}, "no causal language model"),
    "vit": (SIZES, "no causal language model"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("load", [loading.load, loading.outline])
def test_models_of_other_kinds(folder, kind, load):
    changes, words = OTHER_KINDS[kind]
    (folder / CONFIG).write_text(json.dumps({"model_type": kind, **changes}))
    with pytest.raises(InputError) as error:
        load(str(folder), False)
    assert str(error.value) == (
        f"model.path: cannot load {folder}: {kind} is {words}; mpies tunes text decoders, such as Llama and"
        " Qwen2"
    )


# What is not there


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "nothing", "~/nothing", "a/b/c"])
def test_missing_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert the_line(path) == f"model.path: cannot load {path}: there is no such folder"


def test_hub_id_that_is_not_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = the_line("no-such-organisation/no-such-model")
    assert line.startswith("model.path: cannot load no-such-organisation/no-such-model: ")
    assert "not in the local Hugging Face cache" in line
    assert "model.allow_download=true" in line


ASK_FOR_HUB_IDS = """
import socket
def refuse(*arguments, **_):
    print("tried to connect")
    raise OSError("no network in tests")
socket.socket.connect = socket.getaddrinfo = refuse
from mpies import errors
from mpies.model import loading
for path in ("no-such-model", "no-such-organisation/no-such-model"):
    try:
        loading.load(path, allow_download=False)
    except errors.InputError:
        print("refused")
import huggingface_hub
print(huggingface_hub.is_offline_mode())
"""


@pytest.mark.lengthy
def test_hub_is_left_alone_in_an_environment_that_allows_it(tmp_path):
    """Unlike that of the tests, which has HF_HUB_OFFLINE set."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HUB_IDS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split("\n") == ["refused", "refused", "True", ""]


def test_quickstart_that_was_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("MPIES_CACHE", str(tmp_path / "cache"))
    line = the_line("quickstart")
    assert line.startswith("model.path: ")
    assert str(tmp_path / "cache") in line
    assert "python -m mpies.quickstart.fetch" in line


def test_quickstart_is_in_the_cache(tiny_model, monkeypatch, tmp_path):
    shutil.copytree(tiny_model(kind="qwen2"), tmp_path / embedded.MODEL_NAME)
    monkeypatch.setenv("MPIES_CACHE", str(tmp_path))
    model, _ = loading.load("quickstart", allow_download=False)
    assert model.config.model_type == "qwen2"


def test_a_file_is_no_folder(folder):
    said = complaint(folder / CONFIG)
    assert "folder" in said and "repo" not in said.lower()


# What is damaged


def test_pickled_weights_are_refused(folder):
    """Unpickling runs any code that the file holds."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    said = complaint(folder)
    assert "only safetensors are read" in said and ".save_pretrained(NEW)" in said


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "it has no tokenizer; copy tokenizer.json" in complaint(folder)


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\nclass Model: pass\n")
    edit_config(
        folder, model_type="evil", auto_map={"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    )
    complaint(folder)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("text", ["", "{nope", "[]", "{}", "3", "\0"])
def test_damaged_config(folder, text):
    (folder / CONFIG).write_text(text)
    complaint(folder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "martian"}, "martian"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"dtype": "float7"}, "float7"),
        ({"dtype": "int8"}, "int8"),
        # Tensors that are not there would be filled with random numbers.
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"hidden_size": 64}, ".weight"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quanti"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_config_that_does_not_fit(folder, changes, named):
    edit_config(folder, **changes)
    assert named in complaint(folder)


def test_missing_tensor_is_not_filled_with_random_numbers(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight" in complaint(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_need_not_be_in_the_file(tiny_model, tied):
    path = tiny_model(tied=tied)
    assert ("lm_head.weight" in load_file(path / WEIGHTS)) != tied
    assert loading.load(str(path), allow_download=False)


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[:-100],
        lambda whole: whole[:20],
        lambda whole: b"",
        lambda whole: b"\xff" * 1000,
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    ],
    ids=["cut off", "cut off early", "empty", "garbage", "git-lfs"],
)
def test_damaged_weights(folder, content):
    path = folder / WEIGHTS
    path.write_bytes(content(path.read_bytes()))
    assert "safetensors" in complaint(folder)


def test_missing_shard(folder):
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in complaint(folder)


@pytest.mark.parametrize("content", [None, "{nope", "{}"], ids=["missing", "no JSON", "empty"])
def test_damaged_tokenizer(folder, content):
    path = folder / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert "tokenizer" in complaint(folder)


# The live dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_as_set(name):
    assert loading.choose_dtype(name, CPU) == (getattr(torch, name), "as set")


def test_dtype_of_this_machine():
    dtype, reason = loading.choose_dtype("auto", CPU)
    assert dtype in (torch.float32, torch.bfloat16)
    assert ("no fast bfloat16" in reason) == (dtype == torch.float32)
