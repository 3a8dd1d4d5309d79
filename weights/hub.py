"""Published checkpoints through the Hugging Face hub and its cache; a file whose checksum is not
the stated one is refused and removed, and `offline` opens no connection at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfFileMetadata,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import files
from .errors import WeightsError


@dataclass(frozen=True)
class Published:
    """A checkpoint that OpenAI published on the hub."""

    repo: str
    revision: str | None  # the commit that the name stands for; None: whatever `main` is
    sha256: str | None  # of that commit's model.safetensors; None: what the hub states


# Commits and checksums as public projects state them (each by two, the checksums of medium.en and
# large-v1 by one); not checked against the hub itself. A wrong one can only refuse a download,
# never let another file pass. openai/whisper-large holds large-v1.
MODELS: dict[str, Published] = {
    "tiny": Published(
        "openai/whisper-tiny",
        "169d4a4341b33bc18d8881c4b69c2e104e1cc0af",
        "7ebd0e69e78190ffe1438491fa05cc1f5c1aa3a4c4db3bc1723adbb551ea2395",
    ),
    "tiny.en": Published(
        "openai/whisper-tiny.en",
        "87c7102498dcde7456f24cfd30239ca606ed9063",
        "db59695928ded6043adaef491a53ef4e12da9611184d77c53baa691a60b958ad",
    ),
    "base": Published(
        "openai/whisper-base",
        "e37978b90ca9030d5170a5c07aadb050351a65bb",
        "07cadb9f25677c8d50df603e66a98fbd842cce45047139baeb16e6219a1e807b",
    ),
    "base.en": Published(
        "openai/whisper-base.en",
        "911407f4214e0e1d82085af863093ec0b66f9cd6",
        "d4dd5542fd6a1d35639e21384238f3bfe6c557c849d392b5905d33ee29e71db5",
    ),
    "small": Published(
        "openai/whisper-small",
        "973afd24965f72e36ca33b3055d56a652f456b4d",
        "1d7734884874f1a1513ed9aa760a4f8e97aaa02fd6d93a3a85d27b2ae9ca596b",
    ),
    "small.en": Published(
        "openai/whisper-small.en",
        "e8727524f962ee844a7319d92be39ac1bd25655a",
        "6014ac49b506df900f66f4aca6b0801eed7245594ace97bcaf73e0ae5b863066",
    ),
    "medium": Published(
        "openai/whisper-medium",
        "abdf7c39ab9d0397620ccaea8974cc764cd0953e",
        "62f73550fa6db24b0c6f6c5962bd0dae80fa644e93cde9cd9c3792971b47fd28",
    ),
    "medium.en": Published(
        "openai/whisper-medium.en",
        "2e98eb6279edf5095af0c8dedb36bdec0acd172b",
        "8f731340f569588236c21f794c33e83b7cc5a297511d2bdc30117ea969004311",
    ),
    "large-v1": Published(
        "openai/whisper-large",
        "4ef9b41f0d4fe232daafdb5f76bb1dd8b23e01d7",
        "27d753181b54178da228555dbc57fe639f6624ca470d83d35e500b22df0ab7e6",
    ),
    "large-v2": Published(
        "openai/whisper-large-v2",
        "ae4642769ce2ad8fc292556ccea8e901f1530655",
        "57a1ba2a82c093cabff2541409ae778c97145378b9ddfa722763cb1cb8f9020b",
    ),
    "large-v3": Published(
        "openai/whisper-large-v3",
        "06f233fe06e710322aca913c1bc4249a0d71fce1",
        "a8e94b85976e5864ba3e9525c7e6c83b2a1eca42d4b797a0c7c24d778e40fd95",
    ),
    "large-v3-turbo": Published(
        "openai/whisper-large-v3-turbo",
        "41f01f3fe87f28c78e2fbf8b568835947dd65ed9",
        "542566a422ae4f3fd23f1ba11add198fca01bbf82e66e6a2857b3f608b1eb9d1",
    ),
}
MODELS["large"] = MODELS["large-v3"]  # as in whisper.available_models()
MODELS["turbo"] = MODELS["large-v3-turbo"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256_HEX = 64  # what the hub states for a file in LFS
_GIT_HEX = 40  # what it states for a small file: the SHA-1 of git's blob

WITHOUT_NETWORK = (
    "without a network, give the path of a local file, use the embedded checkpoint (--model demo), "
    "or fill the Hugging Face cache (HF_HOME) elsewhere and run with --offline; HF_ENDPOINT names "
    "a mirror"
)


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, in the hub's cache, their checksums checked."""

    commit: str
    weights: Path  # model.safetensors, or the index of the shards
    config: Path
    sha256: str  # of the weights; of shards: their bytes one after another, sorted by file name


@dataclass(frozen=True)
class _Repo:
    """Where to look: a repo of the hub, at an endpoint, through a cache."""

    name: str
    offline: bool
    cache_dir: str | None
    endpoint: str | None


