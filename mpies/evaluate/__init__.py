"""Evaluating a model on a task's rows, spread over the ranks, inside training and as a command.

    mpirun -n N python -m mpies.evaluate RUN.h5 --generation best --samples 20 --kl

`answers` makes the answers and scores them, `statistics` the figures, `kl` and `drift` compare with
the initial model; `command` and `report` are the command's.
"""

from mpies.evaluate.answers import Evaluation, Sampling, evaluate

__all__ = ["Evaluation", "Sampling", "evaluate"]
