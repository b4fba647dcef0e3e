"""Train a network without a teacher: accelerate launch -m spark_dist.train --dataset STORE --task organ …"""

from torch import nn

from .cli import module_main
from .config import TrainOptions
from .distillation import Distillation
from .distillers.plain import Plain
from .job import check_network, open_job, train_stage
from .teacher_cache import TeacherTargets

OPTIONS = TrainOptions


def run(options: TrainOptions) -> None:
    """Train, and test the epoch that was best on val."""
    check_network(options, options.network, options.width)
    with open_job(options, {"network": options.network, "method": "none"}) as job:
        train_stage(
            job,
            "student",
            options.network,
            options.width,
            untaught,
            options.epochs,
            pretrained=options.pretrained,
        )


def untaught(network: nn.Module) -> tuple[Distillation, TeacherTargets]:
    """Training on the truth alone."""
    distiller = Plain()
    return Distillation(network, distiller), TeacherTargets(None, distiller, None, None)


if __name__ == "__main__":
    module_main("spark_dist.train")
