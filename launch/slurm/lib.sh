# shellcheck shell=bash
# What the batch scripts share. They are submitted from the repository's folder, with spark-dist on the PATH.
#
# launch MODULE [options]   starts a module on all nodes of the job, with one process for each GPU.
# run COMMAND [arguments]   starts a command on one node.
#
# A job that is told to stop (--signal, before its time limit) saves its state and goes back into the queue.
# Settings (environment): ACCELERATE_CONFIG, a file of launch/accelerate; PROCESSES_PER_NODE, where there are no GPUs.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then # print the command instead of running it
    dry_run=yes
    shift
fi
# shellcheck disable=SC2034 # for the scripts
arguments=("$@")
stopping=
step=

launch() {
    local nodes=${SLURM_JOB_NUM_NODES:-1} each=${SLURM_GPUS_ON_NODE:-0} hosts=(localhost)
    [ "$each" -gt 0 ] || each=${PROCESSES_PER_NODE:-1}
    [ -z "${SLURM_JOB_NODELIST:-}" ] || mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # All meet at the first host; jobs that share a node have ports of their own; each node puts in its own number.
    local meet=(--main-process-ip "${hosts[0]}" --main-process-port "$((20000 + ${SLURM_JOB_ID:-0} % 20000))")
    [ "$nodes" -eq 1 ] || meet+=(--machine-rank NODE_NUMBER --rdzv-backend c10d)
    on_nodes "$nodes" accelerate launch --config-file "${ACCELERATE_CONFIG:-launch/accelerate/multi_gpu.yaml}" \
        --num-machines "$nodes" --num-processes "$((nodes * each))" "${meet[@]}" -m "$@"
}

run() { on_nodes 1 "$@"; }

on_nodes() {
    local nodes=$1 code=0
    shift
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    # The launcher, which would die of the signal, ignores it; the processes that it starts listen for themselves.
    # shellcheck disable=SC2016 # for the shell on the node
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        bash -c 'trap "" USR1; exec "${@/#NODE_NUMBER/$SLURM_NODEID}"' bash "$@" &
    step=$!
    [ -z "$stopping" ] || stop
    # bash runs a trap only between commands, and the trap ends the wait.
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    if [ -n "$stopping" ] && [ "$code" -ne 0 ]; then
        echo "told to stop: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 300 # until the batch system ends this script
    fi
    return "$code"
}

stop() {
    stopping=yes
    [ -n "$step" ] || return 0
    # To the processes, not to this script; again, as those that are still starting do not listen yet.
    while kill -0 "$step" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID" || true
        sleep 5
    done &
}
trap stop USR1
