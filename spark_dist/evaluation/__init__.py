"""Inference on whole planes, metrics and their intervals, pictures of predictions."""
