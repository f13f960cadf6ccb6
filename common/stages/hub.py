"""Exports on the Hugging Face Hub, by `huggingface_hub`; only files listed in an export's configuration count."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StageError
from common.files import parsing
from common.stages.paper_modules import CARD, CONFIGURATION

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"[\w. -]+(/[\w. -]+)*")
#: Meaning of the Hub client's errors, the most specific first.
_MEANINGS = {
    "GatedRepoError": "its owner asks for an agreement: accept it on its page, then `hf auth login`",
    "RepositoryNotFoundError": "no such repository on the Hub, or it is private: check the name, or `hf auth login`",
    "RevisionNotFoundError": "no such revision: give a branch, a tag or a whole commit",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and the model is not in the cache",
    "EntryNotFoundError": "no whole export",
    "HfHubHTTPError": "the Hub refuses",
}


def check_repository(repo: str) -> None:
    if not _REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo:
        folder = "; a folder is read by from_export" if Path(repo).is_dir() else ""
        raise StageError(f"{repo!r} is no name of a repository on the Hub, which is user/name{folder}")


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The folder of an export (`user/name`) in the Hub client's cache. A cached commit needs no request."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    check_repository(repo)
    with _explained(f"{repo} at {revision}" if revision else repo):
        known = _COMMIT.fullmatch(revision or "") and try_to_load_from_cache(repo, CONFIGURATION, revision=revision)
        offline = not known and not _is_reachable(repo)
        configuration = Path(hf_hub_download(repo, CONFIGURATION, revision=revision, local_files_only=offline))
        folder = configuration.parent  # the cache names folders by their commit
        for name in _listed(configuration):
            hf_hub_download(repo, name, revision=folder.name, local_files_only=offline)
    return folder


def _is_reachable(repo: str) -> bool:
    """Whether the Hub answers; without a network `hf_hub_download` would retry for 25 s."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, CONFIGURATION))
    except errors.HfHubHTTPError:
        return True
    except Exception:  # Of the client that this client uses.
        return False
    return True


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Send an export to the Hub as one commit and return its address; creates a missing repository."""
    from huggingface_hub import HfApi

    check_repository(repo)
    api = HfApi(library_name="representation-assemble")
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIGURATION, CARD, *_listed(folder / CONFIGURATION)],
            commit_message=f"Export of {folder.name}",
        )
    return str(sent.commit_url)


def _listed(configuration: Path) -> list[str]:
    """Files that a configuration lists, checked: the Hub's client would misread some names as patterns or paths."""
    with parsing(configuration, StageError):
        config = json.loads(configuration.read_bytes())
        if "files" not in config:
            raise ValueError("lists no files, so that it is no export of this suite")
        names = list(config["files"])
        for name in names:
            if not _FILE.fullmatch(name) or ".." in name:
                raise ValueError(f"lists {name!r}, which no export holds")
    return names


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Explain the errors of the Hub's client."""
    from huggingface_hub import errors

    try:
        yield
    except StageError:
        raise
    except Exception as error:  # The client's, those of the client that it uses, those of the system.
        meaning = next((text for name, text in _MEANINGS.items() if isinstance(error, getattr(errors, name))), None)
        detail = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise StageError(f"{what}: {meaning or 'the Hub cannot be reached'} ({detail})") from error
