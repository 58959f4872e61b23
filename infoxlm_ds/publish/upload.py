"""Uploads an export to the hub of Hugging Face, or to another one that HF_ENDPOINT names."""

from __future__ import annotations

import sys
from pathlib import Path

from infoxlm_ds.config import UserError
from infoxlm_ds.model.checksums import CHECKSUMS, check_checksums

AGAIN = "export it again"


def publish(folder: Path, name: str, *, private: bool = False, yes: bool = False) -> str:
    """Upload all files of an export to the repository `name`, which is made if it is not there. Asks first, on a
    terminal; `yes`: the user has agreed already. Returns the repository's address, or an empty string if the user said
    no.

    UserError if the folder is no undamaged export, if the name is not one, if there is no token, or if nobody can be
    asked. OSError, with one line as its message, if the server cannot be reached or refuses.
    """
    from httpx2 import HTTPError  # the client that huggingface_hub uses
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import logging, validate_repo_id  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not (folder / CHECKSUMS).is_file():
        raise UserError(f"{folder} is no export, as it has no {CHECKSUMS}: give a folder of `infoxlm export`")
    check_checksums(folder, AGAIN)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name} cannot be a repository: {error}") from None
    if get_token() is None:
        raise UserError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="infoxlm-ds")
    if not yes and not _agreed(folder, f"{name} ({'private' if private else 'public'}) on {api.endpoint}"):
        return ""
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="infoxlm export")
    except (HfHubHTTPError, HTTPError, ConnectionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(f"{api.endpoint} did not take {name}: {reason}") from None
    return str(repository)


def _agreed(folder: Path, where: str) -> bool:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    what = f"{len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, to {where}"
    if not sys.stdin.isatty():
        raise UserError(f"nobody can be asked here whether to upload {what}: agree with --yes")
    return input(f"upload {what}? [y/N] ").strip().lower() in ("y", "yes")
