"""The command `dino`: its subcommands, and what every one does around its work."""

import difflib
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable

import dino
from dino.errors import UserError
from dino.files import FULL, without_controls

COMMANDS = {  # name to what it does; each is a file of dino/commands with a main()
    "train": "pre-train a vision backbone on a folder of unlabelled images",
    "curate": "de-duplicate, cluster and rebalance a pool of images",
    "knn": "judge a backbone by nearest neighbours of its features",
    "linear": "judge a backbone by linear probes of its features",
    "omniglot": "judge a backbone by Omniglot's alphabets",
    "digits": "judge the demo's run by scikit-learn's digits",
    "visualize": "draw attention, patch features, neighbours and a map",
    "embed": "write features of images to a table",
    "export": "write a backbone for timm, Hugging Face or ONNX",
    "report": "write a run's page anew, or lay runs side by side",
    "dashboard": "make a W&B workspace for a run's project",
    "runs": "list runs with their state and best figures",
}
HELP = "usage: dino COMMAND …; dino COMMAND --help says more\n\n" + "\n".join(
    f"  {name:<11}{what}" for name, what in COMMANDS.items()
)

# What a path can meet wherever it was named; a file that is missing (ENOENT) is said where it is looked for.
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO),
)


def main(command: str | None = None) -> None:
    """Run a subcommand, by default the one that the command line names; does not return if that fails."""
    arguments = sys.argv[1:]
    if command is None:
        command, *arguments = arguments or ["--help"]
        if command in ("-h", "--help"):
            print(HELP)
            return
        if command == "--version":
            print(f"dino-pretrain {dino.__version__}")
            return
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"error: there is no command '{command}'{hint}\n{HELP}", file=sys.stderr)
            sys.exit(2)
        sys.argv = [f"dino {command}", *arguments]
    # Read once, when torch loads OpenMP, so it must be set before. Threads that spin while they wait make a CPU run
    # several times slower as soon as anything else, such as the run's own DataLoader workers, needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run(importlib.import_module(f"dino.commands.{command}").main)


def run(work: Callable[[], None]) -> None:
    """Call `work`; print a `UserError` as `error: …` (once, whichever process has to say it) and exit with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(harmless)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    try:
        work()
    except UserError as error:
        if error.alone or os.environ.get("RANK", "0") == "0":
            print(f"error: {without_controls(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if not (message := message_for(error)):
            raise
        print(f"error: {without_controls(message)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what was saved, or else from the beginning", file=sys.stderr)
        sys.exit(130)


def message_for(error: OSError) -> str:
    """What a user does about an error of the system; empty where it may as well be one of the program."""
    name = error.filename2 or error.filename  # the second: where something was to be moved
    if error.errno in FULL:
        fix = "make room on the disk and start the same command again; what was saved before is whole"
        return f"{name or 'a file'} cannot be written ({error.strerror}): {fix}"
    if name is not None and error.errno in UNUSABLE:
        return f"{name} cannot be used ({error.strerror}): name another, or change what stands in its way"
    return ""


def harmless(record: logging.LogRecord) -> bool:
    """A filter that lets every message pass, without what steers a terminal: names of files can hold anything."""
    record.msg, record.args = without_controls(record.getMessage()), None
    return True
