"""The probe, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpies import config
from mpies.command_line import Parser
from mpies.drawing import form_of
from mpies.errors import InputError
from mpies.extras import need
from mpies.files import refuse_unwritable
from mpies.ranks.agreement import agree_on_settings, on_root, together
from mpies.ranks.collectives import barrier
from mpies.run import inputs
from mpies.text import clip

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
MOST_PAIRS, MOST_SIGMAS = 2**20, 64


@dataclass(frozen=True)
class Options:
    pairs: int
    prompts: int
    sigmas: tuple[float, ...]
    """In rising order; empty: STEPS of es.sigma."""
    output: str | None
    json: str | None
    settings: list[str]
    """The command line's rest: a configuration file and section.key=value."""

    def ladder(self, sigma: float) -> tuple[float, ...]:
        """The sigmas to try: around the settings' one, unless they are given."""
        return self.sigmas or tuple(float(f"{step * sigma:.12g}") for step in STEPS)


def parse(arguments: list[str]) -> Options:
    """The command line. Raises InputError for what cannot be."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--sigmas", default="")
    parser.add_argument("--output")
    parser.add_argument("--json")
    given, rest = parser.parse_known_args(arguments)
    unknown = next((one for one in rest if one.startswith("-")), None)
    if unknown:
        parser.error(f"{clip(unknown, 60)}: there is no such option")
    if not 2 <= given.pairs <= MOST_PAIRS:
        raise InputError(f"--pairs: given {given.pairs}, allowed is 2 to {MOST_PAIRS}")
    if given.prompts < 2:  # how far their answers differ says what a loss is measured by
        raise InputError(f"--prompts: given {given.prompts}, allowed is 2 or more")
    if given.output:
        form_of(given.output)
    return Options(given.pairs, given.prompts, _sigmas(given.sigmas), given.output, given.json, rest)


def _sigmas(text: str) -> tuple[float, ...]:
    try:
        made = sorted({float(part) for part in text.split(",")} if text else set())
    except ValueError:
        made = [math.nan]
    if len(made) > MOST_SIGMAS or not all(0 < sigma < math.inf for sigma in made):
        raise InputError(
            f"--sigmas: given {clip(text, 60)}, allowed are up to {MOST_SIGMAS} numbers above 0, with commas"
        )
    return tuple(made)


def main(comm: Comm, arguments: list[str]) -> int:
    options = together(comm, parse, arguments)
    settings = agree_on_settings(comm, inputs.load_settings, options.settings)
    on_root(comm, _refuse_unwritable, options)
    # torch comes along: only once the command line is good.
    from mpies.probe import probing
    from mpies.probe.report import ProbeReport
    from mpies.replica import InitialUse, load, settle
    from mpies.run.screen import Screen, rewards_shown

    screen = Screen(comm.rank != 0, "lines")
    for line in config.remark(settings):
        screen.say(f"warning: {line}")
    setup = settle(comm, settings)
    for line in rewards_shown(setup.reward_digests):
        screen.say(f"reward {line}")
    screen.say(f"loading {settings.model.path} ...")
    replica = load(comm, settings, setup, InitialUse())
    ladder = options.ladder(settings.es.sigma)
    found = probing.probe(comm, settings, replica, ladder, options.pairs, options.prompts, screen.say)

    def tell() -> None:
        report = ProbeReport.of(settings, setup.task, replica.facts, found)
        report.show(screen.console)
        if options.output:
            report.draw(Path(options.output))
            screen.say(f"wrote {options.output}")
        if options.json:
            report.write_json(Path(options.json))
            screen.say(f"wrote {options.json}")

    on_root(comm, tell)
    barrier(comm)
    return 0


def _refuse_unwritable(options: Options) -> None:
    refuse_unwritable("--json", options.json)
    refuse_unwritable("--output", options.output)
    if options.output:
        need("matplotlib", "--output")
