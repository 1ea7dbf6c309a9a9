"""Self-supervised DINO and DINOv2 pre-training of vision backbones, and their evaluation."""

import os

# Read once, when torch loads OpenMP, so it must be set before. Threads that spin while they wait make a CPU run several
# times slower as soon as anything else, such as the run's own DataLoader workers, needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dino.models.weights import load_backbone

__all__ = ["load_backbone"]
