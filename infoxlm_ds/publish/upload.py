"""Uploads an export to the hub of Hugging Face, or to another one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from infoxlm_ds.config import UserError
from infoxlm_ds.model.checksums import CHECKSUMS, check_checksums

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADVICE = "export the run again; a card can be edited on the hub"


class Repository(NamedTuple):
    """A repository on the hub, or one that would be made there."""

    name: str
    private: bool
    exists: bool


def publish(
    folder: Path, name: str, *, private: bool = False, endpoint: str | None = None, yes: bool = False
) -> str | None:
    """Upload the files that an export wrote to the repository `name`, which is made if it is not there, in one commit.
    Asks first, on a terminal; `yes`: the user has agreed already. `endpoint`: of another hub; None: HF_ENDPOINT or the
    public one. Returns the address of the commit, or None if the user said no.

    UserError if the folder is no undamaged export, if the name is wrong, if there is no token or the hub refuses it, if
    the repository is public and should be private, or if nobody can be asked. OSError, with one line as its message, if
    the hub cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    files = _files(folder)
    _check_name(name)
    if endpoint is not None and not endpoint.startswith(("https://", "http://")):
        raise UserError(f"--endpoint {endpoint} is no address: it must begin with https:// or http://")
    if get_token() is None:
        raise UserError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, library_name="infoxlm-ds")
    with _one_line(api.endpoint, name):
        repository = _find(api, name, private)
    size = sum((folder / file).stat().st_size for file in files)
    seen = "private" if repository.private else "public"
    if not yes and not _agrees(f"{len(files)} files, {size / 1e6:,.1f} MB, to {name} ({seen}) on {api.endpoint}"):
        return None
    with _one_line(api.endpoint, name):
        if not repository.exists:
            repository = repository._replace(name=api.create_repo(name, private=private).repo_id)
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]
        return api.create_commit(repository.name, operations, commit_message="infoxlm export").commit_url


def _files(folder: Path) -> list[str]:
    """The files of an export: what anyone else put there is not published."""
    from huggingface_hub.constants import REPOCARD_NAME

    if not (folder / CHECKSUMS).is_file() or not (folder / REPOCARD_NAME).is_file():
        raise UserError(f"{folder} has no {CHECKSUMS} or no {REPOCARD_NAME}: give a folder that `infoxlm export` wrote")
    check_checksums(folder, ADVICE)
    return [*json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")), CHECKSUMS]


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name} cannot be a repository: {error}") from None


def _find(api: HfApi, name: str, private: bool) -> Repository:
    """The repository. `private`: what it is to be if it is made now; one that exists keeps what it is."""
    from huggingface_hub.errors import RepositoryNotFoundError

    full = name if "/" in name else f"{api.whoami()['name']}/{name}"
    try:
        is_private = bool(api.model_info(full).private)
    except RepositoryNotFoundError:
        return Repository(full, private, exists=False)
    if private and not is_private:
        raise UserError(f"{full} exists and is public: make it private on the hub, or choose another name")
    return Repository(full, is_private, exists=True)


def _agrees(what: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"nobody can be asked here whether to upload {what}: agree with --yes")
    try:
        return input(f"upload {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


@contextmanager
def _one_line(endpoint: str, name: str) -> Iterator[None]:
    """What the client raises becomes one line: UserError if the hub refuses the user, else OSError."""
    from httpx2 import HTTPError  # of the client that huggingface_hub uses
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(
                f"{endpoint} refuses your token for {name} ({_reason(error)}): use one that may write there"
            ) from None
        raise OSError(f"{endpoint} did not take {name}: {_reason(error)}") from None
    except (HTTPError, ConnectionError, ValueError) as error:  # ValueError: it refuses the card's metadata
        raise OSError(f"{endpoint} did not take {name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
