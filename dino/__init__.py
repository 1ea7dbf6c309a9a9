"""Self-supervised DINO and DINOv2 pre-training of vision backbones, and their evaluation.

`import dino` changes nothing in the process and is quick: torch is imported where one of these is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.models import load_backbone

HOMES = {"load_backbone": "dino.models"}
__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(HOMES[name]), name)
