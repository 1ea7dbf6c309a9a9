"""What features look at: `dino visualize` as a script, for `accelerate launch eval/visualize.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("visualize")
