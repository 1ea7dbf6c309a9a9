"""What is learned, and how: one file a method; everything else knows a method only by its interface (method.py).

A new method is one file beside dino.py and one line in METHODS.
"""

from dino.config.schema import CHOICES
from dino.methods.dino import DINO
from dino.methods.method import Batch, Curve, Method, Outside, Seen

METHODS: dict[str, type[Method]] = {
    "dino": DINO,
}
CHOICES["objective.name"] = METHODS

__all__ = ["METHODS", "Batch", "Curve", "Method", "Outside", "Seen"]
