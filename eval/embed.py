"""Features of images as a table: `dino embed` as a script, for `torchrun … eval/embed.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("embed")
