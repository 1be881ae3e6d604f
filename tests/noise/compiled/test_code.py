"""What the compiled kernels hold, and what not: where their code is emulated, and where it is not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from stand_in_gpu import Launch
from triton.runtime import driver

from mpies.model import lowrank_gpu
from mpies.noise import definition, gpu
from mpies.noise.definition import STREAM_A
from mpies.noise.gpu import GpuKernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGET = driver.active.get_current_target()
NVIDIA = TARGET.backend == "cuda"
LIVE = [torch.bfloat16, torch.float32, torch.float16]

# Arithmetic that rounds once, each operation on its own, and what does not round at all.
PTX = {"add.rn.f32", "mul.rn.f32", "add.rn.f32x2", "mul.rn.f32x2", "cvt.rn.f16.f32", "setp.num.f32"}
WITH_PRODUCTS = {"_perturb", "_update", "_lowrank_update"}
SASS = {"FADD", "FMUL", "FADD2", "FMUL2", "FSETP", "F2FP", "F2F", "FSET", "FSEL"}
AMD = {
    "v_add_f32",
    "v_mul_f32",
    "v_pk_add_f32",
    "v_pk_mul_f32",
    "v_cmp_o_f32",
    "v_cmp_u_f32",
    "v_cvt_f16_f32",
}


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """All kernels, with small and with large numbers, as the kernel set launches them."""
    kernels, base = GpuKernels(), torch.zeros(4096)
    matrix, rounded = torch.zeros(64, 64), torch.zeros(4096, dtype=torch.bfloat16)
    driver.active.launches.clear()
    for seed, parameter, start in (
        (1, 1, 0),
        (16, 16, 16),
        (2**31, 2**31, 2**31),
        (2**64 - 1, 2**32 - 1, 2**40),
    ):
        seeds, factors = np.array([seed, 7], np.uint64), np.array([0.1, 0.2], np.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kernels.perturb(base, base.to(dtype), seed, parameter, 0.01, start)
        kernels.update(base, seeds, factors, parameter, start)
        kernels.normal(4096, seeds, parameter, STREAM_A, base.device)
        kernels.lowrank_update(matrix, seeds, factors, parameter, 1)
        kernels.round(base, rounded, seed, parameter, start)
        kernels.digest(base, parameter, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_has_gluon", lambda: False)
        kernels.update(base, seeds, factors, parameter, start)
        kernels.lowrank_update(matrix, seeds, factors, parameter, 1)
    for dtype in LIVE:
        y, x, a, b = (torch.zeros(2, size, dtype=dtype) for size in (4096, 64, 4096, 64))
        members = torch.zeros(2, dtype=torch.int64)
        lowrank_gpu.add(y, x, members, a, b, 1, None)
        lowrank_gpu.add(y, x, members, a, b, 2, y)
        lowrank_gpu.add_parts(
            y,
            x,
            members,
            a.view(2, 1, -1),
            b.view(2, 1, 1, -1),
            torch.tensor(lowrank_gpu.spans_of([0, 4096])),
            y,
        )
        lowrank_gpu.add_looked_up(x, members, members, a.view(2, 1, -1), b.view(2, 1, 1, -1))
        for size in (64, 8192):
            x = torch.zeros(2, size, dtype=dtype)
            lowrank_gpu.rms_norm(x, members, x, 1e-6)
            lowrank_gpu.rms_norm(x, members, x, 1e-6, x.clone(), plus_one=True)
    return list(driver.active.launches)


@pytest.fixture(scope="module")
def codes(launches) -> dict[str, list[Launch]]:
    """Kernel -> a launch of each of its variants."""
    found: dict[str, dict] = {}
    for launch in launches:
        found.setdefault(launch.kernel, {})[str(launch.files["ttgir"])] = launch
    return {kernel: list(variants.values()) for kernel, variants in found.items()}


UPDATES = {"_update": int(NVIDIA), "_lowrank_update": 1}  # those in Gluon


def test_layouts_are_chosen_by_hand(codes):
    """Factors are loaded as vectors; NVIDIA's have the table in shared memory, and wait for it once."""
    found = {kernel: [launch for launch in codes[kernel] if launch.in_gluon] for kernel in UPDATES}
    assert {kernel: len(launches) for kernel, launches in found.items()} == UPDATES
    (lowrank,) = found["_lowrank_update"]
    if NVIDIA:
        vectors = re.findall(r"ld\.global\S*\.v4", lowrank.files["ptx"].read_text())
        assert len(vectors) == 4 * (16 + 4) // 4, "of four terms"
        (update,) = found["_update"]
        assert update.metadata.shared == definition.TABLE.nbytes
        text = update.files["ptx"].read_text()
        assert text.count("ld.shared") == 8 and text.count("bar.sync") == 1


