"""A ReFrame test: the quickstart on one task and on several gives the same weights, and how fast it is.

    reframe -C SITE.py -c packaging/reframe/mpies_check.py -r -S tasks=8 -S python=/path/to/.venv/bin/python

Needs mpies in that Python, and its embedded model (`make model`, where there is internet). Sanity: after
every generation, the digest of the weights is that of the run on one task. Performance: of the median
generation but the first.
"""

from __future__ import annotations

from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
import reframe.utility.typecheck as typ
from reframe.core.builtins import (
    parameter,
    performance_function,
    run_after,
    run_before,
    sanity_function,
    variable,
)

# A line for each generation of the run: its number, the digest of the weights after it, its seconds.
SHOW = """\
import h5py
with h5py.File("run/run.h5", "r", locking=False) as run:
    n = run.attrs["generations_committed"]
    for g, (digest, seconds) in enumerate(zip(run["generation/digest"][:n], run["generation/seconds"][:n])):
        print(f"generation {g} digest {digest:016x} seconds {seconds:.6f}")
"""


@rfm.simple_test
class Quickstart(rfm.RunOnlyRegressionTest):
    """The same run on one task and on several."""

    ranks = parameter(["one", "several"])
    tasks = variable(int, value=2)
    """How many several are: what is on a node, or on a few."""
    python = variable(str, value="python3")
    """The Python that mpies is installed in."""
    population = variable(int, value=32)
    prompts = variable(int, value=8)
    generations = variable(int, value=4)
    settings = variable(typ.List[str], value=[])
    """More, as `section.key=value`: a model and a task of the site's own, run.threads."""

    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    time_limit = "30m"

    @run_after("init")
    def name_the_tasks(self):
        self.num_tasks = 1 if self.ranks == "one" else self.tasks
        self.first = Quickstart.variant_name(Quickstart.get_variant_nums(ranks="one")[0])
        if self.ranks != "one":
            self.depends_on(self.first)

    @run_before("run")
    def name_the_command(self):
        self.executable = self.python
        self.executable_opts = [
            "-m", "mpies.train", "run.directory=run", "run.resume=never",
            f"es.population={self.population}", f"es.generations={self.generations}",
            f"task.prompts_per_generation={self.prompts}", "run.evaluate_every=0", *self.settings,
        ]  # fmt: skip
        self.postrun_cmds = [f"{self.python} - <<'END'\n{SHOW}END"]

    @sanity_function
    def has_the_same_weights(self):
        digests = self.rows("digest")
        first = digests if self.ranks == "one" else self.getdep(self.first).rows("digest")
        return sn.all([
            sn.assert_eq(len(digests), self.generations, "{0} of {1} generations are there"),
            sn.assert_eq(digests, first, "the weights are others than on one task"),
        ])  # fmt: skip

    @performance_function("s")
    def seconds_a_generation(self):
        all_seconds = self.rows("seconds")
        seconds = sorted(map(float, all_seconds[1:] or all_seconds))
        return seconds[len(seconds) // 2]

    @performance_function("answers/s")
    def answers_a_second(self):
        return self.population * self.prompts / self.seconds_a_generation()

    def rows(self, word: str) -> list[str]:
        """What stands behind the word in each generation's line."""
        output = Path(self.stagedir, str(self.stdout))
        return sn.evaluate(sn.extractall(rf"^generation \d+ .*\b{word} (\S+)", str(output), 1))
