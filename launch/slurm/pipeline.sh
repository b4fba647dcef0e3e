#!/usr/bin/env bash
# launch/slurm/pipeline.sh [--dry-run] RECIPE DATA --layout kits --labels organ=1,tumour=2
# Everything from volumes to the comparison, as jobs of which each waits for the one before (afterok): prepare (an array),
# split, teacher, cache, distill, compare. RECIPE names the store, task, teacher, student and method. PARTS is the number
# of prepare's tasks, OPTIONS holds more options for training, and SBATCH_FLAGS for sbatch. The same command goes on where
# a job failed: each finds what is done already, and a split that is there is kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
recipe=$1 data=$2
shift 2
read -ra options <<<"${OPTIONS:-}"
read -ra flags <<<"${SBATCH_FLAGS:-}"
# Lines of a recipe, read as the YAML that it is.
values=$(python - "$recipe" <<'PY'
import pathlib, sys, yaml

file, names = sys.argv[1], ("dataset", "task", "teacher", "teacher_width", "experiment")
recipe = {"teacher": "unet", "teacher_width": 1} | yaml.safe_load(open(file, encoding="utf-8"))
missing = [name for name in ("dataset", "task") if not recipe.get(name)]
if missing:
    sys.exit(f"error: {file}: has no {' and no '.join(missing)}; the pipeline needs both")
recipe["experiment"] = recipe.get("experiment") or f"{pathlib.Path(recipe['dataset']).stem}-{recipe['task']}"
print("\n".join(str(recipe[name]) for name in names))
PY
)
{ read -r store && read -r task && read -r teacher && read -r width && read -r experiment; } <<<"$values"
common=(--config "$recipe" "${options[@]}")
out=${RUNS:-runs}/$(basename "$store" .zarr)-$task

before=
submit() { # sbatch, after the job before
    local line=(sbatch --parsable --output=%x-%j.log ${before:+--dependency=afterok:$before} "${flags[@]}" "$@")
    printf '%q ' "${line[@]}"
    echo
    if [ -n "$dry_run" ]; then before=JOB; else before=$("${line[@]}" | cut -d';' -f1); fi
}

submit --array="1-${PARTS:-8}" launch/slurm/prepare.sbatch "$data" "$store" "$@"
submit --job-name=spark-split --wrap "spark-data split --keep $(printf %q "$store")"
submit launch/slurm/train.sbatch "${common[@]}" --network "$teacher" --width "$width" --out "$out/teacher"
checkpoint=$out/teacher/network/best.safetensors
submit launch/slurm/cache.sbatch "${common[@]}" --teacher-checkpoint "$checkpoint"
submit launch/slurm/distill.sbatch "${common[@]}" --teacher-checkpoint "$checkpoint" --out "$out/distilled"
submit --job-name=spark-compare --wrap "spark-dist compare --experiment $(printf %q "$experiment") ${COMPARE:-}"
