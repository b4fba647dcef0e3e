#!/usr/bin/env bash
# The main job on synthetic CT: volumes → slice store → teacher, student alone, SPARK student → comparison.
#   launch/quickstart.sh [FOLDER]
# Everything lies in FOLDER (quickstart); started again, it goes on where it was. CASES and EPOCHS make it shorter.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-quickstart}")
tracking="sqlite:///$out/mlflow.db"
recipe=(--config launch/recipes/phantom.yaml --dataset "$out/phantom.zarr" --tracking-uri "$tracking")
launch=(accelerate launch --config-file accelerate_config.yaml)
mkdir -p "$out"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "Synthetic CT volumes (NIfTI) → slice store (Zarr)"
[ -d "$out/nifti" ] || { spark-data phantom "$out/nifti.part" --cases "${CASES:-60}" && mv "$out/nifti.part" "$out/nifti"; }
spark-data prepare "$out/nifti" "$out/phantom.zarr" --layout kits --labels organ=1,tumour=2
[ -d "$out/phantom.zarr/splits/default" ] || spark-data split "$out/phantom.zarr" --train 0.6 --val 0.15 --test 0.25 --seed 0

step "The student alone (2 processes)"
"${launch[@]}" -m spark_dist.train "${recipe[@]}" --network enet --out "$out/student-alone" ${EPOCHS:+--epochs "$EPOCHS"}

step "The teacher, then the student with the teacher's cached features: SPARK (2 processes)"
"${launch[@]}" -m spark_dist.distill "${recipe[@]}" --out "$out/spark" --cache-folder "$out/teacher-cache" \
    ${EPOCHS:+--epochs "$EPOCHS" --teacher-epochs "$EPOCHS"}

step "Comparison on the test cases"
spark-dist compare --tracking-uri "$tracking" --experiment phantom-organ
spark-dist picture --dataset "$out/phantom.zarr" --out "$out/predictions.png" \
    "teacher=$out/spark/teacher/best.safetensors" \
    "student alone=$out/student-alone/network/best.safetensors" \
    "SPARK student=$out/spark/student/best.safetensors"

printf '\nPredictions beside the truth: %s\n' "$out/predictions.png"
spark-dist track-sync "$out/spark" --tracking-uri "$tracking"
