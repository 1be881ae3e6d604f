"""Triton compiles a part of its driver in C when it is first used: what it lacks is told in a line."""

from __future__ import annotations

import sysconfig
from itertools import count

import pytest
import torch
from stand_in_gpu import StandIn
from triton.runtime import build, driver

from mpies.errors import InputError
from mpies.noise import gpu as kernels
from mpies.noise.trial import find_wrong
from mpies.ranks import gpu

CPU = torch.device("cpu")
NUMBERS = count()


class WithDriver(StandIn):
    """Compiles C before the first launch, as Triton's own drivers do."""

    def get_current_target(self):
        source = f"#include <Python.h>\n/* compiled anew: {next(NUMBERS)} */"
        build.compile_module_from_src(source, "part")


@pytest.fixture
def first_launch(monkeypatch):
    """The first launch of a process: nothing is compiled yet."""
    before = driver.active
    monkeypatch.setattr(gpu, "kernels_for", lambda device, threads: kernels.GpuKernels())
    kernels._target.cache_clear()
    if hasattr(build, "_find_compiler"):  # not in older ones
        build._find_compiler.cache_clear()
    WithDriver("sm_90").activate()
    yield monkeypatch
    driver.set_active(before)
    kernels._target.cache_clear()


def refusal(capfd) -> str:
    with pytest.raises(InputError) as told:
        gpu.try_kernels(CPU)
    assert capfd.readouterr().err == "", "nothing but the line"
    assert "\n" not in str(told.value)
    return str(told.value)


def test_no_compiler(first_launch, capfd, tmp_path):
    first_launch.delenv("CC", raising=False)
    first_launch.setenv("PATH", str(tmp_path))
    assert "finds no C compiler: install gcc, load" in refusal(capfd)


def test_no_headers(first_launch, capfd, tmp_path):
    paths = sysconfig.get_paths()
    first_launch.setattr(sysconfig, "get_paths", lambda **_: {**paths, "include": str(tmp_path)})
    first_launch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"there is no {tmp_path}/Python.h: install them (python3-dev" in refusal(capfd)


def test_a_compiler_that_fails(first_launch, capfd, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: fatal error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    first_launch.setenv("CC", str(compiler))
    assert "C compiler fails (cc: fatal error: out of luck): try another" in refusal(capfd)


def test_the_kernels_pass_their_trial():
    assert find_wrong(kernels.GpuKernels(), CPU) is None
