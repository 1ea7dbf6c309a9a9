"""Curate a pool of images: `dino curate` as a script, for `torchrun … train/curate.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("curate")
