"""A trained network as MLflow loads and serves it; MLflow copies this file into the model.

It takes axial slices (N, H, W) float32 of one scan in the scan's own intensities (HU for CT), one behind the other, in
the resolution that the network was trained in, rows to posterior and columns to left; a single slice is a scan of one.
It returns their label map (N, H, W), 0 the background.
"""

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from spark_dist.evaluation.prediction import load_student


class Segmentation(PythonModel):
    """Loads the checkpoint that lies in the model, and nothing pickled."""

    def load_context(self, context):
        self.student = load_student(context.artifacts["checkpoint"])

    # Without the type of its input, MLflow warns whoever trains.
    def predict(self, context, model_input: np.ndarray, params=None):
        return self.student.predict_slices(np.asarray(model_input))


set_model(Segmentation())
