"""Where figures, pictures, tables and files of runs go besides their directory: W&B, TensorBoard and others."""

from dino.tracking.evaluations import log_evaluations, tracked_runs
from dino.tracking.trackers import Table, Trackers, check_trackers

__all__ = ["Table", "Trackers", "check_trackers", "log_evaluations", "tracked_runs"]
