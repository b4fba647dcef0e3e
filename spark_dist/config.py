"""The options of `train` and `distill`: their names, defaults and help, in groups. The defaults are the original
system's, but for --slices."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from data_tools.errors import UserError
from data_tools.labels import names_in
from spark_dist.data.augmentation import Views
from spark_dist.data.order import Order
from spark_dist.data.slices import SliceTable
from spark_dist.data.views import Crop, SliceSpec

from .options import (
    Bounds,
    Context,
    Count,
    Decay,
    Minutes,
    Natural,
    NonNegative,
    Number,
    Offset,
    Options,
    Pixels,
    Probability,
    Seed,
    ServerOptions,
    Width,
    Workers,
)


@dataclass(kw_only=True)
class DataOptions(Options):
    """Data"""

    dataset: Path
    """Slice store made by spark-data prepare."""
    task: str
    """What is segmented: a region of the store (organ), several that exclude one another, where a later one wins over
    an earlier (anterior,posterior), or all."""
    split: str = "default"
    """Name of the split in the store."""
    slices: Literal["all", "labelled", "mixed"] = "all"
    """Train on all slices, on those that show the target (labelled), or on batches with a share of either kind
    (mixed)."""
    target_share: Annotated[float, Bounds(above=0, below=1)] = 0.5
    """Share of slices that show the target in each batch, with --slices mixed; the kind that takes more batches to go
    through determines the epoch."""
    crop: Pixels | tuple[Pixels, Pixels] = 384
    """Size of the crop in pixels: one side of a square, or [rows, columns]."""
    crop_shift: tuple[Offset, Offset] = (-14, -4)
    """How far the crop lies off the slice's centre, in pixels [rows, columns]; the default is [50:434, 60:444] of a
    512×512 slice."""
    crop_at: Literal["centre", "anywhere"] = "centre"
    """Where training's crops lie: at the place that --crop-shift says, or anywhere in the plane, a third of them around
    the target (foreground oversampling)."""
    augment: Literal["none", "flips", "full"] = "flips"
    """Data augmentation: none, flips and quarter turns, or these with small rotations, scalings and shifts, brightness,
    contrast, gamma, noise, blur and low resolution (full)."""
    mirror: bool = True
    """Flips are a part of augmentation; leave them out where left and right differ."""
    quarter_turns: bool = True
    """Quarter turns are a part of augmentation, half turns where the crop is no square. With neither these nor
    --mirror, slices stay upright."""
    views: Annotated[int, Bounds(at_least=-1, at_most=2**20)] = 0
    """How many views each slice has, which a teacher cache can keep (0: one for none, one for each orientation for
    flips, eight for full or crops from anywhere; -1: a new view in each epoch, which no cache can keep)."""
    context: Context = 0
    """Neighbouring slices on either side that networks are given as further input channels (2.5D); where a volume ends,
    its last slice is repeated."""
    support_slices: Count = 64
    """Training slices that universeg is shown as examples."""
    workers: Workers = 0
    """Data loader processes that read batches ahead, for each training process (0: none; slices are decoded in
    threads)."""


@dataclass(kw_only=True)
class OptimisationOptions(Options):
    """Optimisation"""

    batch_size: Count = 16
    """Slices for each optimizer step, over all processes together."""
    accumulate: Count = 1
    """Gradient accumulation: parts in which a batch is computed one after another, so that it needs less memory. What
    looks across samples (batch normalisation, soft Dice, methods that compare samples) then sees a part."""
    clip: NonNegative = 0.0
    """Gradient clipping: largest norm of the gradient; a longer one is scaled down to it (0: never)."""
    ema: Decay = 0.0
    """Decay of an exponential moving average (EMA) of the student's weights, for instance 0.999, which is validated and
    saved in the student's place (0: none)."""
    sync_batchnorm: bool = False
    """Synchronised batch normalisation: over the global batch rather than each process's share. Needs GPUs."""
    seed: Seed = 3407
    """Random seed of weights, order, orientations and dropout."""


@dataclass(kw_only=True)
class ScheduleOptions(Options):
    """Schedule"""

    epochs: Count = 90
    """Passes over the training slices."""
    steps: Natural = 0
    """Optimizer steps instead of epochs, rounded up to whole epochs (0: --epochs counts)."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start."""
    lr_min: NonNegative = 1e-6
    """Learning rate that the cosine schedule (cosine annealing) ends at."""
    scale_lr: bool = False
    """Linear scaling rule: multiply both learning rates by batch size / 16 (Goyal et al., arXiv 1706.02677). The number
    of processes never enters: --batch-size is over all of them."""
    val_every: Count = 1
    """Epochs between validations; the best epoch is chosen by the mean Dice over the val cases."""
    val_steps: Natural = 0
    """Steps between validations instead, which are at the ends of epochs nevertheless (0: --val-every counts)."""
    threshold: Probability = 0.5
    """Probability from which a voxel is predicted as the target, in whole-volume evaluation."""


