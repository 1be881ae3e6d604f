"""Base and live weights: perturbing leaves no trace, live and update follow the definition, folders load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpies.errors import InputError
from mpies.model import saving
from mpies.model.weights import Weights, room_for, take_base, take_over
from mpies.noise import definition
from mpies.noise import device as device_kernels
from mpies.noise.cpu import CpuKernels
from mpies.noise.device import DeviceKernels

CPU = torch.device("cpu")
SIGMA = 0.01
SEEDS = np.array([11, 2**64 - 1, 12], dtype=np.uint64)
ORIGIN = {"run_uuid": "1-2-3", "generation": 4, "digest": "00ff"}
FACTORS = np.array([0.02, -0.3, 1e-4], dtype=np.float32)

MODELS = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def load(tiny_model):
    """load(live, kernels, **options of the checkpoint) -> (model, Weights)."""

    def make(live=torch.float32, kernels=None, **options):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(**options), dtype="auto")
        return model, take_over(model, live, CPU, kernels or CpuKernels(1))

    return make


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def all_bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def expected_live(weights: Weights, seed: int, scale: float) -> dict[str, bytes]:
    """By the definition of noise, parameter by parameter."""
    live = {}
    for name, base in weights.base.items():
        flat = base.numpy().reshape(-1)
        made = definition.perturbed(flat, seed, definition.parameter_id(name), scale)
        live[name] = bits(torch.from_numpy(made).to(weights.live[name].dtype))
    return live


# What the weights start from


@KINDS
@MODELS
@DTYPES
def test_base_is_the_checkpoint_and_live_its_cast(load, tiny_model, kind, tied, dtype):
    checkpoint = AutoModelForCausalLM.from_pretrained(tiny_model(kind=kind, tied=tied), dtype="auto")
    model, weights = load(dtype, kind=kind, tied=tied)
    state = checkpoint.state_dict()
    for name, base in weights.base.items():
        assert base.dtype == torch.float32
        assert torch.equal(base, state[name])
        assert bits(weights.live[name]) == bits(state[name].to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_of_16_bits_becomes_a_float32_base(load, tiny_model, stored):
    state = AutoModelForCausalLM.from_pretrained(tiny_model(dtype=stored), dtype="auto").state_dict()
    _, weights = load(dtype=stored)
    for name, base in weights.base.items():
        assert state[name].dtype == stored
        assert bits(base) == bits(state[name].float())


def test_the_checkpoint_in_memory_is_left_alone(tiny_model):
    """It may be a file that is mapped into memory."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype="auto")
    original = {name: parameter.data for name, parameter in model.named_parameters()}
    before = all_bits(original)
    weights = take_over(model, torch.float32, CPU, CpuKernels(1))
    weights.update(SEEDS, FACTORS)
    weights.perturb(1, SIGMA)
    assert all_bits(original) == before


@KINDS
@MODELS
def test_names_are_those_of_the_state_dict(load, kind, tied):
    model, weights = load(kind=kind, tied=tied)
    names = set(model.state_dict())
    assert set(weights.base) == (names - {"lm_head.weight"} if tied else names)
    assert weights.size == sum(p.numel() for p in model.parameters())


@DTYPES
def test_tied_parameters_are_one_and_stay_tied(load, dtype):
    model, weights = load(dtype, tied=True)
    assert "lm_head.weight" not in weights.base
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    weights.perturb(1, SIGMA)
    assert model.lm_head.weight.data_ptr() == weights.live["model.embed_tokens.weight"].data_ptr()
    # The logits are computed with it.
    states = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state
    logits = model(torch.tensor([[5, 6, 7]])).logits
    expected = states @ weights.live["model.embed_tokens.weight"].T
    torch.testing.assert_close(logits, expected)


def test_untied_parameters_get_noise_of_their_own(load):
    model, weights = load(tied=False)
    before = {name: base.clone() for name, base in weights.base.items()}
    weights.perturb(1, 1.0)
    head = model.lm_head.weight - before["lm_head.weight"]
    embedding = model.model.embed_tokens.weight - before["model.embed_tokens.weight"]
    assert abs(torch.corrcoef(torch.stack([head.reshape(-1), embedding.reshape(-1)]))[0, 1]) < 0.1


