"""Going on where a run stopped, and the refusal to mix two runs in one place."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.config.read import dump, get, leaves
from dino.config.schema import Config
from dino.data.identity import difference
from dino.errors import UserError
from dino.files import remove, write_text
from dino.models.weights import BACKBONE_FILE
from dino.run import RunDirectory, require_free_places, whole_checkpoints
from dino.run_lock import LOCK
from dino.seal import STATE, Damaged, verified

NEWEST_WHOLE = "newest_whole"  # of train.resume
MAY_DIFFER = (  # on resume
    "train.steps",
    "train.epochs",
    "train.time_limit",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.resume",
    "train.cpu_threads",
    "train.fsdp",
    "train.activation_checkpointing",
    "data.cache",
    "data.workers",
    "data.verify",
    "run.dir",
)
WHERE_IMAGES_LIE = ("data.root", "data.kind")  # may differ too, where a checkpoint says which they are
WHERE_WEIGHTS_LIE = ("objective.distill",)  # whose contents a checkpoint names: config.yaml may say where they are now
MAY_DIFFER_GROUPS = ("tracking.", "monitor.")
# What a run writes, by its path in the run directory.
FOLDERS = ("checkpoints", "best")
FILES = (
    *("config.yaml", "metrics.jsonl", "skipped.jsonl", "report.html", "broken_batch.txt", LOCK),
    *(BACKBONE_FILE, f"best/{BACKBONE_FILE}", "best/best.json"),
)
logger = logging.getLogger(__name__)


def earlier_config(directory: RunDirectory, resume: str) -> Config | None:
    """The config of the run that is already there, or None for a fresh directory.

    Raises:
        UserError: the directory holds something else, or a run while `train.resume=never`.
    """
    path = directory.path
    if not path.exists() or not any(_is_somebodys(entry, directory) for entry in path.iterdir()):
        return None
    if not directory.config.exists():
        raise UserError(f"run.dir={path} is not empty and holds no run: name another directory")
    if resume == "never":
        raise UserError(
            f"run.dir={path} already holds a run and train.resume=never: "
            "name another directory, or go on from its newest checkpoint with train.resume=auto"
        )
    return directory.read_config(all_resolved=False)


def _is_somebodys(path: Path, directory: RunDirectory) -> bool:
    """Whether it is more than what a run leaves that is killed before it has written its config."""
    if path.name.endswith(".partial") or path.name == LOCK:
        return False
    return path != directory.checkpoints or any(path.iterdir())


def refuse_what_is_in_the_way(directory: RunDirectory) -> None:
    """Raise a `UserError` if the run could not write one of its files: now, not when it comes to write it."""
    require_free_places(directory.path, FOLDERS, FILES)


def refuse_other_config(directory: RunDirectory, config: Config, earlier: Config, has_checkpoint: bool) -> None:
    """Raise a `UserError` if resuming with `config` would make another run of it.

    Args:
        has_checkpoint: whether there is one, by which the images themselves are compared, wherever they lie now.
    """
    if config.objective.name != earlier.objective.name:
        changes = [f"objective.name: {earlier.objective.name} there, {config.objective.name} now"]
    else:
        changes = [
            f"{key}: {get(earlier, key)} there, {get(config, key)} now"
            for key in leaves(config)
            if _must_agree(key, has_checkpoint) and _value(earlier, key) != _value(config, key)
        ]
    if changes:
        listed = "\n  ".join(changes)
        raise UserError(
            f"run.dir={directory.path} holds a run with other settings:\n  {listed}\n"
            "Use its settings to resume it, or name another directory with run.dir=…; nothing was changed"
        )


def _must_agree(key: str, has_checkpoint: bool) -> bool:
    may_differ = (*MAY_DIFFER, *WHERE_IMAGES_LIE) if has_checkpoint else MAY_DIFFER
    return key not in may_differ and not key.startswith(MAY_DIFFER_GROUPS)


def _value(config: Config, key: str) -> Any:
    """A setting; data.root in the one way in which a path can be written."""
    value = get(config, key)
    is_path = key == "data.root" and value and os.path.exists(value)
    return os.path.realpath(value) if is_path else value


def starting_point(directory: RunDirectory, resume: str) -> Path | None:
    """The checkpoint to go on from: the newest of the run, the one named by `resume`, or None.

    Raises:
        UserError: `resume` names none, or asks for a whole one and all are damaged; or the run has none any more, but
            its result, which a run that began anew would replace.
    """
    checkpoints = whole_checkpoints(directory.checkpoints)
    result = directory.path / BACKBONE_FILE
    if not checkpoints and resume in ("auto", NEWEST_WHOLE) and result.exists():
        raise UserError(
            f"{result} is there and no checkpoint to go on from: to train anew, name another run.dir or move it away"
        )
    if resume == NEWEST_WHOLE:
        return _newest_whole(checkpoints)
    newest = checkpoints[-1] if checkpoints else None
    if resume in ("auto", "never"):
        return newest
    path = Path(resume).expanduser()
    is_word = len(path.parts) == 1 and not path.exists()  # one that was misspelt
    if newest is not None and not is_word and path.resolve().parent != directory.checkpoints.resolve():
        return newest  # an earlier start of this command went on from `path`
    if not (path / STATE).exists():
        raise UserError(
            f"train.resume={resume} is no checkpoint: name a folder like RUN/checkpoints/step-00000500, or auto, never "
            f"or {NEWEST_WHOLE}"
        )
    return path


def _newest_whole(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint that is as it was written; says which are passed over."""
    for checkpoint in reversed(checkpoints):
        try:
            verified(checkpoint)
        except Damaged as damage:
            logger.warning("passed over: %s", damage.what)
        else:
            return checkpoint
    if checkpoints:
        raise UserError(
            f"train.resume={NEWEST_WHOLE}, but all checkpoints in {checkpoints[0].parent} are damaged: restore one "
            "from a copy, or start anew in another run.dir"
        )
    return None