@dataclass(kw_only=True)
class SpeedOptions(Options):
    """Speed"""

    channels_last: bool = False
    """Memory format: keep feature maps with their channels last in memory, which convolutions often compute faster; see
    benchmarks/README.md. Rounding differs."""
    compile: bool = False
    """Generate code for the network that is trained (torch.compile): its first step takes a minute and needs a C++
    compiler. Rounding and dropout's random numbers differ."""


@dataclass(kw_only=True)
class CheckpointOptions(Options):
    """Job folder and checkpoints"""

    out: Path | None = None
    """Output folder of this job; the default is made of its options, under runs/. The same command resumes there."""
    overwrite: bool = False
    """Begin again although the folder holds a job."""
    checkpoint_minutes: NonNegative = 10
    """Minutes between checkpoints for resuming within an epoch; there is one after each epoch anyway."""
    checkpoint_steps: Natural = 0
    """Steps between such checkpoints, besides the minutes (0: only the minutes). Looked at every --log-every steps."""
    keep_checkpoints: Count = 2
    """Latest checkpoints that are kept. If the newest is damaged, the job goes on from the one before."""
    timeout_minutes: Minutes = 30
    """Timeout: how long processes wait for one that is there but does not answer, before the job ends. One that died is
    noticed at once."""


@dataclass(kw_only=True)
class TrackingOptions(ServerOptions):
    """Tracking (MLflow)"""

    experiment: str = ""
    """MLflow experiment; the default is dataset-task."""
    sweep: str = ""
    """Name of the MLflow run below which this job's run stands, with the other jobs of a sweep."""
    log_every: Count = 10
    """Steps between logged losses, and between looks at signals to stop."""
    picture_every: Natural = 5
    """Validations between pictures of the predictions on four val slices (0: none)."""
    register: str = ""
    """Name by which the trained network (a job's student) is registered as a model in MLflow, which can load and serve
    it (none: it is not)."""


@dataclass(kw_only=True)
class TrainingOptions(
    DataOptions, OptimisationOptions, ScheduleOptions, SpeedOptions, CheckpointOptions, TrackingOptions
):
    """Options that training with and without a teacher have in common."""

    def __post_init__(self):
        super().__post_init__()
        if self.lr_min > self.lr:
            raise UserError(f"--lr-min ({self.lr_min:g}) must be at most --lr ({self.lr:g})")
        self.task = ",".join(names_in(self.task))
        if not re.fullmatch(r"[\w .-]*", self.register):
            raise UserError(f"--register {self.register}: a model's name has letters, digits, spaces, '.', '-' and '_'")

    @property
    def slice_spec(self) -> SliceSpec:
        size = (self.crop, self.crop) if isinstance(self.crop, int) else tuple(self.crop)
        return SliceSpec(self.task, Crop(size, tuple(self.crop_shift)), self.threshold, self.context)

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Start and end of the cosine schedule."""
        factor = self.batch_size / 16 if self.scale_lr else 1.0
        return self.lr * factor, self.lr_min * factor

    @property
    def slice_views(self) -> Views:
        """The views of training slices."""
        crop, anywhere = self.slice_spec.crop, self.crop_at == "anywhere"
        return Views(crop, self.augment, self.mirror, self.quarter_turns, anywhere, self.views, self.seed)

    def order(self, table: SliceTable) -> Order:
        """In which order and in which batches training sees the slices of a table."""
        kinds = {"without_target": table.without_target, "target_share": self.target_share}
        if table.unlabelled:
            kinds |= {"unlabelled": table.unlabelled, "share": self.unlabelled_share}
        return Order(table.with_ground_truth, self.batch_size, self.seed, self.slice_views.count, **kinds)

    def epochs_of(self, table: SliceTable) -> int:
        """Number of epochs of training on a table."""
        return -(-self.steps // self.order(table).steps) or self.epochs

    def validates(self, epoch: int, steps: int) -> bool:
        """Whether there is a validation after the epoch counted `epoch` from 0, of so many steps."""
        return self.validations(epoch + 1, steps) > self.validations(epoch, steps)

    def draws(self, epoch: int, steps: int) -> bool:
        """Whether the first validation of each `picture_every` is among those until then, and not before."""
        before, after = (self.validations(epochs, steps) for epochs in (epoch, epoch + 1))
        return bool(self.picture_every) and -(-after // self.picture_every) > -(-before // self.picture_every)

    def validations(self, epochs: int, steps: int) -> int:
        """How many validations are due within so many epochs of so many steps."""
        return epochs * steps // self.val_steps if self.val_steps else epochs // self.val_every

    @property
    def experiment_name(self) -> str:
        return self.experiment or f"{self.dataset.stem}-{self.task}"

    def default_folder(self, name: str) -> Path:
        """Folder of a job of this name if none is given: below runs/, whatever its experiment is called."""
        name += "" if self.split == "default" else f"-{self.split}"
        return Path("runs", re.sub(r"/|^\.+$", "-", self.experiment_name), name)


@dataclass(kw_only=True)
class NetworkOptions(Options):
    """Network"""

    network: str
    """Name of the network (docs/networks.md)."""
    width: Width = 1.0
    """Factor on the network's number of filters."""
    pretrained: Path | None = None
    """ImageNet weights (.pth, .safetensors) for a network with a ResNet encoder."""


