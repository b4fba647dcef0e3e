"""Networks as ONNX files, which onnxruntime computes without PyTorch."""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.errors import UserError
from data_tools.files import write_atomically

from .base import NetworkOutput
from .checkpoint import FORMAT, ModelCard, card_json, parse_card

NEEDED = "onnx, onnxscript and onnxruntime are needed: pip install -e '.[export]'"
INPUT, OUTPUT = "slices", "logits"
LARGEST_DIFFERENCE = 1e-4
"""Between the logits of PyTorch and of onnxruntime."""


class Logits(nn.Module):
    """A network without its feature maps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, slices: Tensor) -> Tensor:
        return self.network(slices).logits


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, computed by onnxruntime on the CPU. It has no feature maps."""

    taps = None

    def __init__(self, path: Path):
        """Raises `UserError` for a file that is missing, damaged or not one of this program's."""
        super().__init__()
        # Tells where it is, as the parameters of a network do.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        with needed():
            import onnxruntime
        if not path.is_file():
            raise UserError(f"{path}: no such file; make it with spark-dist export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # What goes wrong is raised.
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen, without a common base
            raise UserError(f"{path}: not a whole ONNX file ({' '.join(str(error).split())[:120]})") from None
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        if self.metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not a network exported by spark-dist (its metadata lack the format '{FORMAT}')")
        try:
            self.card = parse_card(self.metadata["description"])
            self.stride = int(self.metadata["stride"])
            plane = json.loads(self.metadata["plane"])
            self.bound_to = plane and (int(plane[0]), int(plane[1]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: the model card is damaged or edited ({error}); export it again") from None

    def forward(self, slices: Tensor) -> NetworkOutput:
        (logits,) = self.session.run([OUTPUT], {INPUT: slices.cpu().numpy()})
        return NetworkOutput(torch.from_numpy(logits).to(slices.device), None, None)


def export_onnx(path: Path, network: nn.Module, card: ModelCard) -> tuple[int, int] | None:
    """Write a network and its card as an ONNX file of any number of slices of any size that is a multiple of the
    stride. Returns the one size that it takes instead, for a network that can't be exported for several.

    Raises `UserError` if it can't be exported at all.
    """
    with needed():
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    logits, failure = Logits(with_leaky_relu(network.cpu().eval())), None
    bound = getattr(network, "bound_to", None)
    stride, batch = network.stride, torch.export.Dim("batch")
    rows, columns = (stride * torch.export.Dim(name, min=2, max=2**14 // stride) for name in ("rows", "columns"))
    for plane in (None, bound or card.spec.crop.size):
        if plane is None and (bound or getattr(network, "branches_on_size", False)):
            continue
        # A feature map of one pixel would be taken for one of that size for ever.
        size = plane or [max(side, 2 * stride) for side in card.spec.crop.size]
        example = torch.zeros(2, card.in_channels, *size)
        shape = {0: batch} if plane else {0: batch, 2: rows, 3: columns}
        try:
            with quiet():
                program = torch.onnx.export(
                    logits,
                    (example,),
                    dynamo=True,
                    dynamic_shapes={"slices": shape},
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    external_data=False,
                    verbose=False,
                )
        except Exception as error:  # whatever the exporter meets in a network
            failure = failure or error
            continue
        for node in program.model.graph:
            node.metadata_props.clear()  # Where in the source it comes from, which is larger than many a network.
        program.model.metadata_props.update(metadata(card, stride, plane))
        write_atomically(path, lambda aside, program=program: program.save(aside))
        # Some networks export without an error, and then fail with any size but the example's.
        other = [size[0] + 2 * stride, size[1] + 3 * stride]
        if plane or computes_alike(network, OnnxNetwork(path), other):
            return plane
        path.unlink()
    reason = " ".join(str(failure.__cause__ or failure).split())[:160]
    raise UserError(f"{card.network} can't be exported to ONNX ({reason}); use the .safetensors")


def with_leaky_relu(network: nn.Module) -> nn.Module:
    """A copy of a trained network whose PReLUs of one slope are leaky ReLUs: onnxruntime computes these within the
    convolution before, and knows them in integers."""
    network = deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.PReLU) and child.num_parameters == 1:
                setattr(module, name, nn.LeakyReLU(child.weight.item()))
    return network


def metadata(card: ModelCard, stride: int, plane: tuple[int, int] | None) -> dict[str, str]:
    """The metadata of an ONNX file: the model card whole, and for programs that are not this one in fields."""
    window = card.preparation and {key: getattr(card.preparation, key) for key in ("kind", "low", "high")}
    return {
        "format": FORMAT,
        "description": card_json(card),
        "stride": str(stride),
        "plane": json.dumps(plane),
        "window": json.dumps(window),
        "labels": json.dumps(dict(zip(card.spec.regions, card.label_values or (), strict=False))),
        "threshold": str(card.spec.threshold),
        "input": "N, channels, rows, columns, float32: intensities of which the window becomes -1 and 1, clipped",
    }


def difference(network: nn.Module, other: nn.Module, slices: Tensor) -> float:
    """The largest difference of the logits of two networks, on slices (N, C, H, W)."""
    with torch.no_grad():
        return float((network.eval()(slices).logits - other(slices).logits).abs().max())


def computes_alike(network: nn.Module, other: nn.Module, size: Sequence[int]) -> bool:
    """Whether an exported network has the logits of the network on three slices (H, W) of noise, but for rounding,
    which grows with them."""
    slices = torch.rand(3, other.card.in_channels, *size) * 2 - 1
    with torch.no_grad():
        logits = network.eval()(slices).logits
    try:
        found = (logits - other(slices).logits).abs().max()
    except Exception:  # onnxruntime has a dozen, without a common base
        return False
    return bool(found < LARGEST_DIFFERENCE * logits.abs().max().clamp(min=1))


@contextmanager
def needed():
    """Says what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{NEEDED} ({error})") from None


@contextmanager
def quiet():
    """Without what exporters print on their progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
