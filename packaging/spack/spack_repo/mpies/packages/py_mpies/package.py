"""mpies, from the clone that this file lies in."""

from pathlib import Path

from spack.package import default_args, depends_on, license, variant, version, when
from spack_repo.builtin.build_systems.python import PythonPackage

CLONE = Path(__file__).resolve().parents[6]


class PyMpies(PythonPackage):
    """Fine-tune language models with evolution strategies, as an MPI batch job."""

    homepage = "https://arxiv.org/abs/2509.24372"
    git = CLONE.as_uri()

    license("Apache-2.0")

    version("0.2.0.dev0", branch="main")

    variant("replay", default=True, description="weights of any generation: python -m mpies.replay")
    variant("train", default=True, when="+replay", description="all commands")
    variant("analyze", default=False, description="figures, HTML reports and exports")

    with default_args(type="build"):
        depends_on("py-setuptools@77.0.3:")
        # Any will do: SETUPTOOLS_SCM_PRETEND_VERSION names the version.
        depends_on("py-setuptools-scm@8:")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-numpy")
        depends_on("py-h5py@3.12:")
        depends_on("py-pydantic@2.9:")
        depends_on("py-ruamel-yaml")
        depends_on("py-rich")

        with when("+replay"):
            depends_on("py-torch@2.7:")
            depends_on("py-transformers@5.4:5")
            depends_on("py-numba")
            depends_on("py-safetensors")

        with when("+train"):
            depends_on("py-mpi4py@4.1:")

        with when("+analyze"):
            depends_on("py-pandas")
            depends_on("py-matplotlib@3.8:")
            depends_on("py-jinja2")
            depends_on("py-pyarrow")
            depends_on("py-tensorboardx")

    def setup_build_environment(self, env):
        env.set("SETUPTOOLS_SCM_PRETEND_VERSION", str(self.version))