@dataclass(kw_only=True)
class TrainOptions(NetworkOptions, TrainingOptions):
    """Train a network without a teacher."""

    @property
    def folder(self) -> Path:
        return self.out or self.default_folder(f"{self.network}-w{self.width:g}-seed{self.seed}")


@dataclass(kw_only=True)
class DistillationOptions(Options):
    """Distillation"""

    teacher: str = "unet"
    """Name of the teacher's network (docs/networks.md)."""
    teacher_width: Width = 1.0
    """Factor on the teacher's number of filters."""
    teacher_epochs: Natural = 0
    """Epochs of the teacher's own training (0: as many as the student's)."""
    teacher_steps: Natural = 0
    """Optimizer steps of the teacher's own training instead, rounded up to whole epochs."""
    teacher_pretrained: Path | None = None
    """ImageNet weights (.pth, .safetensors) for a teacher with a ResNet encoder."""
    teacher_checkpoint: list[Path] | None = None
    """A trained teacher (.safetensors), which takes the place of its training; several (A B C) are one teacher, whose
    probabilities are the mean of theirs, for methods that need no more of it."""
    teacher_tta: Literal["none", "flips"] = "none"
    """Test-time augmentation of the teacher: its probabilities are the mean over the four flips of a slice."""
    teacher_predictions: str = ""
    """Name of predictions by a foreign model that lie in the store (spark-data predictions), in place of a teacher's
    network; for methods that need no more of it."""
    hard_labels: bool = False
    """The student learns from the classes that the teacher predicts (pseudo-labels), in place of their
    probabilities."""
    allow_teacher_overlap: bool = False
    """Take a --teacher-checkpoint that was trained on val or test cases of the split, so that metrics say nothing of
    new cases."""
    student: str = "enet"
    """Name of the student's network (docs/networks.md)."""
    student_width: Width = 1.0
    """Factor on the student's number of filters."""
    student_pretrained: Path | None = None
    """ImageNet weights (.pth, .safetensors) for a student with a ResNet encoder."""
    method: str = "spark"
    """Name of the distillation method (docs/methods.md)."""
    weights: dict[str, Number] = field(default_factory=dict)
    """Weights of the method's loss terms, and its settings such as temperature, that differ from its defaults, for
    instance --weights.gain 10."""
    distill_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the weight of the distillation, that is of all loss terms but those of the ground truth: constant, or
    decay to 0 at the end."""
    distill_warmup: NonNegative = 0.0
    """Steps in which that weight grows from 0 before; below 1: the part of all steps (0: no warm-up)."""
    unlabelled_share: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """Share of each batch that are slices of the split's unlabelled cases, which the student learns from the teacher
    alone: its prediction takes the place of their ground truth (0: none)."""
    rounds: Count = 1
    """Rounds in which teacher and student take turns, each with a part of its epochs; the student learns from the
    teacher as it then is (1: the teacher is trained, then the student)."""
    together: Literal["turns", "live"] = "turns"
    """Teacher and student in turns, or live: both at every step (online distillation), with no cache."""


@dataclass(kw_only=True)
class TeacherCacheOptions(Options):
    """Teacher cache"""

    cache: Literal["auto", "on", "off", "canonical"] = "auto"
    """Keep what the method needs of the teacher on disk (on), or compute it at every step (off); auto measures both and
    takes the faster; canonical keeps one entry a slice and turns it, which is approximate and says by how much."""
    cache_folder: Path = Path("runs/teacher-cache")
    """Where teacher caches lie; a file system that all processes share."""
    cache_memory: Natural = 0
    """MiB of decoded cache entries that each process keeps, above what the system's page cache holds."""
    cache_dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Number format of cached teacher targets; int8 (quantised) has a scale for each channel, and its error is
    reported."""


@dataclass(kw_only=True)
class DistillOptions(DistillationOptions, TeacherCacheOptions, TrainingOptions):
    """Train a student with a teacher, which is trained first unless its checkpoint is given."""

    def teacher_epochs_of(self, table: SliceTable) -> int:
        """Number of epochs of the teacher's own training on a table."""
        return -(-self.teacher_steps // self.order(table).steps) or self.teacher_epochs or self.epochs_of(table)

    @property
    def folder(self) -> Path:
        teacher = self.teacher_predictions or self.teacher
        return self.out or self.default_folder(f"{teacher}-{self.student}-{self.method}-seed{self.seed}")
