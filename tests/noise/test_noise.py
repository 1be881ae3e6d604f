"""Noise: both kernel sets give the definition's bits, whatever the threads, slices, dtypes and values."""

from __future__ import annotations

import hashlib
import itertools
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from mpies.noise import definition, kernels_for
from mpies.noise import device as noise_on_device
from mpies.noise.cpu import GRAIN, CpuKernels
from mpies.noise.definition import CHUNK
from mpies.noise.device import DeviceKernels

if find_spec("triton"):
    import triton

    from mpies.noise.gpu import GpuKernels

    LOSES_SIGNS = triton.__version__.startswith("3.8.") and not torch.cuda.is_available()

SEED = 0x0123456789ABCDEF
PARAMETER = definition.parameter_id("model.layers.0.mlp.up_proj.weight")
SCALE = 0.0123

CPU = torch.device("cpu")
DEVICES = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]
THREADED = [pytest.param(CpuKernels(n), CPU, id=f"cpu-{n}-threads") for n in (1, 2, 3)]
KERNELS = pytest.mark.parametrize(
    "kernels, device",
    [
        *THREADED,
        *(pytest.param(DeviceKernels(), device, id=f"device-{device}") for device in DEVICES),
        *([pytest.param(GpuKernels(), DEVICES[-1], id=f"gpu-{DEVICES[-1]}")] if find_spec("triton") else []),
    ],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Around the chunk; and so long that three threads split it, not at multiples of anything.
SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77]
LONG = 4 * GRAIN + 12345
# A position crosses 2^32 within the tensor, and so does, at 2^35, a block number.
STARTS = [0, 1, 77, CHUNK, 2**32 - 100, 2**35 - 300, 2**40 + 5]


def values(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, size).astype(np.float32)


