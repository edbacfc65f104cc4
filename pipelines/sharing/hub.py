"""A folder onto Hugging Face's hub, by its own library: the token, the endpoint and the uploads are that library's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipelines.errors import InputError, OutputError, SettingsError

RepoType = Literal["model", "dataset"]


def push(folder: Path, repo: str, repo_type: RepoType, *, private: bool) -> str:
    """Uploads the folder as one version of a repository, which is made where there is none; returns its address.

    Raises SettingsError where huggingface_hub is not installed or the name cannot be, InputError without a token,
    OutputError where the hub refuses or does not answer.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
    except ImportError as error:
        raise SettingsError("--push needs huggingface_hub: pip install -e '.[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, repo_type=repo_type, folder_path=folder, commit_message=f"Upload {repo_type}"
        )
    except HFValidationError as error:
        raise SettingsError(f"--push is {repo!r}: give NAMESPACE/NAME ({error})") from error
    except LocalTokenNotFoundError as error:
        raise InputError("--push: no token of the hub was found: run `hf auth login`, or set HF_TOKEN") from error
    except (HTTPError, OSError, ValueError) as error:  # refused, not reached, or metadata that the hub does not take
        reason = " ".join(str(error).split())[:500]
        raise OutputError(f"--push {repo}: {reason}. {folder} is whole: the same command pushes it again") from error
    return str(done.repo_url)
