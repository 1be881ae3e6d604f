"""The first version that mpies works with, until Spack has one.

Not derived from Spack's own package: what that says of huggingface-hub for "4.57 and later" is not so of 5.
"""

from spack.package import default_args, depends_on, license, version
from spack_repo.builtin.build_systems.python import PythonPackage


class PyTransformers(PythonPackage):
    """Transformers: state-of-the-art machine learning for PyTorch."""

    homepage = "https://github.com/huggingface/transformers"
    pypi = "transformers/transformers-5.4.0.tar.gz"

    license("Apache-2.0")

    version("5.4.0", sha256="cb34ca89dce345ae3224b290346b9c0fa9694b951d54f3ed16334a4b1bfe3d04")

    with default_args(type="build"):
        depends_on("py-setuptools")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-huggingface-hub@1.5:1")
        depends_on("py-numpy@1.17:")
        depends_on("py-packaging@20:")
        depends_on("py-pyyaml@5.1:")
        depends_on("py-regex@2025.10.22:")
        depends_on("py-tokenizers@0.22:0.23.0")
        depends_on("py-typer")
        depends_on("py-safetensors@0.4.3:")
        depends_on("py-tqdm@4.27:")
