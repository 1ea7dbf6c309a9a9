"""The demo's readout: `dino digits` as a script, for `accelerate launch eval/digits.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("digits")
