"""A GPU made ready: what keeps one from computing is told in a line.

What compilers lack: noise/compiled/test_compilers.py.
"""

from __future__ import annotations

import pytest
import torch

from mpies import config, replay
from mpies.bench.__main__ import parse
from mpies.bench.measuring import prepare
from mpies.check.ranks import check_places
from mpies.errors import InputError, RefusedError
from mpies.evaluate import command as evaluate
from mpies.probe import command as probe
from mpies.ranks import devices, gpu
from mpies.ranks.gpu import make_ready, try_kernels
from mpies.replica import settle

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update it. More words."


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_a_driver_that_is_too_old(alone, monkeypatch, setting):
    """Its GPUs are counted all the same, and auto does not fall back on the CPU, where all takes ages."""

    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(
        InputError, match=r"^model\.device: 4 GPU\(s\) .*found version 12020\)\): .*device=cpu$"
    ):
        devices.device_for(alone, setting)
    assert devices.device_for(alone, "cpu") == torch.device("cpu")


def test_attention_is_not_left_to_cudnn(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(gpu, "try_kernels", chosen.append)
    try:
        make_ready(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled() and chosen == [torch.device("cpu")]
        make_ready(torch.device("cuda", 3))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert chosen == [torch.device("cpu"), *[torch.device("cuda", 3)] * 2]


def test_a_cpus_kernels_are_right():
    try_kernels(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_does_not_compute(capfd):
    with pytest.raises(
        InputError, match=r"^model\.device: cuda:0: the kernels do not run \(.*; or use model"
    ):
        try_kernels(torch.device("cuda", 0))
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "start",
    [
        lambda comm, folder: settle(comm, config.load([])),
        lambda comm, folder: check_places(comm, config.load([]), share_gpus=False),
        lambda comm, folder: prepare(comm, parse([])),
        lambda comm, folder: replay.main(["none.h5", "--verify", "--device", "cuda"]),
        lambda comm, folder: evaluate.main(comm, [folder, "task.name=conciseness"]),
        lambda comm, folder: probe.main(comm, [f"model.path={folder}", "task.name=conciseness"]),
    ],
    ids=["train", "check", "bench", "replay", "evaluate", "probe"],
)
def test_every_command_tries_its_gpu_at_its_start(alone, monkeypatch, tiny_model, start):
    """This machine's torch is taken for one with a GPU, on which no kernel runs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with pytest.raises(
            (RefusedError, InputError), match=r"^(model\.|--)device: cuda:0: the kernels do not run"
        ):
            start(alone, str(tiny_model()))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
