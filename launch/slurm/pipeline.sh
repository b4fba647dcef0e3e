#!/usr/bin/env bash
# launch/slurm/pipeline.sh [--dry-run] RECIPE DATA --layout kits --labels organ=1,tumour=2
# Everything from volumes to the comparison, as jobs of which each waits for the one before (afterok): prepare (an array),
# split, teacher, cache, distill, compare. RECIPE names the store, task, teacher, student and method. PARTS is the number
# of prepare's tasks, OPTIONS holds more options for training, and SBATCH_FLAGS for sbatch.
set -euo pipefail
cd "$(dirname "$0")/../.."
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
recipe=$1 data=$2
shift 2
read -ra options <<<"${OPTIONS:-}"
read -ra flags <<<"${SBATCH_FLAGS:-}"
value() { sed -n "s/^$1: *//p" "$recipe"; }
store=$(value dataset) task=$(value task) teacher=$(value teacher) width=$(value teacher_width) runs=${RUNS:-runs}
common=(--config "$recipe" "${options[@]}")
name=$(basename "$store" .zarr)-$task

before=
submit() { # sbatch, after the job before
    local line=(sbatch --parsable --output=%x-%j.log ${before:+--dependency=afterok:$before} "${flags[@]}" "$@")
    printf '%q ' "${line[@]}"
    echo
    if [ -n "$dry_run" ]; then before=JOB; else before=$("${line[@]}" | cut -d';' -f1); fi
}

submit --array="1-${PARTS:-8}" launch/slurm/prepare.sbatch "$data" "$store" "$@"
submit --job-name=spark-split --wrap "spark-data split $(printf %q "$store")"
submit launch/slurm/train.sbatch "${common[@]}" --network "$teacher" --width "${width:-1}" --out "$runs/$name/teacher"
checkpoint=$runs/$name/teacher/student/best.safetensors
submit launch/slurm/cache.sbatch "${common[@]}" --teacher-checkpoint "$checkpoint"
submit launch/slurm/distill.sbatch "${common[@]}" --teacher-checkpoint "$checkpoint" --out "$runs/$name/distilled"
submit --job-name=spark-compare --wrap "spark-dist compare --experiment $name ${COMPARE:-}"
