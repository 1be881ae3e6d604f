"""Which device is whose, and how much of its memory."""

from __future__ import annotations

import pytest
import threads
import torch

from mpies.errors import InputError
from mpies.ranks import devices
from mpies.ranks.devices import Place, shares
from mpies.ranks.memory import free_on_node


def place(host: str, gpu: str | None, free: int) -> Place:
    return Place(host, f"cuda:0 {gpu}" if gpu else "cpu", gpu, free)


@pytest.mark.parametrize(
    "places, expected",
    [
        ([("n1", None, 100)], [100]),
        # All ranks of a node compute in its memory.
        ([("n1", None, 90), ("n1", None, 99), ("n1", None, 91), ("n2", None, 50)], [30, 33, 30, 50]),
        # A GPU is shared by those who have the same one, whatever their number for it is.
        ([("n1", "a", 80), ("n1", "a", 81), ("n1", "b", 80), ("n2", "c", 80)], [40, 40, 80, 80]),
        # GPUs of two nodes are two, also where drivers number them alike.
        ([("n1", "a", 80), ("n2", "a", 60)], [80, 60]),
        ([("n1", "a", 80), ("n1", None, 100), ("n1", None, 100)], [80, 50, 50]),
    ],
)
def test_those_who_share_memory_have_equal_parts_of_it(places, expected):
    assert shares([place(*given) for given in places]) == expected


@pytest.mark.parametrize(
    "hosts, expected",
    [
        (["n1"], [0]),
        (["n1", "n1", "n1"], [0, 1, 2]),
        (["n1", "n2", "n1", "n2", "n3"], [0, 0, 1, 1, 0]),  # ranks dealt out in turns
    ],
)
def test_ranks_are_counted_on_their_node(hosts, expected):
    assert threads.run(len(hosts), devices.local_rank, hosts=hosts) == expected


@pytest.mark.parametrize("visible, expected", [(4, [0, 1, 0, 1]), (1, [0] * 4), (2, [0, 1, 0, 1])])
def test_gpus_go_round_among_the_ranks_of_a_node(monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for setting in ("auto", "cuda"):
        found = threads.run(4, lambda c: devices.device_for(c, setting), hosts=["a", "a", "b", "b"])  # noqa: B023
        assert found == [torch.device("cuda", number) for number in expected]
    assert threads.run(2, lambda comm: devices.device_for(comm, "cpu"))[1] == torch.device("cpu")


def test_without_a_gpu_there_is_the_cpu_unless_a_gpu_was_asked_for(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.device_for(alone, "auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"^model\.device: cuda was asked for.*use cpu or auto"):
        devices.device_for(alone, "cuda")


H100, H200 = "NVIDIA H100, 132 multiprocessors", "NVIDIA H200, 132 multiprocessors"


@pytest.mark.parametrize(
    "models, note",
    [
        (["", ""], ""),
        ([H100, H100, H100], ""),
        ([H100, H200, H100], f"2 rank(s), the first 0: {H100}; 1 rank(s), the first 1: {H200}"),
        ([H100, H100.replace("132", "114")], "114 multiprocessors"),  # one name, two sizes
    ],
)
def test_gpus_of_several_models_are_a_note(models, note):
    places = [Place("n1", "cuda:0", str(rank), 0, model) for rank, model in enumerate(models)]
    told = devices.tell_differing_gpus(places)
    assert bool(told) == bool(note) and note in told


def test_a_cpus_place_is_the_node():
    found = devices.place_of(torch.device("cpu"))
    assert (found.device, found.gpu) == ("cpu", None)
    assert found.free == pytest.approx(free_on_node(), rel=0.2) and found.free > 0
