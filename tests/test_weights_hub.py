"""weights through the hub: a server on this machine plays it, well or badly.

It answers as https://huggingface.co does for the requests of huggingface-hub 2.4: HEAD and GET of
/owner/name/resolve/REVISION/FILE, with X-Repo-Commit, the checksum as ETag (X-Linked-Etag for files
in LFS, whose ETag is the SHA-256; the others have git's SHA-1), and X-Error-Code on a 404.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import whisper
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file
from test_weights import TINY, assert_same, config_json, hugging_face_names, random_tensors

import weights
from weights import WeightsError, files, hub
from weights.__main__ import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
REPO = "someone/whisper-small-fine-tuned"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """What the server holds, and how it misbehaves."""

    url: str
    files: dict[str, bytes]
    repo: str = REPO
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    requests: list[str] = field(default_factory=list)
    stated: dict[str, str] = field(default_factory=dict)  # file -> a checksum that is not its own
    corrupt: set[str] = field(default_factory=set)  # files whose bytes change on the way
    cut: str | None = None  # "short": a shorter body than stated; "dropped": the line goes dead
    status: int | None = None  # the answer to everything
    code: str | None = None  # X-Error-Code

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        self.requests.append(f"{method} {request.path}")
        prefix = f"/{self.repo}/resolve/"
        if self.status is not None:
            return self._refuse(request, self.status, self.code)
        if not request.path.startswith(prefix):
            return self._refuse(request, 404, "RepoNotFound")
        revision, name = request.path.removeprefix(prefix).split("/", 1)
        commit = self.branches.get(revision, revision)
        if commit not in self.branches.values():
            return self._refuse(request, 404, "RevisionNotFound")
        if name not in self.files:
            return self._refuse(request, 404, "EntryNotFound")
        content = self.files[name]
        large = name.endswith(".safetensors")
        own = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        checksum = self.stated.get(name, own)
        body = bytes(byte ^ 1 for byte in content) if name in self.corrupt else content
        request.send_response(200)
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", f'"{checksum}"')
        if large:
            request.send_header("X-Linked-Etag", f'"{checksum}"')
            request.send_header("X-Linked-Size", str(len(content)))
        stop = len(body) // 2 if large and method == "GET" and self.cut else len(body)
        length = stop if self.cut == "short" and method == "GET" else len(body)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if method == "GET":
            request.wfile.write(body[:stop])
            if stop < length:  # the line goes dead, and stays so
                self.status = 503
                request.close_connection = True
        return None

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str | None) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """config.json and model.safetensors as transformers writes them, of a random tiny Whisper."""
    folder = tmp_path_factory.mktemp("repo")
    pairs = hugging_face_names(TINY)
    state = {"model." + pairs[name]: tensor for name, tensor in random_tensors(TINY).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {
        "config.json": json.dumps(config_json(TINY)).encode(),
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
    }


@pytest.fixture
def server(content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    played: Hub

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            played.answer(self, "HEAD")

        def do_GET(self) -> None:
            played.answer(self, "GET")

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    played = Hub(f"http://127.0.0.1:{http.server_port}", dict(content))
    Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", played.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield played
    http.shutdown()
    http.server_close()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint where nothing listens."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{http.server_port}"
    http.server_close()
    monkeypatch.setenv("HF_ENDPOINT", url)
    return url


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def refusal(cache: Path, spec: str = REPO, *, offline: bool = False, **more: str) -> str:
    with pytest.raises(WeightsError) as caught:
        weights.load(spec, cache_dir=cache, offline=offline, **more)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence.startswith("weights: ")
    assert "\n" not in sentence
    return sentence


def kept(cache: Path, name: str) -> list[Path]:
    """Everything in the cache that is, or could become, a copy of the file."""
    if not cache.exists():
        return []
    return [
        path
        for path in cache.rglob("*")
        if path.name == name
        or path.name.endswith(".incomplete")
        or (path.is_file() and path.parent.name == "blobs" and path.stat().st_size > 10_000)
    ]


# --- what goes well ----------------------------------------------------------------------------


def test_download_then_offline(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = weights.load(REPO, cache_dir=cache)
    assert_same(checkpoint.tensors, random_tensors(TINY))
    assert checkpoint.dims == TINY
    assert checkpoint.alignment_heads is None
    source = checkpoint.source
    assert (source.name, source.revision) == (REPO, COMMIT)
    assert source.sha256 == hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    assert source.path.read_bytes() == server.files["model.safetensors"]
    asked = len(server.requests)
    assert asked > 0

    again = weights.load(REPO, cache_dir=cache, offline=True)
    assert again.source == source
    assert_same(again.tensors, checkpoint.tensors)
    assert len(server.requests) == asked, server.requests[asked:]


def test_offline_with_no_server(
    server: Hub, cache: Path, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    expected = weights.load(REPO, cache_dir=cache)
    monkeypatch.setenv("HF_ENDPOINT", dead)
    assert weights.load(REPO, cache_dir=cache, offline=True).source == expected.source
    # Without --offline a branch has to be asked for: no cached file stands in for it in silence.
    assert "cannot be downloaded" in refusal(cache)
    # A commit has not.
    assert weights.load(REPO, cache_dir=cache, revision=COMMIT).source == expected.source


def test_branch_moves(server: Hub, cache: Path) -> None:
    assert weights.load(REPO, cache_dir=cache).source.revision == COMMIT
    server.branches["main"] = OTHER
    assert weights.load(REPO, cache_dir=cache).source.revision == OTHER
    assert weights.load(REPO, cache_dir=cache, offline=True).source.revision == OTHER


def test_revision_is_asked_for(server: Hub, cache: Path) -> None:
    server.branches["half"] = OTHER
    assert weights.load(REPO, cache_dir=cache, revision="half").source.revision == OTHER
    assert all(f"/resolve/{COMMIT}/" not in request for request in server.requests)


def test_shards(server: Hub, cache: Path, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    del server.files["model.safetensors"]
    weight_map = {}
    for i in (1, 2):
        name = f"model-{i:05}-of-00002.safetensors"
        part = dict(list(tensors.items())[i - 1 :: 2])
        save_file(part, tmp_path / name)
        server.files[name] = (tmp_path / name).read_bytes()
        weight_map |= dict.fromkeys(part, name)
    server.files[files.INDEX] = json.dumps({"weight_map": weight_map}).encode()
    checkpoint = weights.load(REPO, cache_dir=cache)
    assert_same(checkpoint.tensors, tensors)
    whole = b"".join(server.files[name] for name in sorted(set(weight_map.values())))
    assert checkpoint.source.sha256 == hashlib.sha256(whole).hexdigest()
    assert weights.load(REPO, cache_dir=cache, offline=True).source == checkpoint.source


def test_model_name_is_pinned(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repo = "openai/whisper-tiny"
    server.branches = {"main": OTHER, "pinned": COMMIT}
    stated = hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    monkeypatch.setitem(hub.MODELS, "tiny", hub.Published(server.repo, COMMIT, stated))
    checkpoint = weights.load("tiny", cache_dir=cache)
    assert checkpoint.source.revision == COMMIT
    assert checkpoint.source.name == "tiny"
    assert checkpoint.alignment_heads == whisper._ALIGNMENT_HEADS["tiny"]
    asked = len(server.requests)
    weights.load("tiny", cache_dir=cache)
    assert len(server.requests) == asked, "a pinned file that is there is asked for again"
    by_repo = weights.load("openai/whisper-tiny", cache_dir=cache)
    assert by_repo.source.revision == OTHER
    assert by_repo.alignment_heads == whisper._ALIGNMENT_HEADS["tiny"]
    assert weights.load("tiny", cache_dir=cache, revision="main").source.revision == OTHER


def test_the_repo_of_large_v1(server: Hub, cache: Path) -> None:
    server.repo = "openai/whisper-large"
    heads = weights.load("openai/whisper-large", cache_dir=cache).alignment_heads
    assert heads == whisper._ALIGNMENT_HEADS["large-v1"]


# --- what goes wrong ---------------------------------------------------------------------------


def test_checksum_that_the_hub_states(server: Hub, cache: Path) -> None:
    server.corrupt.add("model.safetensors")
    sentence = refusal(cache)
    own = hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    assert f"expected {own}" in sentence
    assert "run again to download it" in sentence
    assert kept(cache, "model.safetensors") == []
    assert list(cache.rglob("config.json")), "a good file went too"
    server.corrupt.clear()
    assert_same(weights.load(REPO, cache_dir=cache).tensors, random_tensors(TINY))


def test_checksum_of_config(server: Hub, cache: Path) -> None:
    server.corrupt.add("config.json")
    assert "config.json of someone/" in refusal(cache)
    assert not list(cache.rglob("config.json"))


def test_checksum_that_is_pinned(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the hub itself states the wrong bytes' checksum; the pin is what tells."""
    server.repo = "openai/whisper-tiny"
    pin = "0" * 64
    monkeypatch.setitem(hub.MODELS, "tiny", hub.Published(server.repo, COMMIT, pin))
    assert f"expected {pin}" in refusal(cache, "tiny")
    assert kept(cache, "model.safetensors") == []


