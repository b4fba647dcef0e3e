"""NIfTI files: their headers, and their voxels piece by piece.

A file is read piece by piece, and each piece is converted to what is stored before the next is read: so that a volume
takes the memory of its stored voxels, whatever the file's own type is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from isal import igzip
from nibabel.affines import obliquity
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt2axcodes,
    ornt_transform,
)
from nibabel.volumeutils import apply_read_scaling

from .errors import UserError
from .files import write_atomically
from .store import AXES

# nibabel raises what it can't mend in a header, and also writes it to stderr without the file's name.
nibabel.imageglobals.logger.disabled = True

OBLIQUE = 0.5
"""Degrees between a volume's axes and the world's from which a case is called oblique."""
PIECE = 2**24
"""Bytes of a file that are read at a time."""
DEFLATE = 1032
"""The most bytes that one compressed byte can stand for."""
UNITS = {1: (1000.0, "metres"), 3: (0.001, "micrometres")}
"""mm in the header's units of length by their code. Code 2 is mm, and so is taken what has no code."""
SPACINGS = (0.002, 100.0)
"""mm between voxels that are believed of a header with other units than mm."""
Convert = Callable[[Iterable[np.ndarray], int, Path], tuple[np.ndarray, str]]
"""From the pieces of a file's voxels (1-D, in the file's order), their number and the file's name to all voxels as
they are stored (1-D), and a note. Raises `UserError` for voxels that can't be stored."""