def fetch(
    repo: str, *, revision: str | None, sha256: str | None, offline: bool, cache_dir: Path | None
) -> Snapshot:
    """The weights and the config.json of `repo` at `revision` (`main` if None).

    sha256   the checksum that model.safetensors must have, or None: the one that the hub states
    offline  read the cache and open no connection

    A branch or a tag is resolved once, by the first request, and its commit holds for every file.
    A commit that lies in the cache whole is read without a connection. Raises WeightsError.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    at = _Repo(repo, offline, str(cache_dir) if cache_dir else None, endpoint)
    config = _get(at, files.CONFIG, revision or "main")
    if config is None:
        raise _absent(at, files.CONFIG, revision or "main")
    commit = config.parent.name
    weights = _get(at, files.SINGLE, commit, sha256=sha256)
    if weights is not None:
        return Snapshot(commit, weights, config, files.sha256([weights]))
    index = _get(at, files.INDEX, commit)
    if index is None:
        raise _absent(at, f"{files.SINGLE} and no {files.INDEX}", commit)
    parts = files.shard_paths(index)
    for part in parts:
        if _get(at, part.name, commit) is None:
            raise _absent(at, part.name, commit)
    return Snapshot(commit, index, config, files.sha256(parts))


def _absent(at: _Repo, what: str, revision: str) -> WeightsError:
    if at.offline:
        return WeightsError(
            f"weights: the Hugging Face cache holds no {what} of {at.name} at {revision}, and "
            f"--offline forbids to download it; {WITHOUT_NETWORK}"
        )
    return WeightsError(
        f"weights: {at.name} at {revision} holds no {what}, expected {files.CONFIG} and "
        f"{files.SINGLE}"
    )


def _get(at: _Repo, name: str, revision: str, *, sha256: str | None = None) -> Path | None:
    """One file's path in the cache, checked; None if the repo (offline: the cache) has none."""
    with _sentences(at, name, revision):
        cached = try_to_load_from_cache(
            at.name, name, cache_dir=at.cache_dir, revision=revision, repo_type="model"
        )
        if isinstance(cached, str) and (at.offline or _COMMIT.fullmatch(revision)):
            path, stated = Path(cached), _stated_in_cache(Path(cached))
            if stated is None and sha256 is None and not at.offline:
                stated = _ask(at, name, revision).etag
        elif at.offline:
            return None
        else:
            try:
                # Asked here first, since hf_hub_download would take a dead network for a reason to
                # use an older file of the cache without a word.
                asked = _ask(at, name, revision)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
            path = Path(
                hf_hub_download(
                    at.name,
                    name,
                    revision=revision,
                    cache_dir=at.cache_dir,
                    endpoint=at.endpoint,
                )
            )
            stated = asked.etag
            if path.parent.name != asked.commit_hash:
                raise WeightsError(
                    f"weights: {at.name} moved from {asked.commit_hash} to {path.parent.name} "
                    f"while {name} was on its way; run again"
                )
        _verify(at, path, sha256 or stated)
    return path


def _ask(at: _Repo, name: str, revision: str) -> HfFileMetadata:
    return get_hf_file_metadata(
        hf_hub_url(at.name, name, revision=revision, endpoint=at.endpoint), endpoint=at.endpoint
    )


def _stated_in_cache(path: Path) -> str | None:
    """What the hub stated when the file was downloaded: the cache names its blobs so. None where
    the cache could make no symbolic links."""
    return Path(os.readlink(path)).name if path.is_symlink() else None


def _verify(at: _Repo, path: Path, stated: str | None) -> None:
    """Raises WeightsError, and removes the file, if its checksum is not the one that is stated."""
    if stated is not None and len(stated) == _SHA256_HEX:
        kind, found = "sha256", files.sha256([path])
    elif stated is not None and len(stated) == _GIT_HEX:
        content = path.read_bytes()
        kind = "git blob sha1"
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    elif path.name == files.CONFIG and at.offline:
        return  # what it states is checked against every shape of the checkpoint
    else:
        raise WeightsError(
            f"weights: the hub states no checksum for {path.name} of {at.name} (found {stated!r}), "
            "expected one: download the file by hand and give its path"
        )
    if found != stated:
        _remove(path)
        raise WeightsError(
            f"weights: {path.name} of {at.name} has {kind} {found}, expected {stated}; the file "
            "was removed from the cache, run again to download it"
        )


def _remove(path: Path) -> None:
    """Removes one file of the cache: the link in its snapshot and the blob behind it."""
    # <cache>/models--owner--name/snapshots/<commit>/<file> -> ../../blobs/<stated checksum>
    repo_folder = path.absolute().parent.parent.parent
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = Path(os.path.normpath(target))
    if repo_folder in path.absolute().parents:
        path.unlink(missing_ok=True)


@contextmanager
def _sentences(at: _Repo, name: str, revision: str) -> Iterator[None]:
    """One sentence for each way in which the hub can fail. Its errors derive from one another, so
    the narrower one comes first."""
    what = f"{name} of {at.name} at {revision}"
    site = at.endpoint or "https://huggingface.co"
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"weights: {at.name} is gated: accept its terms at {site}/{at.name}, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"weights: {site} has no repo {at.name}, or it is private and asks for `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"weights: {at.name} has no revision {revision} at {site}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        raise WeightsError(
            f"weights: {what} is not in the cache and cannot be downloaded "
            f"({_first_line(cause)}); {WITHOUT_NETWORK}"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"weights: {site} has no {what}") from error
    except HFValidationError as error:
        raise WeightsError(
            f"weights: {at.name!r} cannot be a repo of the hub: {_first_line(error)}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise WeightsError(
            f"weights: {site} answered {status} for {what}; {advice}, or {WITHOUT_NETWORK}"
        ) from error
    except HTTPError as error:
        raise WeightsError(
            f"weights: {what} cannot be downloaded from {site} ({type(error).__name__}: "
            f"{_first_line(error)}); {WITHOUT_NETWORK}"
        ) from error
    except (OSError, RuntimeError) as error:
        # A full disk, a cache that cannot be written, a body shorter than stated (OSError), or a
        # failure of the hub's Xet transfer (RuntimeError). None leaves a file in the cache.
        raise WeightsError(f"weights: {what} was not downloaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
