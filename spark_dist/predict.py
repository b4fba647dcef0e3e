"""Label maps of NIfTI scans: spark-dist predict CHECKPOINT … SCAN … --out FOLDER"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.predict")

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate.utils import gather_object

from data_tools.errors import UserError, one_line, say_error
from data_tools.files import remove_abandoned
from data_tools.layouts import stem
from data_tools.options import parse_part, parse_spacing
from data_tools.ownership import MADE_BY, fingerprint
from data_tools.progress import console, progress_bar
from data_tools.scans import find_scans, mark_of, read_scan, write_prediction
from data_tools.volumes import sha256
from spark_dist.evaluation.prediction import Predictor, load_student
from spark_dist.networks.checkpoint import is_checkpoint
from spark_dist.training.distributed import make_accelerator, shut_down

from .options import Natural, Options, Probability

WEEK = 7 * 24 * 60.0
"""Minutes that a process waits for others, whose scans may take so much longer."""


@dataclass(kw_only=True)
class PredictOptions(Options):
    """Segment NIfTI scans with a trained network, or with the mean of several. The label maps lie on the scans' own
    grids. What is there already is skipped."""

    inputs: list[str] = field(
        metadata={
            "nargs": "+",
            "positional": "checkpoints (.safetensors, .onnx), of which several are averaged, and scans: NIfTI files, "
            "folders of them, patterns",
        }
    )
    out: Path
    """Folder for the label maps, which have the scans' names and end in .nii.gz."""
    probabilities: bool = False
    """Write the probabilities too, into a folder for each region below probabilities/."""
    tta: Literal["none", "flips"] = "none"
    """Test-time augmentation: none, or the mean over the four flips of each slice, which takes four times as long."""
    largest_component: bool = False
    """Keep only the largest component of each class."""
    threshold: Probability | None = None
    """Probability from which a voxel is the target; the default is the training's."""
    channel: Natural | None = None
    """Which channel of scans with a fourth axis; the default is the training's."""
    spacing: str = ""
    """X,Y,Z in mm along a file's axes, for files that do not know theirs."""
    part: str = ""
    """K/N: only the Kth of N parts of the scans, for arrays of jobs."""
    overwrite: bool = False
    """Replace predictions of other checkpoints, options or scans of the same name."""

    def __post_init__(self):
        super().__post_init__()
        for text, parse in ((self.spacing, parse_spacing), (self.part, parse_part)):
            if text:
                parse(text)
        if in_the_way := [p for p in (self.out, *self.out.parents) if p.exists() and not p.is_dir()]:
            raise UserError(f"--out {self.out}: {in_the_way[0]} is no folder; name another one")


OPTIONS = PredictOptions


def run(options: PredictOptions) -> None:
    """Predict this process's share of the scans. Raises `UserError` at the end if some could not be predicted."""
    checkpoints = [item for item in options.inputs if is_checkpoint(item)]
    if not checkpoints:
        raise UserError("no checkpoint is named; give the best.safetensors of a training job before the scans")
    if not (places := [item for item in options.inputs if not is_checkpoint(item)]):
        raise UserError("no scan is named; give NIfTI files, folders or patterns behind the checkpoint")
    scans = find_scans(places)
    number, parts = parse_part(options.part or "1/1")
    scans = scans[number - 1 :: parts]
    predictor = load_student(
        *checkpoints,
        flips=options.tta == "flips",
        largest_component=options.largest_component,
        threshold=options.threshold,
        device="cpu",
    )
    accelerator = make_accelerator(timeout=WEEK)
    predictor.network.to(accelerator.device)
    job = Job(options, predictor, [sha256(Path(path)) for path in checkpoints], accelerator.is_local_main_process)
    done = gather_object([job.say(path) for path in scans[accelerator.process_index :: accelerator.num_processes]])
    if accelerator.is_main_process:
        counts = {status: done.count(status) for status in ("predicted", "unchanged", "failed")}
        console.print(f"{len(done)} scans: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    failed = done.count("failed")
    shut_down(accelerator)
    if failed:
        raise UserError(f"{failed} of {len(done)} scans failed; mend them, and run the same command again")


@dataclass(frozen=True)
class Job:
    """Facts that are the same for all scans."""

    options: PredictOptions
    predictor: Predictor
    checkpoints: Sequence[str]
    """Hashes of their files."""
    shows_progress: bool

    def say(self, path: Path) -> str:
        """Predict a scan, say so in a line, and return what came of it: predicted, unchanged or failed."""
        try:
            line = self.predict(path)
        except (UserError, OSError, MemoryError) as error:
            say_error(reason(error, path))
            return "failed"
        if line:
            console.print(one_line(line))
        return "predicted" if line else "unchanged"

    def predict(self, path: Path) -> str:
        """Write what there is not yet of a scan's predictions. Returns a line on it, or nothing if all is there."""
        options, predictor, start = self.options, self.predictor, time.perf_counter()
        label, *maps = self.outputs(path)
        mark = f"{MADE_BY}: {self.identity(path)}"
        if all([is_there(out, mark, options.overwrite) for out in (label, *maps)]):
            return ""
        spacing = parse_spacing(options.spacing) if options.spacing else None
        scan = read_scan(path, predictor.card.preparation, options.channel, spacing)
        depth = len(scan.image)
        with progress_bar(path.name, depth, enabled=self.shows_progress) as advance:
            found = predictor.predict_scan(scan, bool(maps), lambda slices: [advance() for _ in range(slices)])
        for out, probabilities in zip(maps, found.probabilities if maps else (), strict=True):
            write_prediction(out, probabilities, scan, mark=mark)
        write_prediction(label, found.classes, scan, predictor.values, mark)
        shape = "×".join(map(str, scan.header.shape))
        notes = "".join(f"; {note}" for note in scan.header.notes)
        return f"{label}: {shape}, {time.perf_counter() - start:.1f} s{notes}"

    def outputs(self, path: Path) -> list[Path]:
        """The files to write for a scan: the label map, then the probabilities of each region."""
        name = f"{stem(path)}.nii.gz"
        regions = self.predictor.card.spec.regions if self.options.probabilities else []
        return [self.options.out / name, *(self.options.out / "probabilities" / region / name for region in regions)]

    def identity(self, path: Path) -> str:
        """A hash of everything that a scan's prediction follows from."""
        options = self.options
        facts = {name: getattr(options, name) for name in ("tta", "largest_component", "channel", "spacing")}
        facts |= {"checkpoints": self.checkpoints, "threshold": self.predictor.card.spec.threshold}
        return fingerprint({"scan": sha256(path), **facts})


def is_there(out: Path, mark: str, overwrite: bool) -> bool:
    """Whether a prediction is there already; what a process left that was killed while it wrote it is removed.

    Raises `UserError` for a file that is no prediction, and, without `overwrite`, for one of another scan or network.
    """
    remove_abandoned(out)
    if not (out.exists() or out.is_symlink()) or (found := mark_of(out)) == mark:
        return out.exists()
    if not found.startswith(MADE_BY):
        raise UserError(f"{out}: exists and is no prediction of spark-dist; move it away, or name another --out")
    if not overwrite:
        raise UserError(
            f"{out}: is a prediction of another scan, checkpoint or options; name another --out, or pass --overwrite"
        )
    return False


def reason(error: Exception, path: Path) -> str:
    """Why a scan can't be predicted, and what to do about it."""
    if isinstance(error, MemoryError):
        return f"{path}: does not fit into memory; use a machine with more, or leave out --probabilities"
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}; mend that and run the command again"
    return str(error)
