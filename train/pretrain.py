"""Pre-train a vision backbone: `dino train` as a script, for `torchrun … train/pretrain.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("train")
