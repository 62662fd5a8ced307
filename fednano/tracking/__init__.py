"""Callbacks that pass a run's numbers on: to TensorBoard, MLflow, Weights & Biases, Prometheus, or one's own.

``--track tensorboard,mlflow`` chooses them; :class:`Tracker` is what one of one's own has to be.
"""

from fednano.tracking.protocol import Tracker
from fednano.tracking.registry import check_names, make_trackers
from fednano.tracking.view import TrackedView, tracked

__all__ = ["TrackedView", "Tracker", "check_names", "make_trackers", "tracked"]
