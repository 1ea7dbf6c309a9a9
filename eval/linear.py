"""Linear probes of frozen features: `dino linear` as a script, for `torchrun … eval/linear.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("linear")
