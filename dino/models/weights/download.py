"""Files from the network: once, with progress, resumed where a connection broke, and never half."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from dino.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without an answer


def fetch(url: str, file: Path, sha256: str = "") -> Path:
    """Download `url` to `file`, unless it is there, which is compared with its digest too.

    What has arrived lies in `file`.partial until it is whole, and a later call goes on from there. Of several
    processes that ask for it one downloads and the others wait.

    Args:
        sha256: the first characters of the digest; empty: not known.

    Raises:
        UserError: no connection, or not the file it should be; says where to put it by hand.
    """
    if file.is_file():
        return _checked(file, url, sha256)
    partial = file.with_name(f"{file.name}.partial")
    by_hand = f"fetch {url} on another machine and put it at {file}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            if file.is_file():
                return _checked(file, url, sha256)
            _download(url, partial)
            if sha256 and not _digest(partial).startswith(sha256):
                partial.unlink()
                raise UserError(f"what {url} gave has another digest than {sha256}…, and was thrown away; {by_hand}")
            partial.replace(file)
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(
            f"{url} cannot be fetched (the server answers {error.code} {error.reason}); {by_hand}"
        ) from error
    except (OSError, EOFError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} cannot be fetched ({reason}); start again to go on, or {by_hand}") from error
    return file


def _download(url: str, partial: Path) -> None:
    offset = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing beyond the offset
            raise
        error.close()
        if (error.headers.get("Content-Range") or "").removeprefix("bytes */") != str(offset):
            partial.unlink()
            raise EOFError(f"what had arrived, {offset:,} bytes, was not of this file and is thrown away") from None
        return
    with response:
        if response.status != 206:  # a server without ranges begins anew
            offset = 0
        remaining, received = int(response.headers.get("Content-Length") or 0), 0
        total = offset + remaining if remaining else None
        bar = tqdm(desc=partial.stem, total=total, initial=offset, unit="B", unit_scale=True, leave=False)
        with bar, partial.open("ab" if offset else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if received < remaining:
        raise EOFError(f"the connection broke after {received:,} of {remaining:,} bytes")


def _checked(file: Path, url: str, sha256: str) -> Path:
    """A file that is there, perhaps put there by hand; raises `UserError` where it is not that of the URL."""
    try:
        if not sha256 or _digest(file).startswith(sha256):
            return file
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}): remove it, and it is fetched") from error
    raise UserError(
        f"{file} has another digest than {sha256}…, which {url} has: remove it, and it is fetched; weights of your own "
        "are named by their path"
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
