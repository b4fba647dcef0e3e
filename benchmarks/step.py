"""The cost of a training step with and without a teacher: python -m benchmarks.step

All variants take turns in one run, and a variant's figure is the median of its steps, so that what else the machine
does falls on all alike. A step is what the loop does: it takes a batch that was read meanwhile, computes targets or
has them read, takes the loss, its gradients and the optimizer's step; the next batch is read while it computes, and
its time is over when both are done.

Each turn is two steps, of which the second counts: what the step before has left in caches and in freed memory is what
a job's step finds. On a machine that others use as well, `--clock cpu --threads 1` counts the seconds of all of the
process's threads in place of the wall clock's, which a step shares with whoever else is there.
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.plain_spark import PlainSPARK, TeacherMapsSPARK, plain_levels
from data_tools.creation import create_store
from data_tools.store import open_store, write_case, write_split
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.cache import CacheLayout
from spark_dist.data.slices import slice_table
from spark_dist.data.views import ORIENTATIONS, Crop, SliceSpec
from spark_dist.distillers import build_distiller
from spark_dist.distillers.plain import Plain
from spark_dist.networks import NetworkOutput, build_network
from spark_dist.teacher.fingerprint import open_cache, probe_targets
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.training.distillation import Distillation

METHODS = ("spark", "kd", "at", "emkd")
TARGETS = {"spark, cache": 1.25, "kd, cache": 1.10, "at, cache": 1.10, "emkd, cache": 1.10}
"""At most so many plain student steps."""
LIVE_OVER_CACHED = 10
"""Live SPARK in the plain formulation takes at least so many cached SPARK steps."""
CHANGES = {
    "spark, plain formulation, teacher's outputs at hand": PlainSPARK,
    "… and the teacher's maps and poolings are constants": TeacherMapsSPARK,
    "… and distances from second moments": None,
    "… and levels built from one another": None,
}
"""SPARK's loss, one change after the other, its targets lying in memory."""
RESULTS = Path(__file__).parent / "results"


