"""The demo's readout: `dino digits` as a script, for `python eval/digits.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("digits")