def bits(tensor: torch.Tensor) -> np.ndarray:
    integers = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.cpu().view(integers).numpy()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Any NaN is as good as another: processors differ in the sign of those that they make."""
    nan = expected.isnan().numpy()
    assert np.array_equal(actual.cpu().isnan().numpy(), nan)
    assert np.array_equal(bits(actual)[~nan], bits(expected)[~nan])


def perturb(kernels, device, base: np.ndarray, dtype, scale=SCALE, start=0) -> torch.Tensor:
    live = torch.full((base.size,), 7, dtype=dtype, device=device)
    source = torch.from_numpy(base.copy()).to(device)
    kernels.perturb(source, live, SEED, PARAMETER, scale, start)
    assert np.array_equal(bits(source), base.view(np.int32)), "the base was changed"
    return live


def assert_perturbs_like_the_definition(kernels, device, base: np.ndarray, dtype, scale=SCALE, start=0):
    expected = torch.from_numpy(definition.perturbed(base, SEED, PARAMETER, scale, start)).to(dtype)
    live = perturb(kernels, device, base, dtype, scale, start)
    assert_same_bits(live, expected)


# The kernels against the definition


@KERNELS
@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_perturb(kernels, device, dtype, size):
    assert_perturbs_like_the_definition(kernels, device, values(size), dtype, start=77)


@pytest.mark.parametrize("kernels, device", THREADED)
@DTYPES
@pytest.mark.parametrize("start", [0, 77])
def test_perturb_split_over_threads(kernels, device, dtype, start):
    assert_perturbs_like_the_definition(kernels, device, values(LONG), dtype, start=start)


@KERNELS
@pytest.mark.parametrize("start", STARTS)
def test_perturb_anywhere(kernels, device, start):
    assert_perturbs_like_the_definition(kernels, device, values(1500), torch.float32, start=start)


@KERNELS
@pytest.mark.parametrize("scale", [-SCALE, 0.0, -0.0, 1e-3, 3e4, 1e-42])
def test_perturb_with_any_scale(kernels, device, scale):
    if str(scale) == "-0.0" and find_spec("triton") and isinstance(kernels, GpuKernels) and LOSES_SIGNS:
        pytest.skip("Triton 3.8's interpreter takes -0.0 for 0.0 where it is an argument; sigma is above 0")
    base = values(3000)
    base[::5] = -0.0
    assert_perturbs_like_the_definition(kernels, device, base, torch.float32, scale)


@KERNELS
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("parameter", [0, 2**31, 2**32 - 1])
def test_perturb_with_any_seed_and_parameter(kernels, device, seed, parameter):
    base = values(1000)
    live = torch.empty(base.size, device=device)
    kernels.perturb(torch.from_numpy(base).to(device), live, seed, parameter, SCALE)
    assert np.array_equal(bits(live), definition.perturbed(base, seed, parameter, SCALE).view(np.int32))


@KERNELS
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_round(kernels, device, size, start):
    assert_rounds_like_the_definition(kernels, device, values(size), start)


@pytest.mark.parametrize("kernels, device", THREADED)
def test_round_split_over_threads(kernels, device):
    assert_rounds_like_the_definition(kernels, device, values(LONG), 77)


@KERNELS
def test_round_of_odd_values(kernels, device):
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, 65536.0]
    assert_rounds_like_the_definition(kernels, device, np.array(odd * 50, dtype=np.float32), 0)


def assert_rounds_like_the_definition(kernels, device, value: np.ndarray, start: int) -> None:
    expected = torch.from_numpy(definition.rounded(value, SEED, PARAMETER, start).view(np.int16))
    base = torch.full((value.size,), 7, dtype=torch.bfloat16, device=device)
    kernels.round(torch.from_numpy(value.copy()).to(device), base, SEED, PARAMETER, start)
    assert_same_bits(base, expected.view(torch.bfloat16))


def test_rounding_keeps_the_mean_and_what_needs_none():
    """A quarter of the way up: one in four goes up. Values that bfloat16 has stay."""
    step = np.float32(2.0**-7)  # bfloat16's spacing from 1 on
    value = np.full(100_000, np.float32(-1) - step / 4)
    rounded = torch.from_numpy(definition.rounded(value, SEED, PARAMETER).view(np.int16)).view(torch.bfloat16)
    assert set(rounded.tolist()) == {-1.0, -1.0 - float(step)}
    share = (rounded < -1).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / value.size)
    exact = torch.randn(5000).bfloat16()
    again = definition.rounded(exact.float().numpy(), SEED, PARAMETER)
    assert np.array_equal(again.view(np.int16), exact.view(torch.int16).numpy())


@KERNELS
@pytest.mark.parametrize("size, start", [*((size, 77) for size in SIZES), (1500, 2**32 - 100)])
def test_update(kernels, device, size, start):
    assert_updates_like_the_definition(kernels, device, size, start)


@pytest.mark.parametrize("kernels, device", THREADED)
def test_update_split_over_threads(kernels, device):
    assert_updates_like_the_definition(kernels, device, LONG, 0)


def assert_updates_like_the_definition(kernels, device, size, start):
    base = values(size)
    seeds = np.array([3, SEED, 2**64 - 1, 0, 3], dtype=np.uint64)
    # So unequal that the order of the sum and a fused multiply-add would both be seen.
    coefficients = np.array([0.01, -0.3, 1e-4, 7.0, -1 / 3], dtype=np.float32)
    expected = definition.updated(base, seeds, coefficients, PARAMETER, start)
    tensor = torch.from_numpy(base.copy()).to(device)
    kernels.update(tensor, seeds, coefficients, PARAMETER, start)
    assert np.array_equal(bits(tensor), expected.view(np.int32))


def digest(kernels, base: torch.Tensor, parameter: int, start: int = 0) -> int:
    found = kernels.digest(base, parameter, start)
    assert (found.dtype, found.shape, found.device) == (torch.int64, (), base.device)
    return int(found) % 2**64


@KERNELS
@pytest.mark.parametrize(
    "size, start", [*((size, 77) for size in SIZES), (LONG, 0), (LONG, 2**32 - 1000), (1500, 2**35)]
)
def test_digest(kernels, device, size, start):
    base = torch.from_numpy(values(size)).to(device)
    assert digest(kernels, base, PARAMETER, start) == definition.digest(values(size), PARAMETER, start)


@KERNELS
def test_digest_of_any_bits(kernels, device):
    patterns = np.random.default_rng(1).integers(0, 2**32, 5000, dtype=np.uint32).view(np.float32)
    base = torch.from_numpy(patterns).to(device)
    assert digest(kernels, base, 2**32 - 1) == definition.digest(patterns, 2**32 - 1)


@KERNELS
def test_any_slicing_gives_the_same(kernels, device):
    base = values(5000)
    start = 2**32 - 2222
    whole = perturb(kernels, device, base, torch.float16, start=start)
    updated = torch.from_numpy(base.copy()).to(device)
    seeds, coefficients = np.array([1, 2], dtype=np.uint64), np.array([0.1, 0.2], dtype=np.float32)
    kernels.update(updated, seeds, coefficients, PARAMETER, start)
    cuts = [0, 1, 2, 510, 513, 1024, 2222, 2223, 4000, 4999, 5000]
    digests = []
    for a, b in itertools.pairwise(cuts):
        live = perturb(kernels, device, base[a:b], torch.float16, start=start + a)
        assert np.array_equal(bits(live), bits(whole[a:b]))
        part = torch.from_numpy(base[a:b].copy()).to(device)
        digests.append(digest(kernels, part, PARAMETER, start + a))
        kernels.update(part, seeds, coefficients, PARAMETER, start + a)
        assert np.array_equal(bits(part), bits(updated[a:b]))
    whole_digest = digest(kernels, torch.from_numpy(base).to(device), PARAMETER, start)
    assert sum(digests) % 2**64 == whole_digest


def test_slices_of_the_device_kernels_leave_no_seam(monkeypatch):
    monkeypatch.setattr(noise_on_device, "SLICE", 1000)
    kernels, base = DeviceKernels(), values(3333)
    assert_perturbs_like_the_definition(kernels, CPU, base, torch.bfloat16, start=77)
    tensor = torch.from_numpy(base.copy())
    assert digest(kernels, tensor, PARAMETER, 77) == definition.digest(base, PARAMETER, 77)
    seeds, coefficients = np.array([1, 2], dtype=np.uint64), np.array([0.1, 0.2], dtype=np.float32)
    kernels.update(tensor, seeds, coefficients, PARAMETER, 77)
    assert np.array_equal(tensor.numpy(), definition.updated(base, seeds, coefficients, PARAMETER, 77))


@KERNELS
def test_works_on_views_of_a_larger_tensor(kernels, device):
    memory = torch.from_numpy(values(4000)).to(device)
    live = torch.zeros(4000, dtype=torch.bfloat16, device=device)
    kernels.perturb(memory[1001:3000], live[1001:3000], SEED, PARAMETER, SCALE)
    expected = definition.perturbed(values(4000)[1001:3000], SEED, PARAMETER, SCALE)
    assert np.array_equal(bits(live[1001:3000]), bits(torch.from_numpy(expected).bfloat16()))
    assert not live[:1001].any() and not live[3000:].any()


def test_device_of_the_kernels():
    assert isinstance(kernels_for(CPU, 2), CpuKernels)
    if find_spec("triton"):
        assert isinstance(kernels_for(torch.device("cuda"), 2), GpuKernels)
    assert isinstance(kernels_for(torch.device("mps"), 2), DeviceKernels)


# The cast to the live dtype


def special_values() -> np.ndarray:
    """float32 values where casts to bfloat16 and float16 go wrong if they do: sign, exponent, rounding."""
    exponents = np.arange(256, dtype=np.uint32) << 23
    # Exactly half-way, a bit to either side of it, and the neighbours, for both 16-bit formats.
    middles = [
        (kept << bit) + offset
        for bit in (13, 16)
        for kept in (0, 1, 2, 3, (1 << (23 - bit)) - 1)
        for offset in (0, 1, (1 << (bit - 1)) - 1, 1 << (bit - 1), (1 << (bit - 1)) + 1, (1 << bit) - 1)
    ]
    patterns = (exponents[:, None] + np.array(middles, dtype=np.uint32)).reshape(-1)
    # float16's subnormals have their half-way points at other bits.
    subnormal = (np.arange(1, 1025, dtype=np.float64) + 0.5) * 2.0**-24
    edges = np.array([65504, 65519.996, 65520, 65536, 2**-24, 2**-25, 2**-26], dtype=np.float32)
    around = np.concatenate([subnormal.astype(np.float32), edges])
    around = np.concatenate([around, np.nextafter(around, np.float32(0)), np.nextafter(around, np.inf)])
    patterns = np.concatenate([patterns, around.astype(np.float32).view(np.uint32)])
    return np.concatenate([patterns, patterns | np.uint32(0x80000000)]).view(np.float32)


@KERNELS
@DTYPES
def test_cast_of_special_values(kernels, device, dtype):
    base = special_values()
    # Adding a product of zero keeps every value but -0.0's sign.
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = torch.from_numpy(definition.perturbed(base, SEED, PARAMETER, 0.0)).to(dtype)
    assert expected.isnan().any() and expected.isinf().any() and (expected == 0).any()
    assert_same_bits(perturb(kernels, device, base, dtype, scale=0.0), expected)


@KERNELS
@DTYPES
def test_minus_zero_keeps_its_sign(kernels, device, dtype):
    # Where scale * z is -0.0, so is the sum.
    base = np.full(2000, -0.0, dtype=np.float32)
    live = perturb(kernels, device, base, dtype, scale=0.0).cpu()
    negative = definition.normal(SEED, PARAMETER, 0, base.size) < 0
    assert np.array_equal(live.signbit().numpy(), negative)


@KERNELS
@DTYPES
def test_perturbing_beyond_the_range(kernels, device, dtype):
    base = np.array([6.5e4, -6.5e4, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf] * 100, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_perturbs_like_the_definition(kernels, device, base, dtype, scale=1e3)
        assert_perturbs_like_the_definition(kernels, device, base, dtype, scale=3e38)


@KERNELS
def test_nan_and_infinity_pass_through_the_update(kernels, device):
    base = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38] * 50, dtype=np.float32)
    seeds, coefficients = np.array([5], dtype=np.uint64), np.array([1e-45], dtype=np.float32)
    tensor = torch.from_numpy(base.copy()).to(device)
    kernels.update(tensor, seeds, coefficients, PARAMETER)
    assert_same_bits(tensor, torch.from_numpy(definition.updated(base, seeds, coefficients, PARAMETER)))


# The definition itself: these bits are a contract, because runs are replayed from their seeds


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_has_its_authors_known_answers(key, counter, words):
    """kat_vectors of the Random123 distribution, philox4x32 10."""
    block = np.array([counter[0] | counter[1] << 32], dtype=np.uint64)
    made = definition.philox(key[0] | key[1] << 32, block, counter[2], counter[3])
    assert " ".join(f"{word:08x}" for word in made[:, 0]) == words


def test_table_is_pinned():
    assert definition.TABLE.shape == (8192,) and definition.TABLE.dtype == np.float32
    assert (
        hashlib.sha256(definition.TABLE.astype("<f4").tobytes()).hexdigest()
        == "046e96397c98828963f33267bcb2b25ce8c9c4474b7a063d30bd46c7ad2edf01"
    )


def test_table_does_not_depend_on_the_last_bits_of_a_logarithm():
    """Quantiles from another library round to the same table, and none is near a rounding boundary."""
    size = definition.TABLE.size
    quantiles = ndtri((np.arange(size // 2, size) + 0.5) / size)
    quantiles /= math.sqrt(math.fsum(quantiles**2) / quantiles.size)
    grid = quantiles * 2**22
    assert np.array_equal(np.round(grid) / 2**22, definition.TABLE[size // 2 :])
    to_boundary = np.abs(grid - np.floor(grid) - 0.5).min() / 2**22
    assert to_boundary > 1e-12  # two logarithms differ by 1e-15 or so


def test_table_is_symmetric_rising_and_of_variance_one():
    table = definition.TABLE.astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()
    assert abs((table**2).mean() - 1) < 1e-6


@pytest.mark.parametrize(
    "seed, name, start, expected",
    [
        (0, "", 0, "3f00fdc0 3ef51400 bf053058 bfac61ce"),
        (42, "model.embed_tokens.weight", 0, "befdb8e0 bee29c70 bf3563b0 3fb057f6"),
        (2**64 - 1, "model.norm.weight", 127, "3e84afe0 bee534b8 3dcb1280 bf3563b0"),
        (SEED, "lm_head.weight", 2**35 - 2, "c003fe83 4015eb6a 3f12a6c8 bee45720"),
    ],
)
def test_noise_is_pinned(seed, name, start, expected):
    z = definition.normal(seed, definition.parameter_id(name), start, 4)
    assert z.astype(">f4").tobytes().hex(" ", 4) == expected


def test_parameter_id_is_pinned():
    assert definition.parameter_id("model.embed_tokens.weight") == 0xAC43D4FC


def test_layout_within_a_chunk():
    """Element e of a chunk is half e % 2 of word e // 128 of counter e // 2 % 64, as documented."""
    words = definition.philox(SEED, np.arange(3 * 64), PARAMETER, definition.STREAM_NOISE)
    z = definition.normal(SEED, PARAMETER, 0, 3 * CHUNK)
    for e in [0, 1, 2, 127, 128, 255, 256, 511, 512, 513, 1023, 1024, 1535]:
        chunk, within = divmod(e, CHUNK)
        word = int(words[within // 128, 64 * chunk + within // 2 % 64])
        integer = word >> 16 if within % 2 else word & 0xFFFF
        assert z[e] == definition.TABLE[integer >> 3]


def test_streams_do_not_share_numbers():
    blocks = np.arange(1000)
    noise = definition.philox(SEED, blocks, 0, definition.STREAM_NOISE)
    seeds = definition.philox(SEED, blocks, 0, definition.STREAM_SEEDS)
    assert not set(noise.ravel().tolist()) & set(seeds.ravel().tolist())


# The digest


def test_digest_is_pinned():
    assert (
        f"{definition.digest(np.arange(1000, dtype=np.float32) / np.float32(7), PARAMETER):016x}"
        == "f391ad1974d3ebbf"
    )


def test_digest_changes_with_any_single_bit():
    base = values(64)
    before = definition.digest(base, PARAMETER)
    patterns = base.view(np.uint32)
    digests = set()
    for i in range(base.size):
        for bit in range(32):
            patterns[i] ^= np.uint32(1 << bit)
            digests.add(definition.digest(base, PARAMETER))
            patterns[i] ^= np.uint32(1 << bit)
    assert before not in digests
    assert len(digests) == 64 * 32


def test_digest_changes_when_two_values_are_swapped():
    base = values(200)
    before = definition.digest(base, PARAMETER)
    for i, j in [(0, 1), (0, 199), (63, 64), (10, 150)]:
        swapped = base.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert definition.digest(swapped, PARAMETER) != before


def test_digest_depends_on_the_parameter_and_the_start():
    base = values(200)
    starts = [0, 1, 2**32, 2**32 + 1, 2**33, 2**40]
    digests = {definition.digest(base, p, start) for p in (1, 2, 2**31 + 1) for start in starts}
    assert len(digests) == 3 * len(starts)


def test_digest_sees_the_sign_of_zero():
    zeros = np.zeros(4, dtype=np.float32)
    assert definition.digest(zeros, PARAMETER) != definition.digest(-zeros, PARAMETER)