class Bench:
    """Variants of a step that share data and teacher."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.o, self.folder = options, folder
        self.device = torch.device(options.device)
        self.table = slice_table(open_store(data(folder / "data.zarr", options)), "default", "train", "organ")
        self.spec = SliceSpec("organ", Crop((options.crop, options.crop)))
        torch.manual_seed(0)
        self.teacher = build_network("unet").eval().to(self.device)
        self.taps = build_network("enet").taps, self.teacher.taps
        self.autocast = (lambda: torch.autocast(self.device.type, torch.bfloat16)) if options.bf16 else nullcontext
        n = options.batch
        self.batches = [[row * ORIENTATIONS for row in range(k * n, (k + 1) * n)] for k in range(options.batches)]
        self.reader = ThreadPoolExecutor(1)
        self.outputs: dict[int, NetworkOutput] = {}
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]

    def variants(self) -> dict[str, Callable[[], None]]:
        """All steps by name; caches are filled."""
        found = {"plain student": self.variant(Plain(), None)}
        for method in METHODS:
            distiller = build_distiller(method, student=self.taps[0], teacher=self.taps[1])
            found[f"{method}, cache"] = self.variant(distiller, self.filled(method, distiller))
            found[f"{method}, live"] = self.variant(distiller, None)
        found["spark, live, plain formulation"] = self.variant(PlainSPARK(*self.taps), None)
        for how in ("channels last", "compiled")[: 1 + self.o.compile]:
            found[f"plain student, {how}"] = self.variant(Plain(), None, how)
            distiller = build_distiller("spark", *self.taps)
            found[f"spark, cache, {how}"] = self.variant(distiller, self.filled("spark", distiller), how)
        if self.o.changes:
            found |= self.changes()
        return found

    def filled(self, method: str, distiller):
        """A cache with all batches of a method."""
        crop = (self.o.crop, self.o.crop)
        shapes = probe_targets(distiller, self.taps[1], crop)[1]
        layout = CacheLayout(len(self.table) * ORIENTATIONS, shapes, "float16")
        cache = open_cache(self.folder / "cache", {"method": method}, layout)
        with torch.no_grad():
            for keys in self.batches:
                batch = to_device(self.read(keys, None), self.dataset(), self.device)
                cache.add(batch.keys, distiller.teacher_targets(self.output(batch), batch.mask))
        cache.flush()
        return cache

    def output(self, batch) -> NetworkOutput:
        """The teacher's output for one of the batches, computed once."""
        if int(batch.keys[0]) not in self.outputs:
            with torch.no_grad(), self.autocast():
                self.outputs[int(batch.keys[0])] = NetworkOutput(*(x.float() for x in self.teacher(batch.image)))
        return self.outputs[int(batch.keys[0])]

    def dataset(self, cache=None) -> SliceDataset:
        return SliceDataset(self.table, self.spec, cache)

    def read(self, keys, cache):
        return self.dataset(cache).__getitems__(keys)

    def model(self, distiller, how: str = ""):
        torch.manual_seed(0)
        model = Distillation(build_network("enet"), distiller).to(self.device).train()
        if how == "channels last":
            model.to(memory_format=torch.channels_last)
        if how == "compiled":
            model.student.compile()
        return model, torch.optim.Adam(model.parameters(), fused=True)

    def variant(self, distiller, cache, how: str = "") -> Callable[[], float]:
        """A step with targets from the cache or else from the teacher."""
        model, optimizer = self.model(distiller, how)
        teacher = None if isinstance(distiller, Plain) else self.teacher
        targets = TeacherTargets(teacher, distiller, cache, self.autocast)
        dataset = SliceDataset(self.table, self.spec, cache)
        ahead, turn = [dataset.__getitems__(self.batches[0])], [0]

        def step() -> float:
            if self.o.cold and cache is not None:
                forget_pages(cache.folder)
            start = self.clock()
            turn[0] += 1
            reading = self.reader.submit(dataset.__getitems__, self.batches[turn[0] % len(self.batches)])
            batch = to_device(ahead.pop(), dataset, self.device)
            with self.autocast():
                terms = model(batch.image, *targets(batch), batch.index)
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.finish()
            ahead.append(reading.result())
            return self.clock() - start

        if cache is not None:
            assert ahead[0].entries.arrays is not None
        return step

    def changes(self) -> dict[str, Callable[[], float]]:
        batch = to_device(self.read(self.batches[0], None), self.dataset(), self.device)
        found = {}
        for name, kind in CHANGES.items():
            distiller = (kind or type(build_distiller("spark", *self.taps)))(*self.taps)
            model, optimizer = self.model(distiller)
            constants = distiller.teacher_targets(self.output(batch), batch.mask)
            if name.endswith("second moments"):
                constants = {key: x for key, x in constants.items() if not key.endswith("_coarse")}
            patched = name.endswith("second moments")
            found[name] = self.change(model, optimizer, batch, constants, patched)
        return found

    def change(self, model, optimizer, batch, constants, patched) -> Callable[[], float]:
        def step() -> float:
            start = self.clock()
            with ExitStack() as stack:
                if patched:
                    stack.enter_context(patch("spark_dist.distillers.quadratic.pooled_levels", plain_levels))
                with self.autocast():
                    terms = model(batch.image, batch.mask, constants, batch.index)
                sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.finish()
            return self.clock() - start

        return step

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def data(path: Path, options: argparse.Namespace) -> Path:
    """A store of noise with a bright disc in every slice."""
    create_store(
        path,
        {"labels": {"organ": [1]}, "window": {"kind": "fixed", "low": -200, "high": 300}, "layout": "noise"},
    )
    generator = np.random.default_rng(0)
    side, slices = options.crop, options.batch * options.batches
    y, x = np.indices((side, side))
    label = np.broadcast_to(np.hypot(y - side / 2, x - side / 3) < side / 5, (slices, side, side)).astype(np.uint8)
    image = (label * 120 + generator.normal(0, 40, label.shape)).round().astype(np.int16)
    facts = {"affine": np.eye(4).tolist(), "spacing": [1.0, 1.0, 1.0], "window": [-200.0, 300.0], "source": {}}
    for name in ("train", "val", "test"):
        write_case(path, name, image, label, facts)
    write_split(path, "default", {"train": ["train"], "val": ["val"], "test": ["test"], "seed": 0})
    return path


