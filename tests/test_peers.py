"""The peers get the same weights: what is written for them is read back, and what they compute is
held against stock openai-whisper."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from small import N_AUDIO_CTX, small_checkpoint
from whisper.audio import mel_filters
from whisper.model import ModelDimensions
from whisper.tokenizer import get_tokenizer

from encoder.audio import load_audio
from encoder.truth import word_errors
from validation.benchmark_systems import LIMITS
from validation.metrics import relative_l2
from validation.peers import PEERS, Peer, PeerError
from validation.peers.ggml import FILE, SIZES, write_ggml
from validation.peers.vocabulary import (
    byte_alphabet,
    encoding_of,
    is_multilingual,
    merges,
    plain_tokens,
    special_tokens,
)
from validation.reference import float64_encoder, run_float64
from weights import Checkpoint, Source, WeightsError, expected_shapes

ENGLISH = ModelDimensions(80, 20, 64, 1, 1, 51864, 448, 64, 1, 1)
MULTILINGUAL = replace(ENGLISH, n_vocab=51865)
ENCODES = [name for name, peer in PEERS.items() if peer.encodes]
TEXTS = ["Hello, world's end.", " naïve café — 12,345 ♪♪", "\n\n  a\tb", "日本語 and более"]


def random_checkpoint(dims: ModelDimensions = ENGLISH) -> Checkpoint:
    """A whole small model, every value a float16."""
    generator = torch.Generator().manual_seed(3)
    shapes = expected_shapes(dims, decoder=True)
    tensors = {name: torch.randn(s, generator=generator).half() / 8 for name, s in shapes.items()}
    return Checkpoint(dims, tensors, Source("small", None, "0" * 64, Path("small")), None)


def need(peer: Peer) -> Peer:
    """Skips the test where the peer cannot run."""
    if reason := peer.cannot_run():
        pytest.skip(reason)
    return peer


# ---------------------------------------------------------------- the list


def test_each_peer_is_listed_with_what_it_gives():
    assert all(peer.encodes or peer.transcribes for peer in PEERS.values())
    assert {peer.precision for peer in PEERS.values()} <= set(LIMITS)
    assert all(name == peer.name for name, peer in PEERS.items())


def test_a_package_that_is_not_there_is_one_sentence():
    peer = replace(PEERS["openvino"], packages={"no-such-package": "no_such_module"})
    assert peer.cannot_run() == (
        "no-such-package is not installed: pip install 'max-whisper[peers]'"
    )


def test_whisper_cpp_takes_two_decoder_layers_for_a_distilled_model():
    peer = PEERS["pywhispercpp"]
    assert peer.remark(ENGLISH) is None
    assert "without timestamps" in (peer.remark(replace(ENGLISH, n_text_layer=2)) or "")


def test_peers_of_one_format_share_their_files(tmp_path: Path):
    written = []

    def convert(checkpoint: Checkpoint, folder: Path) -> None:
        written.append(folder)
        (folder / "a").write_text("1")

    first = replace(PEERS["openvino"], convert=convert)
    second = replace(PEERS["onnxruntime"], convert=convert)
    assert first.converted(small_checkpoint(), tmp_path) == second.converted(
        small_checkpoint(), tmp_path
    )
    assert len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path):
    def convert(checkpoint: Checkpoint, folder: Path) -> None:
        (folder / "half").write_text("1")
        raise PeerError("no")

    with pytest.raises(PeerError, match="no"):
        replace(PEERS["openvino"], convert=convert).converted(small_checkpoint(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- tokens


def test_the_byte_alphabet_has_a_letter_of_its_own_for_each_byte():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert alphabet[ord(" ")] == "Ġ"
    assert alphabet[ord("a")] == "a"


@pytest.mark.parametrize("dims", [ENGLISH, MULTILINGUAL], ids=["en", "multilingual"])
def test_all_tokens_are_there_in_order(dims: ModelDimensions):
    encoding = encoding_of(dims)
    plain, special = plain_tokens(encoding), special_tokens(encoding)
    assert len(plain) + len(special) == dims.n_vocab
    assert special[0] == "<|endoftext|>"
    assert special[-1] == "<|30.00|>"
    assert [a + b for a, b in merges(plain)] == [token for token in plain if len(token) > 1]


@pytest.mark.parametrize("n_vocab", [0, 1000, 51765, 52000])
def test_another_vocabulary_is_refused(n_vocab: int):
    with pytest.raises(PeerError, match=f"a vocabulary of {n_vocab} tokens is none of Whisper's"):
        encoding_of(replace(ENGLISH, n_vocab=n_vocab))


@pytest.mark.parametrize("dims", [ENGLISH, MULTILINGUAL], ids=["en", "multilingual"])
def test_the_tokenizer_of_faster_whisper_is_openais(dims: ModelDimensions):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: extra peers")
    from validation.peers.ctranslate2_model import fast_tokenizer

    ours, stock = fast_tokenizer(dims), get_tokenizer(is_multilingual(dims))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == stock.encode(text)
        assert ours.decode(ids) == text
    for token, i in stock.special_tokens.items():
        assert ours.token_to_id(token) == i


# ---------------------------------------------------------------- whisper.cpp's file


def read_ggml(path: Path) -> dict:
    """The file as whisper.cpp's loader goes through it."""
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(data)
        return data[at - count : at]

    def integers(count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", take(4 * count))

    (magic,) = integers(1)
    sizes = dict(zip(SIZES, integers(len(SIZES)), strict=True))
    kind, n_mel, n_fft = integers(3)
    filters = np.frombuffer(take(4 * n_mel * n_fft), "<f4").reshape(n_mel, n_fft)
    tokens = [take(integers(1)[0]) for _ in range(integers(1)[0])]
    tensors = {}
    while at < len(data):
        n_dims, length, half = integers(3)
        shape = integers(n_dims)[::-1]
        name = take(length).decode()
        dtype = np.dtype("<f2" if half else "<f4")
        count = int(np.prod(shape)) * dtype.itemsize
        tensors[name] = np.frombuffer(take(count), dtype).reshape(shape)
    return {
        "magic": magic,
        "sizes": sizes,
        "kind": kind,
        "filters": filters,
        "tokens": tokens,
        "tensors": tensors,
    }


def test_the_ggml_file_is_read_back(tmp_path: Path):
    checkpoint = random_checkpoint()
    write_ggml(checkpoint, tmp_path / FILE)
    found = read_ggml(tmp_path / FILE)
    assert found["magic"] == int.from_bytes(b"ggml", "big")
    assert found["sizes"] == {name: getattr(ENGLISH, name) for name in SIZES}
    assert found["kind"] == 1
    assert np.array_equal(found["filters"], mel_filters("cpu", 80).numpy())
    assert found["tokens"] == plain_tokens(encoding_of(ENGLISH))
    assert found["tensors"].keys() == checkpoint.tensors.keys()
    for name, x in found["tensors"].items():
        expected = checkpoint.tensors[name].float().numpy()
        assert np.array_equal(x.reshape(expected.shape).astype(np.float32), expected), name
        matrix = expected.ndim > 1 and "positional" not in name
        assert x.dtype == (np.float16 if matrix else np.float32), name
    assert found["tensors"]["encoder.conv1.bias"].shape == (64, 1)


def test_a_value_beyond_float16_is_refused(tmp_path: Path):
    checkpoint = random_checkpoint()
    tensors = {name: t.float() for name, t in checkpoint.tensors.items()}
    tensors["encoder.blocks.0.mlp.0.weight"][0, 0] = 1e6
    with pytest.raises(PeerError, match=r"^encoder\.blocks\.0\.mlp\.0\.weight has values"):
        write_ggml(replace(checkpoint, tensors=tensors), tmp_path / FILE)


def test_an_encoder_alone_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="the encoder alone"):
        write_ggml(small_checkpoint(), tmp_path / FILE)


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bfloat16"])
def test_the_onnx_encoder_is_the_stock_one(name: str, tmp_path: Path):
    peer = need(PEERS[name])
    checkpoint = small_checkpoint()
    mel = torch.randn((3, 80, 2 * N_AUDIO_CTX), generator=torch.Generator().manual_seed(5))
    model = peer.load(peer.converted(checkpoint, tmp_path), 1)
    expected = run_float64(float64_encoder(checkpoint), mel)
    features = torch.from_numpy(model.encoder(mel.numpy()))
    assert features.dtype == torch.float32
    limit = 1e-5 if peer.precision == "float32" else LIMITS[peer.precision]
    assert relative_l2(features, expected) < limit
    one = torch.from_numpy(model.encoder(mel[1:2].numpy()))
    assert relative_l2(one, expected[1:2]) < limit


