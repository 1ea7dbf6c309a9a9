"""What is learned, and how: one file a method; everything else knows a method only by its interface (method.py).

A new method is one file beside dino.py and one line here: its import, by which it can be named in `objective.name`.
"""

from dino.methods.dino import DINO
from dino.methods.method import METHODS, Batch, Curve, Method, Outside, Seen

__all__ = ["DINO", "METHODS", "Batch", "Curve", "Method", "Outside", "Seen"]
