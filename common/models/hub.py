"""Fetches and sends exports on the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StageError
from common.files import read_bytes

#: Files of an export.
CONFIGURATION, CARD = "config.json", "README.md"
#: Files to fetch: configuration, record, weights and vocabularies.
READ = ["*.json", "*.safetensors", "*.txt", "*.model"]


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The folder of an export (`user/name`) in the Hub client's cache, used alone if the Hub does not answer."""
    from huggingface_hub import snapshot_download

    with _named(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=READ))


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Send an export to the Hub as one commit and return its address; creates a missing repository."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="representation-assemble")
    files = json.loads(read_bytes(folder / CONFIGURATION))["files"]
    with _named(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIGURATION, CARD, *files],
            commit_message=f"Export of {folder.name}",
        )
    return str(sent.commit_url)


@contextmanager
def _named(repo: str) -> Iterator[None]:
    """Add the repository to errors of the Hub's client."""
    try:
        yield
    except Exception as error:  # From the client, its HTTP library or the system.
        raise StageError(f"Hugging Face Hub, {repo}: {' '.join(str(error).split())}") from error
