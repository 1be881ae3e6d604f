"""Offline analysis of run files: needs neither MPI nor torch nor the model.

    from mpies.analyze import open_run

    run = open_run("runs/quickstart/run.h5")
    run.generations.reward_mean.plot()

On the command line: `python -m mpies.analyze --help`.
"""

from mpies.analyze.run import Run, open_run

__all__ = ["Run", "open_run"]
