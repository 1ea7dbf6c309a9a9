"""Sends an exported folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from dino.errors import UserError


def check(repo: str) -> None:
    """Before any work: a repository's name, and that there is a token.

    Raises:
        UserError: there is none, or the name cannot be one.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: name a repository as OWNER/NAME") from error
    if "/" not in repo:
        raise UserError(f"--push {repo}: name a repository as OWNER/NAME")
    if get_token() is None:
        raise UserError("--push needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, files: list[str], public: bool) -> str:
    """Send some files of a folder to a repository, which is made if need be.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refused, or could not be reached; what was exported stays in the folder.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="Exported weights")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{repo} could not be written on the Hub ({reason}); the export is whole in {folder}"
        ) from error
    return str(address)