def test_cached_file_that_rotted(server: Hub, cache: Path) -> None:
    path = weights.load(REPO, cache_dir=cache).source.path
    blob = path.resolve()
    rotten = bytearray(blob.read_bytes())
    rotten[-1] ^= 1
    blob.write_bytes(rotten)
    others = [p for p in cache.rglob("*") if p.name == "config.json"]
    assert "run again to download it" in refusal(cache, offline=True)
    assert not blob.exists()
    assert not path.is_symlink()
    assert all(p.exists() for p in others)
    weights.load(REPO, cache_dir=cache)


def test_file_without_a_checksum(server: Hub, cache: Path) -> None:
    server.stated["model.safetensors"] = "some-etag"
    assert "the hub states no checksum for model.safetensors" in refusal(cache)


def test_cache_without_links(server: Hub, cache: Path) -> None:
    """Where the cache holds plain files, nothing in it says what their checksum should be."""
    path = weights.load(REPO, cache_dir=cache).source.path
    blob = path.resolve()
    path.unlink()
    blob.rename(path)
    assert "states no checksum" in refusal(cache, offline=True)
    assert path.exists()
    assert_same(weights.load(REPO, cache_dir=cache, revision=COMMIT).tensors, random_tensors(TINY))
    path.write_bytes(b"rotten")
    assert "run again to download it" in refusal(cache, revision=COMMIT)
    assert not path.exists()