# Perturbing


@KINDS
@MODELS
@DTYPES
def test_perturbing_leaves_no_trace(load, kind, tied, dtype):
    model, weights = load(dtype, kind=kind, tied=tied)
    base, live, digest = all_bits(weights.base), all_bits(weights.live), weights.digest()
    logits = model(torch.tensor([[5, 6, 7]])).logits
    for seed in range(25):
        weights.perturb(seed, SIGMA)
        weights.perturb(seed, -SIGMA)
    assert all_bits(weights.base) == base
    assert weights.digest() == digest
    weights.show_base()
    assert all_bits(weights.live) == live
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, logits)


@KINDS
@MODELS
@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_live_follows_the_definition(load, kind, tied, dtype, sign):
    model, weights = load(dtype, kind=kind, tied=tied)
    weights.perturb(0, SIGMA)  # another member before: no trace of it either
    weights.perturb(2**64 - 1, sign * SIGMA)
    expected = expected_live(weights, 2**64 - 1, sign * SIGMA)
    assert all_bits(weights.live) == expected
    # The model computes with it.
    assert {name: bits(p) for name, p in model.named_parameters()} == expected


def test_signs_are_mirror_images(load):
    _, weights = load()
    for base in weights.base.values():
        base.zero_()
    weights.perturb(5, SIGMA)
    plus = {name: live.clone() for name, live in weights.live.items()}
    weights.perturb(5, -SIGMA)
    for name, live in weights.live.items():
        assert plus[name].count_nonzero() == live.numel()
        assert torch.equal(live, -plus[name])


# Updating


@KINDS
@MODELS
@pytest.mark.parametrize("kernels", [CpuKernels(1), CpuKernels(2), DeviceKernels()], ids=["1", "2", "device"])
def test_update_follows_the_definition(load, kind, tied, kernels):
    _, weights = load(torch.bfloat16, kernels, kind=kind, tied=tied)
    expected = {
        name: definition.updated(
            base.numpy().reshape(-1), SEEDS, FACTORS, definition.parameter_id(name)
        ).tobytes()
        for name, base in weights.base.items()
    }
    live, digest = all_bits(weights.live), weights.digest()
    weights.update(SEEDS, FACTORS)
    assert all_bits(weights.base) == expected
    assert weights.digest() != digest
    assert all_bits(weights.live) == live, "live weights change with perturb and show_base only"


def test_update_is_seen_after_show_base(load):
    _, weights = load(torch.float16)
    weights.update(SEEDS, FACTORS)
    weights.show_base()
    assert all_bits(weights.live) == {n: bits(base.half()) for n, base in weights.base.items()}


def test_update_without_directions_changes_nothing(load):
    _, weights = load()
    weights.base["model.norm.weight"][:3] = -0.0  # whose sign the addition of 0 would change
    base = all_bits(weights.base)
    weights.update(SEEDS[:0], FACTORS[:0])
    assert all_bits(weights.base) == base


def test_what_was_changed_or_shown_since_does_not_pass_for_the_base(load):
    _, weights = load(torch.bfloat16)
    name, other = "model.norm.weight", torch.arange(32.0)

    def fail_to_show():
        with pytest.raises(KeyError):
            weights.show([(name, 2 * other), ("no such", other)])

    changes = {
        "update": lambda: weights.update(SEEDS, FACTORS),
        "update of a tensor": lambda: weights.update_one(name, SEEDS, FACTORS),
        "restore": lambda: weights.restore(name, other),
        "perturb": lambda: weights.perturb(1, SIGMA),
        "show": lambda: weights.show([(name, -other)]),
        "show what an update would make": lambda: weights.show_updated(SEEDS, FACTORS),
        "show that fails": fail_to_show,
    }
    for change, make in changes.items():
        make()
        shown = {n: bits(base.bfloat16()) for n, base in weights.base.items()}
        assert all_bits(weights.live) != shown, change
        weights.show_base()
        assert all_bits(weights.live) == shown, change


def test_showing_the_base_again_costs_nothing(load):
    """A block of low-rank members shows it for every block, a member for every evaluation."""
    _, weights = load()
    weights.show_base()
    weights.live["model.norm.weight"].fill_(7)  # behind its back, to see whether it is written
    weights.show_base()
    assert weights.live["model.norm.weight"].eq(7).all()


