"""Where trained networks look: spark-dist explain NAME=CHECKPOINT … --dataset STORE"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.explain")

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data_tools.errors import UserError, unknown_name
from data_tools.ownership import check_output
from data_tools.progress import console, progress_bar
from data_tools.store import Store, open_store
from spark_dist.data.slices import part_of_split
from spark_dist.data.views import SliceSpec
from spark_dist.evaluation.explanation import explain
from spark_dist.evaluation.figures import check_format, explanation_figure, predicted_slice
from spark_dist.evaluation.panel import fullest_slice, shown_slice
from spark_dist.networks.checkpoint import load_named
from spark_dist.training.journal import append, finished
from spark_dist.training.tracking import page_of, sync

from .options import Count, ServerOptions


@dataclass(kw_only=True)
class ExplainOptions(ServerOptions):
    """Draw where trained networks look: Grad-CAM, and the attention maps that spark matches, at both of the feature
    maps that distillation uses, beside image, ground truth and prediction."""

    checkpoints: list[str] = field(
        metadata={
            "nargs": "+",
            "positional": "trained networks, PATH or NAME=PATH: teacher, student alone, distilled student …",
        }
    )
    dataset: Path
    """Slice store made by spark-data prepare."""
    split: str = "default"
    """Name of the split in the store."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split."""
    slices: list[str] = field(default_factory=list)
    """Slices to show, each CASE:INDEX; the default is the worst ones."""
    rows: Count = 2
    """How many of the worst slices: of each case the slice with most of the target counts, and those come first in
    which the networks' mean Dice is lowest."""
    region: str = ""
    """Region of the task that is explained; the default is all of them together."""
    out: Path = Path("explanation.png")
    """File to write; its name's end says in which format: .png, .pdf, .svg …"""

    log_to: Path | None = None
    """Folder of a job that has ended (its --out): the picture becomes an artifact of its MLflow run."""

    def __post_init__(self):
        super().__post_init__()
        check_format(self.out, "--out")
        if self.log_to and not finished(self.log_to):
            raise UserError(f"--log-to {self.log_to}: no job that has ended; name its folder, or leave out --log-to")


OPTIONS = ExplainOptions


def run(options: ExplainOptions) -> None:
    """Draw the picture of the checkpoints' common task."""
    check_output(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, spec = load_named(options.checkpoints)
    for item, network in zip(options.checkpoints, networks.values(), strict=True):
        if network.taps is None:
            raise UserError(f"{item}: an ONNX file has no feature maps; give the .safetensors that it was made of")
        network.to(device)
    classes = explained_classes(options.region, spec)
    store = open_store(options.dataset)
    cases = part_of_split(store, options.split, options.part)
    if options.slices:
        places = [place_of(text, store, cases) for text in options.slices]
    else:
        places = worst_slices(store, cases, spec, networks, options.rows)
    shown = [shown_slice(store, name, z, spec) for name, z in places]
    slices = [predicted_slice(item, networks, spec) for item in shown]
    maps = [{name: explain(network, item, spec, classes) for name, network in networks.items()} for item in shown]
    explanation_figure(slices, maps, options.out, spec.regions)
    drawn = ", ".join(f"{name} slice {z}" for name, z in places)
    console.print(f"wrote {options.out}: {drawn}", markup=False)
    if options.log_to:
        append(options.log_to, {"artifact": str(options.out.absolute()), "folder": ""})
        sync(options.log_to, options.tracking_uri)
        console.print(page_of(options.log_to, options.tracking_uri), markup=False)


def explained_classes(region: str, spec: SliceSpec) -> list[int]:
    """The classes of a region, or of all. Raises `UserError` for one that the networks do not tell apart."""
    if region and region not in spec.regions:
        raise UserError(f"--region: {unknown_name('region of these networks', region, spec.regions)}")
    return [1 + spec.regions.index(region)] if region else list(range(1, spec.classes))


def place_of(text: str, store: Store, cases: Sequence[str]) -> tuple[str, int]:
    """Case and index of a slice, CASE:INDEX. Raises `UserError` if there is no such slice."""
    name, _, index = text.rpartition(":")
    if not name or not index.isdecimal():
        raise UserError(f"--slices {text}: write each as CASE:INDEX, such as {cases[0]}:0")
    if name not in cases:
        raise UserError(f"--slices {text}: {unknown_name('case of this part', name, cases)}")
    depth = store.cases[name].shape[0]
    if int(index) >= depth:
        raise UserError(f"--slices {text}: {name} has slices 0 to {depth - 1}")
    return name, int(index)


def worst_slices(
    store: Store, cases: Sequence[str], spec: SliceSpec, networks: Mapping[str, nn.Module], rows: int
) -> list[tuple[str, int]]:
    """Case and index of the fullest slice of each of the worst cases, by the networks' mean Dice in that slice."""
    found = []
    with progress_bar("worst slices", len(cases)) as advance:
        for name in cases:
            z = fullest_slice(store, name, spec)
            shown = shown_slice(store, name, z, spec)
            found.append((sum(shown.predicted(network, spec)[1] for network in networks.values()), name, z))
            advance()
    return [(name, z) for _, name, z in sorted(found)[:rows]]
