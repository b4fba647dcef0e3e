"""Distributed knowledge distillation for medical image segmentation."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load_student":  # imported when it is asked for, as torch takes seconds
        from .evaluation.prediction import load_student

        return load_student
    raise AttributeError(f"module 'spark_dist' has no attribute '{name}'")
