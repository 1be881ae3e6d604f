"""Would a job run? Tried on its own ranks and devices, in minutes, before an allocation is spent.

    mpirun -n N python -m mpies.check [CONFIG.yaml] [section.key=value ...] [--share-gpus]

The arguments are those of mpies.train. Nothing is left behind. Exit codes: 0 it would run; 2 it would
not, and the last lines say what to do; anything else: the check itself could not go on, as where a reward
function never returns. Two ranks on one GPU are refused without --share-gpus.
"""
