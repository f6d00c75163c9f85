"""Models by Hugging Face id, through huggingface_hub: its cache, its resumption, its HF_* settings."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import ModelError
from engine.checkpoints.cache import Cached, disk_error_text, require_space
from engine.checkpoints.folder import CheckConfig, read_config, validate
from engine.checkpoints.progress import Progress

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
"""Subfolders hold other forms of the same weights, and so do Mistral's consolidated files."""


def fetch(
    repo: str, revision: str | None, cache: Path | None, progress: Progress, check_config: CheckConfig | None
) -> Path:
    """The snapshot folder of `repo` at `revision` (None: main). config.json comes first, so that a model that can't run
    is refused before its weights are fetched. `cache` None: Hugging Face's own. Raises ModelError.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.ERROR)
    where = cache or Path(constants.HF_HUB_CACHE)
    common: dict[str, Any] = {"repo_id": repo, "cache_dir": where}
    progress.begin(f"{repo}: asking {constants.ENDPOINT}")
    with _explained(repo, revision, where):
        config = Path(hf_hub_download(**common, filename="config.json", revision=revision, tqdm_class=_reporter(_drop)))
    if check_config is not None:
        check_config(read_config(config))
    wanted = common | {"revision": config.parent.name, "allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
    with _explained(repo, revision, where):
        try:
            plan = snapshot_download(**wanted, dry_run=True, tqdm_class=_reporter(_drop))
        except DryRunError:
            progress.note(f"{repo}: {constants.ENDPOINT} can't be asked; using the copy in {where}")
            return validate(Path(snapshot_download(**wanted, local_files_only=True)), check_config)
    _refuse_without_weights(repo, [file.filename for file in plan])
    missing = sum(file.file_size or 0 for file in plan if file.will_download)
    require_space(where, missing, f"downloading {repo}")
    progress.begin(f"{repo}: downloading", missing, "bytes")
    reporter = _reporter(lambda done: progress.update(min(done, missing)))
    with _explained(repo, revision, where):
        folder = Path(snapshot_download(**wanted, tqdm_class=reporter))
    return validate(folder, check_config)


def cached_models(cache: Path | None) -> list[Cached]:
    """What `fetch` has left in `cache`, and other programs in the same place: models with safetensors weights."""
    found = []
    for repo in _repositories(cache):
        whole = [revision for revision in repo.revisions if _servable({file.file_name for file in revision.files})]
        if repo.repo_type == "model" and whole:
            latest = max(whole, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            found.append(Cached(repo.repo_id, Path(latest.snapshot_path), repo.size_on_disk))
    return sorted(found, key=lambda entry: entry.name)


def remove(entry: Cached, cache: Path | None) -> None:
    """Delete every revision of a model that `cached_models` listed."""
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(cache)
    repo = next(repo for repo in info.repos if repo.repo_id == entry.name and repo.repo_type == "model")
    info.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()


def _repositories(cache: Path | None) -> list[Any]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return list(scan_cache_dir(cache).repos)
    except CacheNotFound:
        return []


def _servable(names: set[str]) -> bool:
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def _refuse_without_weights(repo: str, names: list[str]) -> None:
    if not _servable(set(names)):
        raise ModelError(
            f"{repo} publishes no safetensors weights, and pickled ones are never loaded: try --revision refs/pr/N if "
            "its discussions offer a conversion, or convert it where you trust it"
        )


@contextmanager
def _explained(repo: str, revision: str | None, where: Path) -> Iterator[None]:
    """Each way that the Hub, the network or the disk can refuse, as one line."""
    from huggingface_hub import errors

    # The transport's own errors: of httpx in huggingface_hub 1, of httpx2 in 2.
    transport_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.XetDownloadError as error:
        raise ModelError(f"downloading {repo} broke off ({_first_line(error)}): pull again to continue") from error
    except (OSError, errors.HFValidationError, transport_error) as error:
        raise ModelError(_explanation(error, repo, revision, where)) from error


def _explanation(error: Exception, repo: str, revision: str | None, where: Path) -> str:
    from huggingface_hub import constants, errors, is_offline_mode

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub did answer; that the cache has no copy either is beside the point
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its terms at {page}, then `hf auth login` (or set HF_TOKEN)"
        case errors.RepositoryNotFoundError():
            return f"no model {repo} at {constants.ENDPOINT}: check its name; if it is private, `hf auth login` first"
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision}: choose a branch, tag or commit listed at {page}"
        case errors.RemoteEntryNotFoundError():
            return f"{repo} has no config.json: if it holds GGUF files, download one and name the file"
        case errors.LocalEntryNotFoundError() if is_offline_mode():
            return f"HF_HUB_OFFLINE is set and {where} has no whole {repo}: unset it, or copy the model there"
        case errors.HfHubHTTPError():
            return f"{constants.ENDPOINT} answered {error.response.status_code} for {repo}: {_advice(error)}"
        case errors.HFValidationError():
            return f"{repo!r} is not a Hugging Face id ({_first_line(error)}): write owner/name"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR):
            return disk_error_text(error, f"downloading {repo}", where)
    return (
        f"can't reach {constants.ENDPOINT} for {repo} ({_first_line(error.__cause__ or error)}): check the network "
        "(HTTPS_PROXY, HF_ENDPOINT) and pull again, or name a local folder or `demo`"
    )


def _advice(error: Any) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return "log in with `hf auth login` (or set HF_TOKEN) with access to it"
    return "wait a minute and pull again" if status == 429 or status >= 500 else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _drop(done: int) -> None:
    pass


def _reporter(report: Callable[[int], None]) -> type:
    """A tqdm that prints nothing and reports bytes; of the Hub's two bars, received and written, the further one."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    furthest = 0

    class Reporter(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def display(self, *_: object, **__: object) -> None:
            nonlocal furthest
            if self.unit == "B":
                furthest = max(furthest, int(self.n))
                report(furthest)

    return Reporter
