#!/usr/bin/env bash
# launch/does_it_help.sh RECIPE [SEEDS [OPTION …]]: does distilling help on these data? For each of SEEDS seeds (3) the
# student alone, the teacher, and the student that the teacher taught, as the recipe and OPTIONs say; then the
# comparison, whose interval is over seeds and cases. Everything lies below RUNS (runs), the figures in TRACKING
# (sqlite:///mlflow.db); the same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=$1 seeds=${2:-3}
shift $(($# < 2 ? $# : 2))
values=$(python - "$recipe" <<'PY'
import sys, yaml

recipe = {"student": "enet", "student_width": 1} | yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
print(recipe["student"], recipe["student_width"], sep="\n")
PY
)
{ read -r student && read -r width; } <<<"$values"
experiment=does-it-help-$(basename "$recipe" .yaml)
tracking=(--tracking-uri "${TRACKING:-sqlite:///mlflow.db}" --experiment "$experiment")
launch=(accelerate launch --config-file accelerate_config.yaml)
for seed in $(seq "$seeds"); do
    common=(--config "$recipe" --seed "$seed" "${tracking[@]}" "$@")
    out=${RUNS:-runs}/$experiment/seed-$seed
    "${launch[@]}" -m spark_dist.train "${common[@]}" --network "$student" --width "$width" --out "$out/alone"
    "${launch[@]}" -m spark_dist.distill "${common[@]}" --out "$out/distilled"
done
spark-dist compare "${tracking[@]}"
