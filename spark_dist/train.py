"""Train a network without a teacher: accelerate launch -m spark_dist.train --dataset STORE --task organ …"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.train")

from spark_dist.training.checks import check
from spark_dist.training.job import open_job
from spark_dist.training.stage import Stage, train_stage, without_teacher

from .config import TrainOptions

OPTIONS = TrainOptions


def run(options: TrainOptions) -> None:
    """Train, and test the epoch that was best on val."""
    check(options)
    with open_job(options, {"network": options.network, "method": "none"}) as job:
        # Jobs once kept the network in student/; such a one goes on there.
        before = (options.folder / "student" / "tracking.jsonl").exists()
        stage = Stage(
            role="student" if before else "network",
            network=options.network,
            width=options.width,
            epochs=options.epochs_of(job.table),
            pretrained=options.pretrained,
        )
        train_stage(job, stage, without_teacher)
