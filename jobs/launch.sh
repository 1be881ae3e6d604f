# What all jobs do alike: a banner, the ranks, the signal before the wall time, back into the queue.
# shellcheck shell=bash

# launch ARGUMENTS: run `python ARGUMENTS` on all ranks of the job and end the job with its exit code.
# 75 says that it was stopped early and goes on where it was: then the job is requeued.
launch() {
    local code=0 waited=0 signalled="" private
    # Slurm signals this shell alone (--signal=B:...), the launcher passes it on to the ranks. Those that are
    # starting or ending may fail at it: once, therefore, when rank 0 says by a file that all listen.
    trap 'signalled=yes' USR1
    private=$(mktemp -d) && export MPIES_LISTENING=$private/listening # where nobody else can make it
    banner
    # shellcheck disable=SC2086  # commands with their options
    ranks $LAUNCHER bash -c 'trap "" USR1; exec "$@"' rank $PYTHON "$@" &
    while [[ $(jobs -r) ]]; do
        if [[ $signalled ]] && { [[ -e $MPIES_LISTENING ]] || ((waited++ == 60)); }; then
            kill -USR1 $! || true
            signalled=""
        fi
        sleep 1
    done
    wait $! || code=$?
    # A rank that native code ends (_exit) counts as a success for some launchers. Rank 0 writes the run file's
    # name into this file once all generations are in it.
    if ((code == 0)) && [[ -e $MPIES_LISTENING && ! -s $MPIES_LISTENING ]]; then
        echo "== exit code 0, but the run is not complete: a rank left without a word" && code=1
    fi
    rm -rf "$private"
    echo "== $(date -Is) exit code $code"
    if ((code == 75)); then requeue; fi
    exit "$code"
}

# The launcher with its options. Why not --kill-on-bad-exit=1: when ranks leave with 75, it kills those
# that take a moment longer, and their 143 hides the 75. A rank that raises ends all others itself; for
# one that is killed without a word, --wait ends them.
ranks() {
    local program=$1 && shift
    trap '' USR1 # here, too, until the launcher listens
    case $program in
        srun | */srun)
            skip_steps "${SLURM_RESTART_COUNT:-0}"
            exec srun --kill-on-bad-exit=0 --wait=30 "$@"
            ;;
        *) exec "$program" -n "${SLURM_NTASKS:-1}" "$@" ;;
    esac
}

# MPICH names its shared memory after job and step; what a kill left on a node keeps a requeued job, whose
# steps are numbered from 0 again, from starting.
skip_steps() {
    for ((step = 0; step < $1; step++)); do srun --overlap --nodes=1 --ntasks=1 --mpi=none true; done
}

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= MAX_RESTARTS)); then
        echo "== not requeued: $restarts restarts are the limit (MAX_RESTARTS); the same sbatch goes on"
    elif [[ $(squeue --noheader --job "$SLURM_JOB_ID" --format %T) != RUNNING ]]; then
        echo "== not requeued: the job is being ended from outside"
    else
        echo "== requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

banner() {
    echo "== $(date -Is) job $SLURM_JOB_ID $SLURM_JOB_NAME, restart ${SLURM_RESTART_COUNT:-0} of $MAX_RESTARTS"
    echo "== ${SLURM_NTASKS:-1} ranks on $SLURM_JOB_NODELIST by $LAUNCHER"
    $PYTHON "${BASH_SOURCE[0]%/*}/software.py" || true
}
