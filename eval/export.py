"""A backbone for other libraries: `dino export` as a script, for `python eval/export.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("export")
