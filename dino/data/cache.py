"""Where this project keeps what it has fetched or computed once."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where downloads are kept: DINO_CACHE, else ~/.cache/dino-pretrain (XDG_CACHE_HOME is honoured)."""
    if given := os.environ.get("DINO_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino-pretrain"
