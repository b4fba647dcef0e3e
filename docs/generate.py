"""Writes the generated tables of this folder: python docs/generate.py"""

from pathlib import Path

import torch

from spark_dist.distillers import DISTILLERS, build_distiller, distiller_settings
from spark_dist.entries import entry_bytes
from spark_dist.networks import build_network
from spark_dist.teacher_cache import probe_targets

CROP = (384, 384)


def methods_table() -> str:
    """What each method caches of a teacher, and its settings."""
    lines = [
        "# Distillation methods",
        "",
        "What the teacher cache keeps for each slice and orientation, in float16 before compression:",
        "unet → enet at 384×384 (tfkd: enet → enet, since its teacher is of the same kind). Each setting is an option,",
        "`--weights.NAME VALUE`.",
        "",
        "| method | cached | MiB a slice | settings and their defaults |",
        "|---|---|---|---|",
    ]
    with torch.device("meta"):
        networks = {name: build_network(name) for name in ("unet", "enet")}
    for name in sorted(DISTILLERS):
        teacher = networks["enet" if name == "tfkd" else "unet"].taps
        distiller = build_distiller(name, student=networks["enet"].taps, teacher=teacher, samples=1)
        _, shapes = probe_targets(distiller, teacher, CROP)
        cached = ", ".join(f"{key} {'×'.join(map(str, shape)) or '1'}" for key, shape in shapes.items()) or "nothing"
        settings = ", ".join(f"{key} {value:g}" for key, value in distiller_settings(name).items())
        lines.append(f"| `{name}` | {cached} | {entry_bytes(shapes, 'float16') / 2**20:.3f} | {settings} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(methods_table())