def test_no_kernel_is_compiled_for_the_values_of_its_arguments(codes):
    """A variant for each live dtype, but not for seeds, parameters and starts with a top bit, or without."""
    variants = {kernel: len(launches) for kernel, launches in codes.items()}
    assert variants == {
        "_perturb": 3,
        "_update": 1 + NVIDIA,  # in Gluon, and without
        "_normal": 1,
        "_lowrank_update": 2,
        "_round": 1,
        "_digest": 1,
        "_add": 2 * len(LIVE),  # low rank: for each live dtype, and each rank
        "_add_parts": len(LIVE),
        "_add_looked_up": len(LIVE),
        "_rms_norm": 4 * len(LIVE),  # and each size, with a residual or without
    }


def test_every_counter_has_one_thread(codes):
    """128 of them, or in Gluon 256, in warps of 32 or 64."""
    for kernel in ("_perturb", "_update", "_normal", "_round"):
        for launch in codes[kernel]:
            assert launch.metadata.num_warps * TARGET.warp_size == (256 if launch.in_gluon else 128), kernel


# The others are sums and products as any of a model's: they are not rounded as something defines.
DEFINED = {"_perturb", "_update", "_normal", "_lowrank_update", "_round", "_digest"}


def every(codes, suffix: str):
    for kernel, launches in codes.items():
        for launch in launches:
            yield kernel, launch.files[suffix]


@pytest.mark.skipif(not NVIDIA, reason="of NVIDIA's GPUs")
def test_ptx_rounds_as_the_definition(codes):
    for kernel, file in every(codes, "ptx"):
        found = set(
            re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*(?:f16|f32|f64)\w*)", file.read_text(), re.M)
        )
        assert found <= PTX or kernel not in DEFINED, kernel
        assert not re.search(r"\.ftz|\.approx|\bfma\.rn\.f32", file.read_text()), kernel


def said_by(tool: str, *arguments: str | Path) -> str:
    """One of NVIDIA's tools, which Triton brings."""
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not NVIDIA, reason="of NVIDIA's GPUs")
def test_machine_code_of_nvidia(codes):
    """ptxas contracts nothing, flushes nothing to zero, spills no register."""
    for kernel, file in every(codes, "cubin"):
        if kernel not in DEFINED:
            used = said_by("cuobjdump", "--dump-resource-usage", file)
            assert "STACK:0 " in used and "LOCAL:0 " in used, f"{kernel} spills registers: {used}"
            continue
        code = said_by("nvdisasm", "-c", file)
        # A way of ptxas to move a constant into a register: -0 times 0 plus it.
        code = re.sub(r"HFMA2(?:\.MMA)? R\d+, -RZ, RZ, [^;]*;", "MOV ;", code)
        found = set(re.findall(r"\s(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9]*(?:\.[A-Z0-9_]+)*) ", code))
        assert not re.findall(r"\sLDL|\sSTL", code), f"{kernel} spills registers"
        assert {"EXIT"} <= found and ("FMUL" in str(found)) == (kernel in WITH_PRODUCTS), "it can be read"
        floats = {name for name in found if re.match(r"F(?!LO|ENCE)|MUFU|H[A-Z]+2|D(ADD|MUL|FMA)", name)}
        assert {name.split(".")[0] for name in floats} <= SASS, (kernel, floats)
        assert not any("FTZ" in name for name in found), kernel


@pytest.mark.skipif(NVIDIA, reason="of AMD's GPUs")
def test_code_for_amd(codes):
    for kernel, file in every(codes, "amdgcn"):
        text = file.read_text()
        found = set(re.findall(r"^\s+(v_\w*(?:f16|f32|f64)\w*?)(?:_e32|_e64)?\s", text, re.M))
        assert found <= AMD or kernel not in DEFINED, kernel
        assert "s_endpgm" in text, "it can be read"
        if kernel in DEFINED:
            assert any("mul_f32" in name for name in found) == (kernel in WITH_PRODUCTS), (kernel, found)
        # Scalars that have no place go into vector registers; those must not go to memory.
        assert re.findall(r"vgpr_spill_count: (\d+)", text) == ["0"], kernel
        assert re.findall(r"private_segment_fixed_size:? (\d+)", text) == ["0"] * 2, kernel
        # Subnormals are kept, and rounding is to nearest even.
        assert "amdhsa_float_denorm_mode_32 3" in text and "amdhsa_float_round_mode_32 0" in text, kernel