def prepare(directory: RunDirectory, config: Config, step: int) -> None:
    """Write the config, sweep up what a killed run left half done, and drop what came after `step`.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
        partial = [path for pattern in (".*.partial", "best/.*.partial") for path in directory.path.glob(pattern)]
        for remains in [*directory.checkpoints.glob(".*"), *partial]:
            remove(remains)
        for checkpoint in whole_checkpoints(directory.checkpoints):
            if int(checkpoint.name.removeprefix("step-")) > step:
                remove(checkpoint)
        write_text(directory.config, dump(config))
        if directory.metrics.exists():
            lines = [line for line in directory.read_metrics() if line["step"] <= step and step > 0]
            write_text(directory.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"run.dir={directory.path} cannot be written: {error.strerror or error}") from error


def settings_of(config: Config) -> dict[str, Any]:
    """What must not change while a run goes on, for its checkpoints: JSON values by key."""
    plain = dataclasses.asdict(config)
    keys = [key for key in leaves(config) if _must_agree(key, has_checkpoint=True) and key not in WHERE_WEIGHTS_LIE]
    return {key: plain[key.split(".")[0]][key.split(".")[1]] for key in keys}


def refuse_edited_config(directory: RunDirectory, config: Config, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise a `UserError` if the run's own checkpoint was made with other settings than its config.yaml says.

    What is `auto` in a command is taken from there, so that the change would go unnoticed.
    """
    if checkpoint.resolve().parent != directory.checkpoints.resolve():
        return  # another run's, with which this one begins
    before, now = state.get("settings", {}), settings_of(config)  # earlier versions wrote none
    changes = [
        f"{key}: {before[key]} there, {now[key]} now" for key in before.keys() & now.keys() if before[key] != now[key]
    ]
    if changes:
        listed = "\n  ".join(sorted(changes))
        raise UserError(
            f"{directory.config} was edited, or {checkpoint} is another run's, as it was made with other settings:\n"
            f"  {listed}\nRestore them; or name another run.dir and go on from there with train.resume={checkpoint}"
        )


def refuse_other_images(before: Mapping[str, Any], now: Mapping[str, str], checkpoint: Path) -> None:
    """Raise a `UserError` if a checkpoint was made with other images; both by `dino.data.identity.facts`."""
    if changed := difference(before, now):
        raise UserError(
            f"the images are not those that {checkpoint} was made with ({changed}): restore them, or start a new run "
            "in another run.dir"
        )
    if "content" in now and "content" not in before:
        logger.warning("%s does not say what was in its images: only names and sizes are compared", checkpoint)
    elif "content" not in now and before.get("times", now.get("times")) != now.get("times"):
        logger.info(
            "the images were written or moved since %s was made; names and sizes are the same (data.verify=content, "
            "from the first start on, compares what is in them)",
            checkpoint,
        )
