"""Uploading an exported model to a hub, through huggingface_hub; nothing else in the package goes online."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from llava_cl.errors import InputError, RunError


def check_push(repository: str) -> None:
    """Asks the hub whether a model can be uploaded under a name, before anything is written.

    Args:
        repository: `owner/name` of a repository that does not exist yet.

    Raises:
        InputError: no such name, no token, a token that the hub refuses, or a repository that exists.
        RunError: the hub cannot be reached.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push {repository}: is no name of a repository ({error}).") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push: HF_HUB_OFFLINE is set; unset it to upload.")
    if get_token() is None:
        raise InputError("--push: there is no token for the hub; run `hf auth login`, or set HF_TOKEN.")
    with _told(repository):
        hub = HfApi()
        hub.whoami()
        if hub.repo_exists(repository):
            raise InputError(f"--push {repository}: exists on {hub.endpoint}; give a new name.")


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a new private repository; returns its address.

    Raises:
        InputError: the hub refuses it.
        RunError: the hub cannot be reached.
    """
    with _told(repository, f" The export is complete in {folder}: upload it with `hf upload`, or remove it."):
        hub = HfApi()
        address = hub.create_repo(repository, private=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by llava-cl")
    return str(address)


@contextlib.contextmanager
def _told(repository: str, more: str = "") -> Iterator[None]:
    """Makes the client's errors one message: a refusal by the hub, or no answer.

    `HTTPError` is that of the HTTP library, which is another one in each major version of huggingface_hub.
    """
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        response = getattr(error, "response", None)
        kind = InputError if response is not None and response.status_code in (401, 403, 404, 409) else RunError
        raise kind(f"--push {repository}: the hub at {constants.ENDPOINT} says: {error}.{more}") from error
