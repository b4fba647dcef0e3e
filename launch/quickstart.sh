#!/usr/bin/env bash
# The main job on synthetic CT, few cases of which are labelled: volumes → slice store → student alone, teacher, student
# with the teacher's help on the unlabelled cases → comparison.
#   launch/quickstart.sh [FOLDER]
# Everything lies in FOLDER (quickstart); started again, it goes on where it was. CASES and STEPS make it shorter,
# SEED is that of the training.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-quickstart}")
cases=${CASES:-128}
tracking="sqlite:///$out/mlflow.db"
recipe=(--config launch/recipes/phantom.yaml --dataset "$out/phantom.zarr" --tracking-uri "$tracking")
recipe+=(${SEED:+--seed "$SEED"} ${STEPS:+--steps "$STEPS"})
launch=(accelerate launch --config-file accelerate_config.yaml)
mkdir -p "$out"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "Synthetic CT volumes (NIfTI) → slice store (Zarr)"
[ -d "$out/nifti" ] || { spark-data phantom "$out/nifti.part" --cases "$cases" --size 64 && mv "$out/nifti.part" "$out/nifti"; }
spark-data prepare "$out/nifti" "$out/phantom.zarr" --layout kits --labels organ=1,tumour=2
[ -d "$out/phantom.zarr/splits/default" ] || spark-data split "$out/phantom.zarr" --train 0.375 --val 0.125 --test 0.5 --hide-labels "$((cases * 3 / 8 - 4))"

step "The student alone, on the 4 labelled cases (2 processes)"
"${launch[@]}" -m spark_dist.train "${recipe[@]}" --network enet --views -1 --out "$out/student-alone"

step "The teacher on the 4, then the student on all, with the teacher's cached predictions (2 processes)"
"${launch[@]}" -m spark_dist.distill "${recipe[@]}" --out "$out/distilled" --cache-folder "$out/teacher-cache" \
    ${STEPS:+--teacher-steps "$STEPS"}

step "Comparison on the test cases"
spark-dist compare --tracking-uri "$tracking" --experiment phantom-organ
spark-dist picture --dataset "$out/phantom.zarr" --out "$out/predictions.png" \
    "teacher=$out/distilled/teacher/best.safetensors" \
    "student alone=$out/student-alone/network/best.safetensors" \
    "distilled=$out/distilled/student/best.safetensors"

printf '\nPredictions beside the truth: %s\n' "$out/predictions.png"
spark-dist track-sync "$out/distilled" --tracking-uri "$tracking"