def forget_pages(folder: Path) -> None:
    """Let the page cache forget a folder's files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(steps: dict[str, Callable[[], float]], rounds: int, live_rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the variants taking turns in an order that is drawn anew for each round, as a step also
    depends on what was in the caches before it; a first turn of each does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, generator = list(steps.items()), random.Random(0)
    for k in range(rounds + 1):
        generator.shuffle(order)
        for name, step in order:
            if "live" in name and k > live_rounds:
                continue
            _, seconds = step(), step()
            if k:
                times[name].append(seconds)
        print(f"\rround {k + 1} of {rounds + 1}", end="", flush=True)
    print()
    return times


def table(times: dict[str, list[float]]) -> list[dict]:
    plain = statistics.median(times["plain student"])
    rows = []
    for name, values in times.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        row = {"step": name, "median_ms": 1000 * median, "quartile_1_ms": 1000 * low, "quartile_3_ms": 1000 * high}
        rows.append(row | {"plain_student_steps": median / plain, "target": TARGETS.get(name, "")})
    return rows


def markdown(rows: list[dict], about: str) -> str:
    lines = [about, "", "| step | ms (median) | quartiles | plain student steps | target |", "|---|---|---|---|---|"]
    for r in rows:
        target = f"≤ {r['target']:.2f}" if r["target"] else ""
        quartiles = f"{r['quartile_1_ms']:.0f} … {r['quartile_3_ms']:.0f}"
        lines.append(
            f"| {r['step']} | {r['median_ms']:.0f} | {quartiles} | {r['plain_student_steps']:.2f} | {target} |"
        )
    ratio = next(r for r in rows if r["step"] == "spark, live, plain formulation")["median_ms"]
    ratio /= next(r for r in rows if r["step"] == "spark, cache")["median_ms"]
    lines += [
        "",
        f"Live SPARK in the plain formulation takes {ratio:.1f} cached SPARK steps (target: ≥ {LIVE_OVER_CACHED}).",
    ]
    return "\n".join(lines) + "\n"


def figure(rows: list[dict], path: Path, about: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [r["step"] for r in rows][::-1]
    values = [r["plain_student_steps"] for r in rows][::-1]
    colours = [
        "#777777"
        if n == "plain student"
        else "#1f77b4"
        if ", cache" in n
        else "#bbbbbb"
        if n.startswith("plain student")
        else "#d62728"
        if "live" in n
        else "#ff9f40"
        for n in names
    ]
    fig, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.4), layout="constrained")
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
    for name, target in TARGETS.items():
        y = names.index(name)
        axes.plot([target, target], [y - 0.4, y + 0.4], color="black", lw=1.5)
    axes.axvline(1, color="#777777", lw=0.8)
    axes.set(xscale="log", xlabel="plain student steps (black: target)")
    # Over the whole figure: the axes are narrow beside the long names.
    fig.suptitle(about.replace(", wall", ",\nwall").replace(", cpu", ",\ncpu"), fontsize=9)
    axes.set_xlim(min(0.7, min(values) * 0.8), max(values) * 1.6)
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4, help="batches in the data set")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each variant")
    parser.add_argument("--live-rounds", type=int, default=0, help="steps of those with a live teacher (0: as many)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--cold", action="store_true", help="read the cache from the disk rather than from memory")
    parser.add_argument("--changes", action="store_true", help="also SPARK's loss, one change after the other")
    parser.add_argument("--compile", action="store_true", help="also a compiled student (a minute for its first step)")
    parser.add_argument("--only", default="", help="variants whose name contains one of these (comma-separated)")
    parser.add_argument("--name", default="step", help="name of the files in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads, {platform.machine()}"
    )
    about = f"unet → enet, {options.crop}×{options.crop}, batch {options.batch}, "
    about += f"{'bfloat16' if options.bf16 else 'float32'}, {where}, {'cold' if options.cold else 'warm'} page cache, "
    about += f"torch {torch.__version__}, {options.clock} time, median of {options.rounds} steps"
    if options.live_rounds:
        about += f" ({options.live_rounds} of those with a live teacher)"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        steps = Bench(options, Path(folder)).variants()
        if options.only:
            wanted = ("plain student", *options.only.split(","))
            steps = {name: step for name, step in steps.items() if any(w in name for w in wanted)}
        times = measure(steps, options.rounds, options.live_rounds or options.rounds)
    rows = table(times)
    print(
        markdown(rows, about)
        if not options.only
        else "\n".join(f"{r['step']:55} {r['median_ms']:8.1f} {r['plain_student_steps']:6.3f}" for r in rows)
    )
    if options.only:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.md").write_text(markdown(rows, about))
    (RESULTS / f"{options.name}.json").write_text(json.dumps({"about": about, "seconds": times}, indent=1))
    with open(RESULTS / f"{options.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, RESULTS / f"{options.name}.png", about)


if __name__ == "__main__":
    main()
