"""Distillation methods by name.

A method is a `Distiller` built as `Method(student, teacher, **weights)`, where `student` and `teacher` are the
`Taps` of the two networks. A new method is one file and one line here.
"""

import inspect

from data_tools.errors import UserError, unknown_name
from spark_dist.networks.base import Taps

from .at import AT
from .base import Distiller, PredictionDistiller
from .crd import CRD
from .cwd import CWD
from .dist import DIST
from .ehcdatt import EhcdAtt
from .emkd import EMKD
from .gid import GID
from .kd import KD
from .lskd import LSKD
from .lsr import LSR
from .mgd import MGD
from .ofd import OFD
from .reviewehcdatt import ReviewEhcdAtt
from .reviewkd import ReviewKD
from .rkd import RKD
from .soft import Soft
from .sp import SP
from .spark import SPARK
from .tfkd import TfKD
from .vid import VID

__all__ = [
    "DISTILLERS",
    "Distiller",
    "PredictionDistiller",
    "build_distiller",
    "distiller_settings",
    "prediction_methods",
]

DISTILLERS = {
    "at": AT,
    "crd": CRD,
    "cwd": CWD,
    "dist": DIST,
    "ehcdatt": EhcdAtt,
    "emkd": EMKD,
    "gid": GID,
    "kd": KD,
    "lskd": LSKD,
    "lsr": LSR,
    "mgd": MGD,
    "ofd": OFD,
    "reviewehcdatt": ReviewEhcdAtt,
    "reviewkd": ReviewKD,
    "rkd": RKD,
    "soft": Soft,
    "sp": SP,
    "spark": SPARK,
    "tfkd": TfKD,
    "vid": VID,
}

STRUCTURAL = {"self", "student", "teacher", "samples"}
"""Constructor arguments that follow from the networks and the data, so that no recipe sets them."""


def prediction_methods() -> list[str]:
    """The methods that need nothing of the teacher but its prediction."""
    return [name for name, method in DISTILLERS.items() if issubclass(method, PredictionDistiller)]


def distiller_settings(name: str) -> dict[str, float]:
    """The weights and settings of a method with their defaults."""
    if name not in DISTILLERS:
        raise unknown_name("distillation method", name, DISTILLERS)
    parameters = inspect.signature(DISTILLERS[name].__init__).parameters
    return {key: p.default for key, p in parameters.items() if key not in STRUCTURAL}


def build_distiller(name: str, student: Taps, teacher: Taps, samples: int = 0, **weights: float) -> Distiller:
    """A distillation method with fresh connectors.

    `samples` is the number of training slices, for methods with a memory bank. `weights` override the method's
    defaults (`distiller_settings`).

    Raises `UserError` for a method or a weight that does not exist.
    """
    known = distiller_settings(name)
    for key in weights:
        if key not in known:
            raise UserError(f"method '{name}': {unknown_name('weight', key, known)}")
    structural = {"samples": samples} if "samples" in inspect.signature(DISTILLERS[name].__init__).parameters else {}
    return DISTILLERS[name](student=student, teacher=teacher, **structural, **weights)
