"""What features look at: `dino visualize` as a script, for `python eval/visualize.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("visualize")
