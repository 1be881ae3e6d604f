"""mpies: fine-tune all parameters of a language model with evolution strategies, under MPI.

`mpirun -n 2 python -m mpies.train` is the whole interface to begin with.
"""

__version__ = "0.1.0"
