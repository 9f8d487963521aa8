"""Where a language model lies: a folder, a package, or a repository of the Hugging Face Hub, kept in its cache."""

import re
from pathlib import Path

from laser_fast.config import resolve_path

HUB_SCHEME = "hub:"

# nothing that needs unpickling, and no code
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def fetch(location: str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Local folder of a repository `OWNER/NAME[@REVISION]`, with or without `hub:` in front.

    `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_HOME` apply.

    Args:
        revision: branch, tag or commit, which overrides one in the location; None = the main branch.
        local_files_only: read the cache only.

    Raises:
        FileNotFoundError: the repository or the revision does not exist, is private, or is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, at = location.removeprefix(HUB_SCHEME).partition("@")
    revision = revision or at or None
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=local_files_only, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"fetch: the model must be an existing folder or a repository of the hub, got {location!r} ({reason})"
        ) from error
    return Path(folder)


def fetched_before(location: str, revision: str | None, argument: str) -> Path:
    """Folder in the cache of a repository that a saved file names: no file may send this process to the net.

    Args:
        argument: where a user passes the repository to have it fetched, for the error.
    """
    try:
        return fetch(location, revision=revision, local_files_only=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"fetched_before: {location}, which the saved model names, must be in the cache of the hub, got no such "
            f"repository there; to fetch it, pass {argument}={location!r}"
        ) from error


def locate(location: str, what: str, *, local_files_only: bool = False) -> Path:
    """Local folder of a path, of `package:NAME/INNER` or of `hub:OWNER/NAME[@REVISION]`; only the last may download.

    Args:
        what: the setting that names it, for errors.
    """
    if location.startswith(HUB_SCHEME):
        return fetch(location, local_files_only=local_files_only)
    return resolve_path(location, what)


def find_folder(location: str, revision: str | None, local_files_only: bool) -> Path:
    """As `locate`; a name OWNER/NAME that is no folder is looked for on the hub as well."""
    if not location.startswith(HUB_SCHEME):
        try:
            return resolve_path(location)
        except FileNotFoundError:
            if location.count("/") != 1 or location.startswith((".", "/", "~", "package:")):
                raise
    return fetch(location, revision=revision, local_files_only=local_files_only)


def commit_of(folder: Path) -> str | None:
    """The commit whose files a folder of the cache holds; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if in_cache else None
