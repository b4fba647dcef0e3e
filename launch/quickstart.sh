#!/usr/bin/env bash
# The main job on synthetic CT: volumes → slice store → teacher, student alone, SPARK student → comparison.
# Everything lies in ./quickstart; started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
out=quickstart
recipe=launch/recipes/phantom.yaml
tracking="sqlite:///$PWD/$out/mlflow.db"
launch=(accelerate launch --config_file accelerate_config.yaml)
mkdir -p "$out"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "Synthetic CT volumes (NIfTI) → chunked slice store (Zarr)"
[ -d "$out/nifti" ] || { spark-data phantom "$out/nifti.part" --cases 60 && mv "$out/nifti.part" "$out/nifti"; }
spark-data prepare "$out/nifti" "$out/phantom.zarr" --layout kits --labels organ=1,tumour=2
[ -d "$out/phantom.zarr/splits/default" ] || spark-data split "$out/phantom.zarr" --train 0.6 --val 0.15 --test 0.25 --seed 0

step "The student alone (2 processes)"
"${launch[@]}" -m spark_dist.train --config "$recipe" --network enet \
    --out "$out/runs/student-alone" --tracking-uri "$tracking"

step "Teacher, then the student with the teacher's cached features: SPARK (2 processes)"
"${launch[@]}" -m spark_dist.distill --config "$recipe" --out "$out/runs/spark" --tracking-uri "$tracking"

step "Comparison on the test cases"
spark-dist compare --tracking-uri "$tracking" --experiment phantom-organ
spark-dist picture --dataset "$out/phantom.zarr" --out "$out/predictions.png" \
    "teacher=$out/runs/spark/teacher/best.safetensors" \
    "student alone=$out/runs/student-alone/student/best.safetensors" \
    "SPARK student=$out/runs/spark/student/best.safetensors"

cat <<TEXT

Predictions beside the truth: $out/predictions.png
The runs in a browser:        .venv/bin/mlflow ui --backend-store-uri $tracking --port 5000   → http://127.0.0.1:5000
TEXT
