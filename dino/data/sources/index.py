"""What is in each shard, found out once: kept by the shard's path, size and time, so that others are looked at anew."""

import hashlib
import logging
from collections.abc import Callable

import pyarrow as pa

from dino.data.sources.storage import File
from dino.files import cache_directory, replacing

logger = logging.getLogger(__name__)


def indexed(file: File, format_: str, build: Callable[[File], pa.Table]) -> pa.Table:
    """What `build` says of a shard, now or at an earlier start, in memory that processes share.

    Args:
        format_: name and version of what `build` gives.
    """
    key = hashlib.sha256("\0".join((format_, *map(str, file))).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = cache_directory() / "indexes" / f"{key}.arrow"
    try:
        with pa.memory_map(str(kept)) as opened:
            return pa.ipc.open_file(opened).read_all()
    except (OSError, pa.ArrowException):  # none yet, or damaged
        table = build(file)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as partial, pa.ipc.new_file(str(partial), table.schema) as writer:
            writer.write_table(table)
    except OSError as error:
        logger.warning("the index of %s is not kept for the next time: %s", file.path, error.strerror)
    return table
