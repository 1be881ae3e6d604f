# What every job script needs to know about your site: edit the lines marked SITE. It is sourced from
# the folder that you submit from. What is already set in the environment of `sbatch` goes first.
# shellcheck shell=bash

# SITE: where Python and mpies are. `make install` makes .venv, which holds an MPI of its own. With the
# site's MPI (make install MPI=), load the module that mpi4py is to find: docs/clusters.md.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python}
# PYTHON="apptainer exec --nv mpies.sif python"
# module purge
# module load openmpi

# SITE: what starts the ranks: mpirun, or srun with the --mpi of your MPI (`srun --mpi=list` tells):
# pmix for Open MPI, pmi2 for MPICH, cray_shasta on a Cray.
LAUNCHER=${LAUNCHER:-mpirun}
# LAUNCHER="srun --mpi=pmix"

# SITE: where models are that were downloaded before; nodes have no internet. Put it on a file system
# that all nodes see.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=1

# SITE: how often a job that was stopped early (signal, time limit) goes back into the queue.
MAX_RESTARTS=${MAX_RESTARTS:-20}

# On GPUs. Batches of many shapes would leave torch's memory in pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Triton keeps what it has compiled, for which home directories are slow: where the site gives every job a
# folder of its own, there.
if [[ ${TMPDIR:-/tmp} != /tmp ]]; then
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$TMPDIR/triton}
fi

PATH=$(realpath "$VENV")/bin:$PATH
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Since 22.05, srun no longer takes this over from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
