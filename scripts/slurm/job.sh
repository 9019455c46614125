# Sourced by the sbatch files beside it: finds the program and starts it on every node of the job.
# Interrupted or requeued, a job resumes from the run's newest checkpoint: the same command is the right one.
set -euo pipefail

# print_header FILE: its opening comment, which is its --help.
print_header() {
    sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$1"
}

# Sets ROOT and PYTHON. Slurm runs a copy of an sbatch file from its spool folder, so the clone is where sbatch was called.
find_program() {
    ROOT="${RANKSEG_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
    if [ ! -f "$ROOT/exp/main.py" ]; then
        echo "error: $ROOT: no exp/main.py there; call sbatch in the clone, or set RANKSEG_ROOT to it" >&2
        exit 2
    fi
    PYTHON="${RANKSEG_PYTHON:-$ROOT/.venv/bin/python}"
    if ! command -v "$PYTHON" > /dev/null; then
        echo "error: $PYTHON: no such program; run scripts/quickstart.sh once, or name a Python in RANKSEG_PYTHON" >&2
        exit 2
    fi
}

# Processes a node: RANKSEG_PROCESSES, else the node's GPUs in the job, else one.
processes_a_node() {
    local gpus="${SLURM_GPUS_ON_NODE:-0}"
    [[ "$gpus" =~ ^[1-9][0-9]*$ ]] || gpus=1
    echo "${RANKSEG_PROCESSES:-$gpus}"
}

# launch FLAGS...: exp/main.py FLAGS on every process of every node. The agents of torchrun, one a node, meet on the
# job's first node, at a port that follows from the job's number, so that two jobs of a node do not clash.
# With sbatch --signal=B:USR1@300, a job whose time is nearly up puts itself back into the queue.
launch() {
    local nodes processes host port cpus job status=0
    find_program
    nodes="${SLURM_JOB_NUM_NODES:-1}"
    processes="$(processes_a_node)"
    host="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    host="${host%%$'\n'*}" # the first of them
    port="$((20000 + SLURM_JOB_ID % 20000))"
    cpus="${SLURM_CPUS_PER_TASK:-$processes}"
    export SRUN_CPUS_PER_TASK="$cpus" OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cpus + processes - 1) / processes))}"
    echo "job $SLURM_JOB_ID: $nodes node(s) x $processes process(es), meeting at $host:$port" >&2
    # torchrun passes these on to its processes, which save and leave; by default SIGUSR1 would kill it alone.
    export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
    trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --nproc_per_node="$processes" \
        --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$host:$port" \
        "$ROOT/exp/main.py" "$@" &
    job=$!
    wait "$job" || status=$?
    while kill -0 "$job" 2> /dev/null; do # the signal alone ended the wait
        status=0
        wait "$job" || status=$?
    done
    return "$status"
}
