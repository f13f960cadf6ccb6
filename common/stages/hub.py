"""Exports on the Hugging Face Hub: fetched at one revision, and sent.

Only what an export's configuration lists is fetched or sent, and it is read as any other export: the weights by
safetensors, the rest as text. Client, key, address (HF_ENDPOINT), cache and offline mode (HF_HUB_OFFLINE) are those of
`huggingface_hub`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.stages.parts import CARD, CONFIGURATION

#: What a repository is called, the name of its owner in front.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise StageError(
            "models on the Hub need the package huggingface_hub: pip install 'representation-assemble[hub]'"
        ) from None
    return huggingface_hub


def check_repository(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        StageError: it says what a name looks like, and `from_export` where there is such a folder.
    """
    if REPOSITORY.fullmatch(repo) and ".." not in repo and "--" not in repo:
        return
    folder = "; a folder is read by from_export" if Path(repo).is_dir() else ""
    raise StageError(f"{repo!r} is no name of a repository on the Hub, which is user/name{folder}")


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The folder of an export that lies on the Hub, in the cache of the Hub's client.

    All files come from the commit that the revision is when it is asked for. What is in the cache is not fetched again,
    and without a network what is there is used.

    Args:
        repo: `user/name`.
        revision: branch, tag or commit; None is the newest. A commit is the same forever.

    Raises:
        StageError: there is no such repository, revision or file, no access, or no network; the message says which.
    """
    check_repository(repo)
    hub = _client()
    with _explained(repo, revision):
        configuration = Path(hub.hf_hub_download(repo, CONFIGURATION, revision=revision))
        folder = configuration.parent
        for name in _listed(configuration, repo):
            hub.hf_hub_download(repo, name, revision=folder.name)  # the cache names folders by their commit
    return folder


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Send an export to the Hub as one commit; the repository is made where it is missing.

    Args:
        folder: an export.
        repo: `user/name`.
        private: whether a new repository is seen by its owner alone.

    Returns:
        Address of the commit.

    Raises:
        StageError: there is no access or no network.
    """
    check_repository(repo)
    names = [CONFIGURATION, CARD, *_listed(folder / CONFIGURATION, repo)]
    api = _client().HfApi(library_name="representation-assemble")
    with _explained(repo, None):
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"Export of {folder.name}",
        )
    return str(sent.commit_url)


def _listed(configuration: Path, repo: str) -> list[str]:
    """Files that a configuration lists, which the Hub's client would take for patterns."""
    try:
        names = list(dict(json.loads(configuration.read_bytes())["files"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise StageError(f"{repo} is no export of this suite: its {CONFIGURATION} lists no files") from None
    for name in names:
        if not re.fullmatch(r"[\w. -]+(/[\w. -]+)*", name) or ".." in name:
            raise StageError(f"{repo}: {CONFIGURATION} lists the file {name!r}, which no export holds")
    return names


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Say what the errors of the Hub's client mean."""
    from huggingface_hub import errors

    at = f"{repo} at {revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError:
        raise StageError(
            f"{at}: its owner asks for an agreement: accept it on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{repo}: there is no such repository on the Hub, or it is private: check the name, or `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{repo} has no revision {revision!r}: give a branch, a tag or a whole commit") from None
    except errors.LocalEntryNotFoundError as error:
        raise StageError(
            f"{at} is not in the cache, and the Hub cannot be reached: {_first_line(error.__cause__ or error)}"
        ) from None
    except errors.EntryNotFoundError as error:
        raise StageError(f"{at} is no whole export: {_first_line(error)}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise StageError(f"{at}: the Hub answers {_first_line(error)}") from None
    except Exception as error:
        # The client's own client, of which its errors are a kind, had no answer.
        if not isinstance(error, errors.HfHubHTTPError.__bases__):
            raise
        raise StageError(f"{at}: the Hub cannot be reached: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