@dataclass(frozen=True)
class Header:
    """A NIfTI file's header: its voxels' format and where they lie."""

    path: Path
    shape: tuple[int, int, int]
    """Along the file's own axes."""
    dtype: np.dtype
    offset: int
    """Bytes of the (unpacked) file before the first voxel."""
    scaling: tuple[float, float] | None
    """Slope and intercept that turn the file's numbers into values."""
    affine: np.ndarray
    """4×4 from the file's (i, j, k) to RAS+ mm."""
    lacks_spacing: bool
    """The file does not know its spacing in mm."""
    notes: tuple[str, ...]
    """Lines on what somebody should know about the file."""

    @cached_property
    def turn(self) -> np.ndarray:
        """The orientation that takes the file's axes to `store.AXES`."""
        return ornt_transform(io_orientation(self.affine), axcodes2ornt(AXES))

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(Z, H, W)."""
        return turned_shape(self.shape, self.turn)

    @property
    def stored_affine(self) -> np.ndarray:
        """4×4 from (slice, row, column) to RAS+ mm."""
        return self.affine @ inv_ornt_aff(self.turn, self.shape)

    @property
    def source(self) -> dict[str, Any]:
        """The facts that a store keeps of the file."""
        return {
            "file": self.path.name,
            "orientation": "".join(ornt2axcodes(io_orientation(self.affine))),
            "shape": list(self.shape),
            "affine": self.affine.tolist(),
            "dtype": self.dtype.newbyteorder("=").name,
            "scaling": self.scaling and list(self.scaling),
            "lacks_spacing": self.lacks_spacing,
        }


def read_header(path: Path, channel: int | None = None, spacing: Sequence[float] | None = None) -> Header:
    """The header of a NIfTI file. `channel` picks one of several in a fourth axis; `spacing` (mm along the
    file's axes) counts where the file does not know its own.

    Raises `UserError` if the file is missing, damaged, or no volume.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it there, or take the case out")
    with readable(path), unpacked(path) as file:
        start = file.read(nibabel.Nifti2Header.sizeof_hdr)
        kind = header_kind(start)
        block = start[: kind.sizeof_hdr]
        written, header = kind(block, check=False), kind(block)
        steps = np.array(written["pixdim"][1:4], dtype=float)
        # nibabel would mend this without a word.
        if written["sizeof_hdr"] != kind.sizeof_hdr:
            raise ValueError(f"a header of {written['sizeof_hdr']} bytes")
        if np.isinf([written["scl_slope"], written["scl_inter"]]).any():
            raise ValueError("an infinite slope or intercept")
        if header["magic"].item() != header.single_magic:
            raise ValueError("not NIfTI in one file")
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        with np.errstate(invalid="ignore"):
            affine, offset = header.get_best_affine(), int(header.get_data_offset())
        promised = math.prod(shape) * dtype.itemsize + offset
        if promised > path.stat().st_size * (DEFLATE if is_packed(path) else 1):
            raise ValueError(f"the header promises {promised} bytes")
    shape, skipped = pick_channel(shape, channel, path)
    if dtype.kind not in "iufb":
        raise UserError(f"{path}: voxels of type {dtype} are not numbers; convert the file to int16 or float32")
    affine, lacks = placed(header, affine, steps, spacing, path)
    affine = in_mm(affine, *unit_of(header), lacks, path)
    return Header(
        path=path,
        shape=shape,
        dtype=dtype,
        offset=offset + skipped * dtype.itemsize,
        scaling=None if slope is None or (slope, intercept) == (1, 0) else (float(slope), float(intercept)),
        affine=affine,
        lacks_spacing=lacks,
        notes=tuple(header_notes(header, affine, lacks, spacing)),
    )


def header_kind(start: bytes) -> type[nibabel.Nifti1Header]:
    """NIfTI-1 or NIfTI-2 by a header's first bytes: its size, of which 540 bytes is NIfTI-2, in either byte order."""
    return nibabel.Nifti2Header if start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Header


def unit_of(header: nibabel.Nifti1Header) -> tuple[float, str]:
    """A header's unit of length in mm, and its name; no name for mm."""
    return UNITS.get(int(header["xyzt_units"]) & 7, (1.0, ""))


def in_mm(affine: np.ndarray, scale: float, units: str, lacks: bool, path: Path) -> np.ndarray:
    """An affine in mm whose lengths were in `units` of `scale` mm; lengths that were given are in mm already.

    Raises `UserError` for units that no volume of a patient has, as some programs write any into a header.
    """
    if scale == 1:
        return affine
    factor = np.ones(4)
    factor[:3] = scale
    if lacks:  # what there are of lengths is mm, and only the origin is the file's
        return np.column_stack([affine[:, :3], affine[:, 3] * factor])
    spacing = scale * np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < SPACINGS[0] or spacing.max() > SPACINGS[1]:
        found = " × ".join(f"{length:.3g}" for length in spacing)
        raise UserError(
            f"{path}: its units are {units}, so that a voxel would have {found} mm; mend its units (xyzt_units)"
        )
    return np.diag(factor) @ affine


def placed(
    header: nibabel.Nifti1Header, affine: np.ndarray, steps: np.ndarray, spacing: Sequence[float] | None, path: Path
) -> tuple[np.ndarray, bool]:
    """The affine to use, and whether the header lacks the spacing: there is none, or the affine is the identity, which
    no scanner writes. Raises `UserError` if there is no affine and no `spacing`."""
    directed = bool(np.isfinite(affine).all()) and not np.isnan(io_orientation(affine)).any()
    # An sform does not use the steps.
    sound = header["sform_code"] > 0 or bool((np.isfinite(steps) & (steps > 0)).all())
    blank = not (header["sform_code"] or header["qform_code"]) and (steps == 1).all()
    lacks = not (directed and sound) or blank or np.allclose(np.abs(affine), np.eye(4), atol=1e-4)
    if lacks and spacing is not None:
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) if directed else np.eye(3)
        origin = affine[:3, 3:] if directed else np.zeros((3, 1))
        return np.block([[axes * spacing, origin], [np.eye(4)[3:]]]), True
    if not directed:
        found = affine.round(3).tolist()
        raise UserError(f"{path}: the affine {found} has no direction for an axis; mend the header, or give --spacing")
    if not sound:
        found = ", ".join(f"{step:g}" for step in steps)
        raise UserError(f"{path}: a spacing of {found} mm; mend the header, or give --spacing X,Y,Z")
    return affine, bool(lacks)


