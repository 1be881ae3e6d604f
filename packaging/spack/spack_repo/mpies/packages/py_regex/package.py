"""Spack's own package, with a version for transformers 5.4, until Spack has one."""

from spack.package import depends_on, version
from spack_repo.builtin.packages.py_regex.package import PyRegex as BuiltinRegex


class PyRegex(BuiltinRegex):
    version("2026.1.15", sha256="164759aa25575cbc0651bef59a0b18353e54300d79ace8084c818ad8ac72b7d5")

    depends_on("python@3.9:", type=("build", "run"), when="@2026:")
    # Its licence is an SPDX expression.
    depends_on("py-setuptools@77:", type="build", when="@2026:")
