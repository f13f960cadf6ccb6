"""Fetches and sends exports on the Hugging Face Hub; only the files that an export's configuration lists."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StageError
from common.files import parsing, read_bytes

#: Seconds to wait for the Hub before the cache is used alone.
PATIENCE = 5.0
#: Files of an export.
CONFIGURATION, CARD = "config.json", "README.md"


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The folder of an export (`user/name`) in the Hub client's cache, used alone if the Hub is silent."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError, get_session

    with _named(repo):
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)  # the client's downloads try five times
            silent = ""
        except Exception as error:  # of its HTTP library, or in offline mode
            silent = f"{constants.ENDPOINT} does not answer ({type(error).__name__}), and the cache lacks the export"
        load = functools.partial(hf_hub_download, repo, local_files_only=bool(silent))
        try:
            configuration = Path(load(CONFIGURATION, revision=revision))
            for name in _listed(configuration):
                load(name, revision=configuration.parent.name)  # the cache names folders by their commit
        except LocalEntryNotFoundError as error:
            raise ConnectionError(silent or str(error)) from None
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
        files = json.loads(read_bytes(configuration)).get("files")
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