def test_query_and_key_that_are_swapped_are_seen(tmp_path: Path):
    """By the limit that a float32 peer is held to before it is timed."""
    peer = need(PEERS["onnxruntime"])
    checkpoint = small_checkpoint()
    swapped = dict(checkpoint.tensors)
    a, b = "encoder.blocks.0.attn.query.weight", "encoder.blocks.0.attn.key.weight"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    model = peer.load(peer.converted(replace(checkpoint, tensors=swapped), tmp_path), 1)
    mel = torch.randn((1, 80, 2 * N_AUDIO_CTX), generator=torch.Generator().manual_seed(5))
    expected = run_float64(float64_encoder(checkpoint), mel)
    found = relative_l2(torch.from_numpy(model.encoder(mel.numpy())), expected)
    assert found > LIMITS["float32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def stock_text(demo) -> dict:
    audio = load_audio(SAMPLES / "demo.flac")
    return demo.stock.transcribe(audio, language="en", temperature=0.0, fp16=False)


@pytest.mark.parametrize("name", [name for name in ENCODES if PEERS[name].transcribes])
def test_faster_whisper_has_the_stock_features_and_text(
    name, demo, demo_checkpoint, files, stock_text
):
    peer = need(PEERS[name])
    model = peer.load(peer.converted(demo_checkpoint, files), 1)
    mel = torch.randn((2, 80, 3000), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = demo.stock.encoder(mel)
    features = torch.from_numpy(model.encoder(mel.numpy()))
    assert relative_l2(features, expected) < LIMITS[peer.precision]
    heard = model.transcribe(load_audio(SAMPLES / "demo.flac"), "en")
    assert stock_text["text"].split()
    errors = word_errors(stock_text["text"], heard.text, "en")
    assert errors.rate == 0 if peer.precision == "float32" else errors.rate < 0.5
    if peer.precision == "float32":
        assert heard.tokens == [t for s in stock_text["segments"] for t in s["tokens"]]


def test_whisper_cpp_has_the_stock_text(demo_checkpoint, files, stock_text):
    peer = need(PEERS["pywhispercpp"])
    model = peer.load(peer.converted(demo_checkpoint, files), 1)
    heard = model.transcribe(load_audio(SAMPLES / "demo.flac"), "en")
    assert word_errors(stock_text["text"], heard.text, "en").rate < 0.5
    assert heard.tokens


def test_the_configuration_for_ctranslate2(tmp_path: Path):
    peer = need(PEERS["faster-whisper"])
    folder = peer.converted(random_checkpoint(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = get_tokenizer(False)
    assert config["suppress_ids_begin"] == [*tokenizer.encode(" "), tokenizer.eot]
    assert set(tokenizer.non_speech_tokens) < set(config["suppress_ids"])
    assert config["alignment_heads"] == [[0, 0]]
    words = json.loads((folder / "vocabulary.json").read_text())
    assert len(words) == ENGLISH.n_vocab
    assert words[tokenizer.sot] == "<|startoftranscript|>"
