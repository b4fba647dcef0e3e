"""Writes the generated tables of this folder: python docs/generate.py"""

import inspect
import re
from pathlib import Path

import torch

from spark_dist.data.number_formats import entry_bytes
from spark_dist.distillers import DISTILLERS, build_distiller, distiller_settings
from spark_dist.networks import NETWORKS, build_network
from spark_dist.networks.cost import Model, example, gflops_of
from spark_dist.teacher.fingerprint import probe_targets

CROP = (384, 384)
MANY = 5
"""Classes of the second table of methods."""


def methods_table() -> str:
    """A table of the methods: the targets that each caches of a teacher, and its settings."""
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
    several = [
        "",
        "## Several classes",
        "",
        "Every method takes a background and any number of regions. Focal loss and cross entropy are over all classes,",
        f"soft Dice is the mean over the regions. What is cached grows with the classes: here {MANY}.",
        "",
        "| method | what several classes mean | MiB a slice |",
        "|---|---|---|",
    ]
    with torch.device("meta"):
        networks = {name: build_network(name) for name in ("unet", "enet")}
    for name in sorted(DISTILLERS):
        teacher = networks["enet" if name == "tfkd" else "unet"].taps
        distiller = build_distiller(name, student=networks["enet"].taps, teacher=teacher, samples=1)
        _, shapes = probe_targets(distiller, teacher, CROP, MANY)
        meaning = several_classes(DISTILLERS[name])
        several.append(f"| `{name}` | {meaning} | {entry_bytes(shapes, 'float16') / 2**20:.3f} |")
        _, shapes = probe_targets(distiller, teacher, CROP)
        cached = ", ".join(f"{key} {'×'.join(map(str, shape)) or '1'}" for key, shape in shapes.items()) or "nothing"
        settings = ", ".join(f"{key} {value:g}" for key, value in distiller_settings(name).items())
        lines.append(f"| `{name}` | {cached} | {entry_bytes(shapes, 'float16') / 2**20:.3f} | {settings} |")
    return "\n".join(lines + several) + "\n"


def several_classes(method: type) -> str:
    """A sentence on several classes from a method's docstring."""
    found = re.search(r"Several classes: (.*?)(\n\n|$)", inspect.getdoc(method), re.DOTALL)
    return " ".join(found[1].split()).rstrip(".") if found else "the loss against the truth alone sees classes"


def networks_table() -> str:
    """A table of the networks: their cost, and where their features are taken."""
    lines = [
        "# Networks",
        "",
        "One 384×384 slice at width 1; a multiply-add counts 2 (universeg: with 8 examples). A feature map is given as",
        "channels×height×width; the crop's sides must be multiples of the stride. Each network compiles with",
        "`torch.compile(network, fullgraph=True)`, as tests check. `spark-dist profile` measures memory and latency.",
        "Which ones become ONNX files, and with which differences: [export.md](export.md).",
        "",
        "| network | parameters | GFLOPs | low | high | stride |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(NETWORKS):
        with torch.device("meta"):
            network = build_network(name).eval()
            output = network(example(network, CROP))
        low, high = ("×".join(map(str, t.shape[1:])) for t in (output.low, output.high))
        parameters = sum(p.numel() for p in network.parameters())
        gflops = gflops_of(Model(name), CROP)
        lines.append(f"| `{name}` | {parameters:,} | {gflops:.3f} | {low} | {high} | {network.stride} |")
    return "\n".join(lines) + "\n"


TABLES = {"methods.md": methods_table, "networks.md": networks_table}

if __name__ == "__main__":
    for file, table in TABLES.items():
        (Path(__file__).parent / file).write_text(table())
