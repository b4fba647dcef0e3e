"""The tables of docs/scale.md: python docs/scale.py [--write]

Each figure is a formula below, with the constants that were measured or assumed on top. Change them to yours.
"""

import argparse
import re
from pathlib import Path

import torch

from spark_dist.data.number_formats import entry_bytes
from spark_dist.distillers import build_distiller
from spark_dist.networks import build_network
from spark_dist.teacher.fingerprint import probe_targets

GPUS = (8, 64, 512)
VOLUMES, SLICES = 10_000, 3_000_000
CROP, BATCH = 384, 16  # pixels; slices in each process and step
EPOCHS, LOG_EVERY = 90, 10
RATE = 200  # assumed: slices that a GPU trains a student on in a second (spark-dist profile measures it)
SLICE_BYTES = 252_000  # measured: image and label of a 512×512 slice, lz4 and bit shuffle
LATENCY = 20e-6  # assumed: seconds for a message between two GPUs
LINKS = {"25 Gb/s": 25e9 / 8, "400 Gb/s": 400e9 / 8}  # bytes a second
SHARD = 64  # slices in a file of the store
SEGMENT = 64 * 2**20  # bytes of a cache segment, before compression
METHODS = ("at", "kd", "spark")


def parameters(network: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(network).parameters())


def target_shapes(method: str) -> dict[str, list[int]]:
    """The shapes of the targets that a method caches of a unet for one slice."""
    with torch.device("meta"):
        teacher, student = build_network("unet").taps, build_network("enet").taps
    distiller = build_distiller(method, student=student, teacher=teacher, samples=2)
    return probe_targets(distiller, teacher, (CROP, CROP))[1]


def all_reduce_seconds(size: float, processes: int, bandwidth: float, latency: float = LATENCY) -> float:
    """A ring: each process sends and receives 2 (n − 1) / n of the data, in 2 (n − 1) messages."""
    return 2 * (processes - 1) / processes * size / bandwidth + 2 * (processes - 1) * latency


def number(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} "


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> dict[str, str]:
    """Each table by its name."""
    entries = {method: entry_bytes(target_shapes(method), "float16") for method in METHODS}
    names = {method: len(target_shapes(method)) for method in METHODS}
    reading = [
        [str(n), f"{number(n * RATE)}slices", f"{number(n * RATE * SLICE_BYTES)}B"]
        + [f"{number(n * RATE * (SLICE_BYTES + size))}B" for size in entries.values()]
        for n in GPUS
    ]
    cache = [
        [
            method,
            f"{number(size)}B",
            f"{number(size * SLICES * 8)}B",
            f"{number(-(-size * SLICES * 8 // SEGMENT) * (2 * names[method] + 3))}",
        ]
        for method, size in entries.items()
    ]
    reduce = [
        [network, link, f"{number(4 * size)}B"]
        + [f"{1000 * all_reduce_seconds(4 * size, n, bandwidth):.2f} ms" for n in GPUS]
        for network in ("enet", "unet")
        for size in [parameters(network)]
        for link, bandwidth in LINKS.items()
    ]
    run = []
    for n in GPUS:
        steps = -(-SLICES // (n * BATCH))
        seconds = SLICES / (n * RATE)
        points = EPOCHS * (steps // LOG_EVERY * 4 + 6)
        length = f"{seconds / 60:.1f} min", f"{EPOCHS * seconds / 3600:.1f} h"
        requests = f"{points / 500 / (EPOCHS * seconds) * 60:.2f} a minute"
        run.append([str(n), f"{n * BATCH}", f"{steps:,}", *length, f"{number(points)}values", requests])
    files = VOLUMES * 2 * (-(-SLICES // VOLUMES // SHARD) + 1) + VOLUMES
    return {
        "reading": table(["GPUs", "seen in a second", "store", *(f"… and cache, {m}" for m in METHODS)], reading),
        "cache": table(["method", "entry", "all slices × 8 orientations", "files"], cache),
        "all-reduce": table(["network", "link", "gradients", *(f"{n} GPUs" for n in GPUS)], reduce),
        "run": table(["GPUs", "batch", "steps", "epoch", f"{EPOCHS} epochs", "MLflow values", "requests"], run),
        "store": f"{number(SLICES * SLICE_BYTES)}B in {number(files)}files",
    }


def filled(text: str) -> str:
    """A page with its tables computed anew."""
    for name, content in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    page = Path(__file__).with_name("scale.md")
    if parser.parse_args().write:
        page.write_text(filled(page.read_text()))
    else:
        print("\n\n".join(f"{name}\n{content}" for name, content in tables().items()))
