"""Networks in ONNX files that compute with integers of 8 bits."""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from data_tools.errors import UserError

from .onnx import INPUT, needed, quiet

BATCH = 8
"""Calibration slices that go through the network at a time."""


def quantise(source: Path, out: Path, slices: Tensor, kept: Collection[str] = ()) -> None:
    """Write the int8 network of a float one in an ONNX file, with its metadata: weights have a scale for each output
    channel, activations the range that they have on the calibration `slices` (N, C, H, W). Static quantisation by
    onnxruntime, in the format QDQ. Operators of the types `kept` remain float.

    Raises `UserError` if onnxruntime can't quantise the network.
    """
    with needed():
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(slices.split(BATCH))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    network = onnx.load(source)
    left_out = [node.name for node in network.graph.node if node.op_type in kept]

    try:
        with quiet():
            quantize_static(
                source,
                out,
                Batches(),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Weights of 7 bits: products of 8 do not fit into the 16 in which processors without VNNI add two.
                reduce_range=True,
                nodes_to_exclude=left_out,
            )
    except Exception as error:  # whatever the quantiser meets in a network
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--int8: onnxruntime can't quantise the network ({reason}); export it without") from None
    made = onnx.load(out)
    onnx.helper.set_model_props(made, {entry.key: entry.value for entry in network.metadata_props})
    onnx.save(made, out)