@pytest.mark.parametrize("cut", ["short", "dropped"])
def test_truncated_download(server: Hub, cache: Path, cut: str) -> None:
    server.cut = cut
    sentence = refusal(cache)
    assert "model.safetensors of someone/" in sentence
    assert kept(cache, "model.safetensors") == []
    server.cut = server.status = None
    assert_same(weights.load(REPO, cache_dir=cache).tensors, random_tensors(TINY))


@pytest.mark.parametrize("spec", ["tiny.en", REPO])
def test_dead_server(dead: str, cache: Path, spec: str) -> None:
    sentence = refusal(cache, spec)
    assert f"cannot be downloaded from {dead}" in sentence
    for way_out in ("local file", "--model demo", "--offline", "HF_ENDPOINT"):
        assert way_out in sentence
    assert kept(cache, "model.safetensors") == []


def test_unknown_repo(server: Hub, cache: Path) -> None:
    sentence = refusal(cache, "nobody/nothing")
    assert sentence.startswith(f"weights: {server.url} has no repo nobody/nothing")


def test_unknown_revision(server: Hub, cache: Path) -> None:
    sentence = refusal(cache, revision="v9")
    assert sentence == f"weights: {REPO} has no revision v9 at {server.url}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_repo_without_the_file(server: Hub, cache: Path, name: str) -> None:
    del server.files[name]
    assert f"holds no {name}" in refusal(cache)


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "GatedRepo", "is gated: accept its terms"),
        (401, "RepoNotFound", "has no repo someone/whisper-small-fine-tuned, or it is private"),
        (401, None, "; log in with `hf auth login`"),
        (403, None, "; log in with `hf auth login`"),
        (500, None, "answered 500"),
        (503, None, "; try again later"),
    ],
)
def test_refusals_of_the_hub(
    server: Hub, cache: Path, status: int, code: str | None, says: str
) -> None:
    server.status, server.code = status, code
    assert says in refusal(cache)


def test_endpoint_that_is_no_hub(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/not a hub")
    assert "weights: " in refusal(cache)


@pytest.mark.parametrize("repo", ["a--b/c", "a/b..c", "a/b.git"])
def test_impossible_repo_id(server: Hub, cache: Path, repo: str) -> None:
    assert "cannot be a repo of the hub" in refusal(cache, repo)


def test_cache_that_cannot_be_written(server: Hub, cache: Path) -> None:
    cache.write_bytes(b"a file where the folder should be")
    assert "was not downloaded" in refusal(cache)


def test_repo_that_is_no_whisper(server: Hub, cache: Path) -> None:
    server.files["config.json"] = b'{"model_type": "bert"}'
    assert "model_type is 'bert', expected 'whisper'" in refusal(cache)


@pytest.mark.parametrize("spec", ["tiny.en", REPO])
def test_offline_never_asks(server: Hub, cache: Path, spec: str) -> None:
    sentence = refusal(cache, spec, offline=True)
    assert "the Hugging Face cache holds no config.json" in sentence
    assert "--model demo" in sentence
    assert server.requests == []


def test_offline_with_half_a_snapshot(server: Hub, cache: Path) -> None:
    path = weights.load(REPO, cache_dir=cache).source.path
    asked = len(server.requests)
    path.unlink()
    assert "the Hugging Face cache holds no model.safetensors" in refusal(cache, offline=True)
    assert len(server.requests) == asked


def test_hub_offline_by_its_own_variable(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be downloaded" in refusal(cache)
    assert server.requests == []


# --- the command line --------------------------------------------------------------------------


def test_export_records_where_it_came_from(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, with the cache and the endpoint where the environment says."""
    output = tmp_path / "out.safetensors"
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = [sys.executable, "-m", "weights", "export", REPO, "-o", str(output)]
    done = subprocess.run(
        run,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(weights.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (tmp_path / "hub" / "models--someone--whisper-small-fine-tuned").is_dir()
    with safe_open(output, "pt") as file:
        said = file.metadata()
    assert (said["source"], said["revision"]) == (REPO, COMMIT)
    assert said["sha256"] == hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    assert_same(weights.load(str(output)).tensors, random_tensors(TINY))


def test_cli_without_a_network(
    dead: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert main(["show", REPO]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("weights: config.json of ")
