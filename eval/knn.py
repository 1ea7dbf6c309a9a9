"""Nearest neighbours of frozen features: `dino knn` as a script, for `torchrun … eval/knn.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("knn")