# Taking over a model


def test_the_base_is_taken_from_the_model_before_there_are_live_weights(tiny_model):
    """An engine makes room for them when the checkpoint's memory is free again."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype="auto")
    logits = model(torch.tensor([[5, 6, 7]])).logits
    base = take_base(model, CPU)
    assert not any(parameter.numel() for parameter in model.parameters())
    live = room_for(base, torch.float32, CPU)
    weights = Weights(model, base, live, CpuKernels(1))
    assert weights.base is base and weights.live is live
    assert all(parameter.data_ptr() == live[name].data_ptr() for name, parameter in model.named_parameters())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, logits)


# Digest


@KINDS
@MODELS
def test_digest_is_the_same_for_all_kernels_and_dtypes(load, kind, tied):
    kernel_sets = [CpuKernels(1), CpuKernels(2), DeviceKernels()]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    digests = {load(d, k, kind=kind, tied=tied)[1].digest() for k in kernel_sets for d in dtypes}
    assert len(digests) == 1
    _, weights = load(kind=kind, tied=tied)
    parts = [
        definition.digest(base.numpy().reshape(-1), definition.parameter_id(name))
        for name, base in weights.base.items()
    ]
    assert digests == {sum(parts) % 2**64}
    assert 0 <= sum(parts) % 2**64 < 2**64


def test_digest_changes_with_any_parameter(load):
    _, weights = load()
    digests = {weights.digest()}
    for base in weights.base.values():
        base.view(-1).view(torch.int32)[-1] ^= 1
        digests.add(weights.digest())
    assert len(digests) == 1 + len(weights.base)


# Refusals


def module(parameter: torch.Tensor) -> torch.nn.Module:
    made = torch.nn.Module()
    made.config = SimpleNamespace()
    made.register_parameter("weight", torch.nn.Parameter(parameter, requires_grad=False))
    return made


def test_numbers_that_a_model_computes_with_are_in_the_digest():
    """Of buffers those that are saved: masks and tables are made anew."""

    def digest(bias: float, table: float) -> int:
        made = module(torch.ones(4))
        made.register_buffer("bias", torch.full((3,), bias))
        made.register_buffer("table", torch.full((3,), table), persistent=False)
        made.register_buffer("mask", torch.tensor([True]))
        return take_over(made, torch.float32, CPU, CpuKernels(1)).digest()

    assert digest(1.0, 1.0) == digest(1.0, 2.0) != digest(2.0, 1.0)
    assert take_over(module(torch.ones(4)), torch.float32, CPU, CpuKernels(1)).digest() != digest(1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_models_are_refused(dtype):
    with pytest.raises(
        InputError, match=r"weight is torch\.(u?int|float8_e)\w+; quantised models cannot be tuned"
    ) as error:
        take_over(module(torch.ones(4).to(dtype)), torch.float32, CPU, CpuKernels(1))
    assert len(str(error.value).splitlines()) == 1


# Saving


@KINDS
@MODELS
@DTYPES
def test_saved_folder_loads_with_the_same_weights(load, tiny_model, tmp_path, kind, tied, dtype):
    model, weights = load(dtype, kind=kind, tied=tied)
    weights.update(SEEDS, FACTORS)
    weights.show_base()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(kind=kind, tied=tied))
    saving.save(model, tokenizer, tmp_path / "model", ORIGIN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {name: bits(p) for name, p in loaded.named_parameters()} == all_bits(weights.live)
    assert loaded.config.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_saved_tokenizer_is_the_same(load, tiny_model, tmp_path):
    model, _ = load()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    saving.save(model, tokenizer, tmp_path / "model", ORIGIN)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Solve: 3 + 5 ="}]
    for options in ({"tokenize": False}, {"add_generation_prompt": True, "return_dict": False}):
        assert loaded.apply_chat_template(messages, **options) == tokenizer.apply_chat_template(
            messages, **options
        )
    assert loaded("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_copy_that_somebody_has_made_stays(load, tiny_model, tmp_path):
    model, _ = load()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    for name in ("model.old", "model.partial"):
        saving.save(model, tokenizer, tmp_path / name, ORIGIN)
    for _ in range(2):
        saving.save(model, tokenizer, tmp_path / "model", ORIGIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old", "model.partial"]


def test_saving_again_replaces_the_folder_and_leaves_no_other(load, tiny_model, tmp_path):
    model, weights = load()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    folder = tmp_path / "runs" / "model"
    for _ in range(2):
        weights.update(SEEDS, FACTORS)
        weights.show_base()
        saving.save(model, tokenizer, folder, ORIGIN)
        assert not (folder / "stale.safetensors").exists()
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        # What a killed save may leave at any moment: the next one must neither keep nor stumble over it.
        for name in ("model", ".model.mpies-partial", ".model.mpies-old"):
            (folder.parent / name).mkdir(exist_ok=True)
            (folder.parent / name / "stale.safetensors").write_text("of an earlier run")
    saving.save(model, tokenizer, folder, ORIGIN)
    assert not (folder / "stale.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {name: bits(p) for name, p in loaded.named_parameters()} == all_bits(weights.live)


def test_saved_folder_says_where_it_comes_from(load, tiny_model, tmp_path):
    model, _ = load()
    saving.save(model, AutoTokenizer.from_pretrained(tiny_model()), tmp_path / "model", ORIGIN)
    assert json.loads((tmp_path / "model" / "mpies.json").read_text()) == ORIGIN


def test_saved_files_may_be_read_by_whom_the_umask_allows(load, tiny_model, tmp_path):
    model, _ = load()
    saving.save(model, AutoTokenizer.from_pretrained(tiny_model()), tmp_path / "model", ORIGIN)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in [tmp_path / "plain", *(tmp_path / "model").iterdir()]}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", ["a file", "other things"])
def test_what_is_no_saved_model_is_not_replaced(load, tiny_model, tmp_path, kind):
    model, _ = load()
    folder = tmp_path / "mine"
    if kind == "other things":
        folder.mkdir()
    precious = folder / "thesis.tex" if kind == "other things" else folder
    precious.write_text("precious")
    with pytest.raises(InputError) as error:
        saving.save(model, AutoTokenizer.from_pretrained(tiny_model()), folder, ORIGIN)
    (line,) = str(error.value).splitlines()
    assert str(folder) in line
    assert precious.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# Memory


def peak_memory_of(work) -> int:
    """Bytes by which the process's resident memory rises above its start, at its highest."""
    status = Path("/proc/self/status")
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # forget the peak so far
    except OSError:
        pytest.skip("needs Linux's /proc to measure memory")

    def read(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    before = read("VmRSS")
    work()
    return read("VmHWM") - before


@pytest.mark.parametrize("kernels", [CpuKernels(1), CpuKernels(2), DeviceKernels()], ids=["1", "2", "device"])
def test_scratch_memory_is_less_than_a_tensor(monkeypatch, kernels):
    # The device kernels' scratch memory is a multiple of a slice, whatever the tensor's size.
    monkeypatch.setattr(device_kernels, "SLICE", 2**14)
    size = 2**22
    tensor_bytes = 4 * size

    def work():
        weights.perturb(1, SIGMA)
        weights.update(SEEDS, FACTORS)
        weights.digest()
        weights.show_base()

    # Compile first, and let the allocator settle.
    weights = take_over(module(torch.ones(300_000)), torch.bfloat16, CPU, kernels)
    work()
    weights = take_over(module(torch.ones(size)), torch.bfloat16, CPU, kernels)
    assert peak_memory_of(work) < tensor_bytes / 2


# Values that can be computed with


def test_values_have_to_fit_the_live_dtype(load):
    _, weights = load(torch.float16)
    assert weights.find_unfit() is None
    name = list(weights.base)[2]
    weights.base[name].view(-1)[5] = -65504.0
    assert weights.find_unfit() is None
    weights.base[name].view(-1)[5] = -70000.0
    assert weights.find_unfit() == f"{name} has values up to 7e+04, and float16 ends at 6.55e+04"
    weights.base[name].view(-1)[5] = torch.nan
    assert weights.find_unfit() == f"{name} has values that are not finite"
