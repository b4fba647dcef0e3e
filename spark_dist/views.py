"""A slice in the views that training sees of it: spark-dist views --config RECIPE --augment full"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.views")

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from data_tools.errors import UserError, unknown_name
from data_tools.labels import fullest
from data_tools.ownership import check_output
from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.slices import SliceTable, slice_table
from spark_dist.evaluation.figures import REGIONS, check_format, save

from .config import TrainingOptions
from .options import Count


@dataclass(kw_only=True)
class ViewsOptions(TrainingOptions):
    """Draw a training slice in the views that a job with the same options sees of it."""

    case: str = ""
    """Case of the training part; the default is its first one."""
    slice: int = -1
    """Index of the slice (-1: the one with most of the target)."""
    show: Count = 12
    """How many views to draw, the first ones; no more than there are."""
    picture: Path = Path("views.png")
    """File to write; its name's end says in which format: .png, .pdf, .svg …"""

    def __post_init__(self):
        super().__post_init__()
        check_format(self.picture, "--picture")


OPTIONS = ViewsOptions


def run(options: ViewsOptions) -> None:
    """Draw one slice as it is stored, and its views."""
    check_output(options.picture, "--picture")
    store = open_store(options.dataset)
    task = store.task(options.task)
    table = slice_table(store, options.split, "train", options.task, options.slices)
    row = row_of(table, options)
    views, spec = options.slice_views, options.slice_spec
    dataset = SliceDataset(table, spec, views=views)
    keys = row * views.count + np.arange(min(options.show, views.count))
    batch = to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))
    images = (batch.image[:, spec.context].numpy() + 1) / 2
    masks = batch.mask.argmax(dim=1).numpy()

    name, z = table.cases[table.case[row]], int(table.slice[row])
    low, high = store.cases[name].window
    stored = (dataset.reader.slice(name, "image", z).astype(np.float32) - low) / (high - low)
    label = task.classes_of(dataset.reader.slice(name, "label", z))
    columns = -(-len(images) // min(3, len(images)))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * lines + 2.1 * columns, 2.3 * lines + 0.4), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(lines, columns))
    axis = left.subplots()
    outlined(axis, stored, label, f"{name}, slice {z}, as stored")
    if not views.anywhere:
        (rows, places), _ = views.crop.overlap(stored.shape)
        size = places.stop - places.start, rows.stop - rows.start
        corner = places.start - 0.5, rows.start - 0.5
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#f2b134", linestyle="--", label="crop"))
    axes = right.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for number, (axis, image, mask) in enumerate(zip(axes, images, masks, strict=False)):
        outlined(axis, image, mask, f"view {number}")
    patches = [Patch(color=colour, label=region) for region, colour in zip(task.regions, cycle(REGIONS), strict=False)]
    patches += [Patch(fill=False, edgecolor="#f2b134", linestyle="--", label="crop")] * (not views.anywhere)
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    save(figure, options.picture)
    console.print(f"wrote {options.picture}: {len(images)} of {views.count} views")


def row_of(table: SliceTable, options: ViewsOptions) -> int:
    """The slice that was asked for, in the table. Raises `UserError` if training does not see it."""
    name = options.case or table.cases[0]
    if name not in table.cases:
        raise UserError(str(unknown_name("training case", name, table.cases)))
    case, rows = table.store.cases[name], np.flatnonzero(table.case == table.cases.index(name))
    regions = table.store.task(options.task).regions
    z = int(fullest(case.voxels(*regions))[0]) if options.slice == -1 else options.slice
    found = rows[table.slice[rows] == z]
    if not len(found):
        raise UserError(f"--slice {z}: training with --slices {options.slices} sees no such slice of {name}")
    return int(found[0])


def outlined(axis, image: np.ndarray, mask: np.ndarray, title: str) -> None:
    """An image (H, W) in [0, 1] with the outline of each class of its mask (H, W)."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for number in np.unique(mask[mask > 0]):
        colour = REGIONS[(int(number) - 1) % len(REGIONS)]
        axis.contour(mask == number, levels=[0.5], colors=[colour], linewidths=1.2)
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()
