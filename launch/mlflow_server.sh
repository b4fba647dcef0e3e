#!/usr/bin/env bash
# An MLflow server that many jobs log to: launch/mlflow_server.sh [--dry-run] [FOLDER]
# Database (SQLite) and artifacts lie in FOLDER (mlflow). Jobs log to it with --tracking-uri http://127.0.0.1:5000. Settings:
#   DATABASE   for more than a few jobs at a time: postgresql+psycopg2://USER@HOST/mlflow, which is there and
#              empty at first (pip install psycopg2-binary; the password belongs into ~/.pgpass)
#   ARTIFACTS  another place for pictures and checkpoints: a folder, or s3://BUCKET/FOLDER
#   HOST PORT  where it listens: 127.0.0.1 5000
#   WORKERS    its processes: 2
#   NAME       the name by which a proxy in front of it is called
# It asks nobody for a password, so it listens on its own machine alone. From another one, take a tunnel
# (ssh -L 5000:127.0.0.1:5000 MACHINE), or put a proxy in front of it which asks; for NAME=mlflow.example.org, with nginx:
#   server {
#       listen 443 ssl;  server_name mlflow.example.org;  ssl_certificate …;  ssl_certificate_key …;
#       auth_basic MLflow;  auth_basic_user_file /etc/nginx/mlflow.htpasswd;
#       client_max_body_size 0;  # for checkpoints
#       location / { proxy_pass http://127.0.0.1:5000;  proxy_set_header Host $host; }
#   }
# Jobs then log with --tracking-uri https://mlflow.example.org, and find the password in MLFLOW_TRACKING_USERNAME and
# MLFLOW_TRACKING_PASSWORD.
set -euo pipefail
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
folder=$(realpath -m "${1:-mlflow}")
port=${PORT:-5000}
# MLflow answers only those who call it by a name that it knows.
named=()
[ -z "${NAME:-}" ] || named=(--allowed-hosts "$NAME,localhost:$port,127.0.0.1:$port" --cors-allowed-origins "https://$NAME")

export MLFLOW_DISABLE_TELEMETRY=true            # nothing leaves the house
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # its jobs are for language models, and take memory and time
line=(mlflow server --host "${HOST:-127.0.0.1}" --port "$port" --workers "${WORKERS:-2}"
    --backend-store-uri "${DATABASE:-sqlite:///$folder/mlflow.db}"
    --artifacts-destination "${ARTIFACTS:-$folder/artifacts}" "${named[@]}")
if [ -n "$dry_run" ]; then
    printf '%q ' "${line[@]}"
    echo
    exit
fi
mkdir -p "$folder"
exec "${line[@]}"
