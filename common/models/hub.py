"""Fetches and sends exports on the Hugging Face Hub; only the files that an export's configuration lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StageError
from common.files import parsing

#: Files of an export.
CONFIGURATION, CARD = "config.json", "README.md"


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The folder of an export (`user/name`) in the Hub client's cache. A cached commit needs no request."""
    from huggingface_hub import hf_hub_download

    with _named(repo):
        configuration = Path(hf_hub_download(repo, CONFIGURATION, revision=revision))
        for name in _listed(configuration):
            hf_hub_download(repo, name, revision=configuration.parent.name)  # the cache names folders by their commit
    return configuration.parent


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Send an export to the Hub as one commit and return its address; creates a missing repository."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="representation-assemble")
    with _named(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIGURATION, CARD, *_listed(folder / CONFIGURATION)],
            commit_message=f"Export of {folder.name}",
        )
    return str(sent.commit_url)


def _listed(configuration: Path) -> list[str]:
    with parsing(configuration, StageError):
        files = json.loads(configuration.read_bytes()).get("files")
        if not files:
            raise ValueError("lists no files, so it is not an export of this suite")
        return list(files)


@contextmanager
def _named(repo: str) -> Iterator[None]:
    """Add the repository to errors of the Hub's client."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:  # From the client, its HTTP library or the system.
        raise StageError(f"Hugging Face Hub, {repo}: {' '.join(str(error).split())}") from error
