"""What this machine does: kernels against the memory's speed, generations against plain inference.

    python -m mpies.bench                            one rank
    mpirun -n 2 python -m mpies.bench                the same, and how a generation scales to 2 ranks

All comparisons are ratios within one run: the cases take turns, `--repeats` times, and medians are
compared. `paper` is the paper's procedure, written for this purpose.
"""
