"""Omniglot's alphabets: `dino omniglot` as a script, for `python eval/omniglot.py …`."""

from dino.cli import main

if __name__ == "__main__":
    main("omniglot")
