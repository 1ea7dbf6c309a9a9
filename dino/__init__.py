"""Self-supervised pre-training of vision backbones with DINO and DINOv2, and their evaluation.

    run = dino.train("path/to/images", "runs/mine")
    features = run.backbone(run.backbone.preprocess(images))

`import dino` changes nothing in the process and is quick: torch is imported where one of these is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.curation.curate import Curation, curate
    from dino.errors import UserError
    from dino.evaluation.embed import embed
    from dino.models import load_backbone
    from dino.training.train import Run, train

HOMES = {
    "Curation": "dino.curation.curate",
    "Run": "dino.training.train",
    "UserError": "dino.errors",
    "curate": "dino.curation.curate",
    "embed": "dino.evaluation.embed",
    "load_backbone": "dino.models",
    "train": "dino.training.train",
}
__all__ = ["Curation", "Run", "UserError", "curate", "embed", "load_backbone", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("dino-pretrain")
        except metadata.PackageNotFoundError:  # a copy on the path that was never installed
            return "unknown"
    if name not in HOMES:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(HOMES[name]), name)