def pick_channel(shape: Sequence[int], channel: int | None, path: Path) -> tuple[tuple[int, int, int], int]:
    """The three axes of a volume in `shape`, and how many voxels lie before the `channel` in a fourth axis.

    Axes of length 1 after the third do not count. Raises `UserError` if there is another number of axes or channels.
    """
    volume, further = tuple(shape[:3]), [n for n in shape[3:] if n != 1]
    if len(volume) != 3 or min(shape) < 1 or len(further) > 1:
        raise UserError(f"{path}: shape {tuple(shape)} is no volume of three axes")
    if not further:
        return volume, 0
    channels = further[0]
    if channel is None:
        raise UserError(f"{path}: has {channels} channels; pick one with --channel 0 … {channels - 1}")
    if channel >= channels:
        raise UserError(f"{path}: has {channels} channels, so there is no --channel {channel}; the first is 0")
    return volume, channel * math.prod(volume)


def header_notes(
    header: nibabel.Nifti1Header, affine: np.ndarray, lacks: bool, spacing: Sequence[float] | None
) -> list[str]:
    """Doubts about where a volume lies, in lines."""
    notes = []
    angle = np.degrees(obliquity(affine)).max()
    if not lacks and unit_of(header)[1]:
        notes.append(f"the header's {unit_of(header)[1]} are converted to mm")
    if angle > OBLIQUE:
        notes.append(f"oblique by {angle:.0f}°, kept in its own slices along the nearest axes")
    if not header["sform_code"] and not header["qform_code"]:
        notes.append("the header has no orientation, NIfTI's default is taken")
    if lacks and spacing is None:
        notes.append("the header has no spacing, 1 mm and its axes are hardly the patient's; give --spacing X,Y,Z")
    if lacks and spacing is not None:
        notes.append(f"the header has no spacing, {','.join(f'{step:g}' for step in spacing)} mm is taken")
    return notes


def read_voxels(header: Header, convert: Convert) -> tuple[np.ndarray, str]:
    """All voxels, converted and turned to (Z, H, W), and a note. Raises `UserError` if the file is damaged."""
    count = math.prod(header.shape)
    with readable(header.path), unpacked(header.path) as file:
        file.seek(header.offset)
        voxels, note = convert(pieces(file, count, header), count, header.path)
        # gzip's checksum is at the end.
        while is_packed(header.path) and file.read(PIECE):
            pass
    return apply_orientation(voxels.reshape(header.shape, order="F"), header.turn), note


def pieces(file: BinaryIO, count: int, header: Header) -> Iterator[np.ndarray]:
    """The next `count` voxels of a file, in its own values. A piece is good until the next one is read."""
    buffer = np.empty(min(count, PIECE // header.dtype.itemsize), header.dtype)
    while count:
        piece = buffer[:count]
        unfilled = memoryview(piece.view(np.uint8))
        while unfilled:
            read = file.readinto(unfilled)
            if not read:
                raise EOFError("it ends too early")
            unfilled = unfilled[read:]
        yield apply_read_scaling(piece, *header.scaling) if header.scaling else piece
        count -= len(piece)


def unpacked(path: Path) -> BinaryIO:
    """A file, opened to be read; a compressed one is unpacked by isal, several times as fast as by zlib."""
    return igzip.open(path) if is_packed(path) else open(path, "rb")


def is_packed(path: Path) -> bool:
    """Whether a file's name is that of a compressed one."""
    return path.suffix.lower() == ".gz"


def write_image(out: Path, image: nibabel.Nifti1Image) -> None:
    """A NIfTI file, compressed if its name ends in .gz; whole, or not at all; the same bytes for the same image.

    Raises `UserError` on a full disk.
    """

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            if is_packed(out):
                with igzip.IGzipFile("", "wb", fileobj=file, mtime=0) as packed:
                    image.to_stream(packed)
            else:
                image.to_stream(file)

    write_atomically(out, write)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors from a file's bytes within the block into a `UserError`.

    nibabel and isal have half a dozen exceptions for bad bytes, without a common base.
    """
    try:
        yield
    except (UserError, PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is truncated or damaged: copy or download it again ({reason})") from None


def turned_shape(shape: Sequence[int], turn: np.ndarray) -> tuple[int, int, int]:
    """A shape after its axes are turned."""
    return tuple(int(shape[axis]) for axis in np.argsort(turn[:, 0]))
