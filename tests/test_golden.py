"""A golden file gives back what was saved, bit for bit, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, first_window
from safetensors.torch import load_file, save_file
from small import small_checkpoint, small_mel

from validation import golden
from validation.golden import (
    FORMAT,
    KEY,
    Golden,
    GoldenError,
    Goldens,
    encoder_sha256,
    goldens_of,
    load,
    save,
)
from validation.reference import Reference, floor, own_floor
from validation.stages import stages
from weights import Checkpoint


def window_of(reference: Reference, mel: torch.Tensor, file: str, window: int) -> Golden:
    taps = reference.taps(mel)
    return Golden(
        mel=mel,
        taps=taps,
        floor=floor(taps, reference.exact(mel)),
        own_floor=own_floor(taps, reference.tensors, reference.dims),
        file=file,
        window=window,
        audio_sha256=f"{window:064x}",
    )


@pytest.fixture(scope="module")
def small() -> Goldens:
    """Two windows of a random encoder."""
    checkpoint = small_checkpoint()
    reference = Reference(checkpoint)
    windows = [window_of(reference, small_mel(i), "speech.flac", i) for i in range(2)]
    return goldens_of(checkpoint, windows)


@pytest.fixture
def file(small: Goldens, tmp_path: Path) -> Path:
    path = tmp_path / "golden.safetensors"
    save(path, small)
    return path


def assert_same(found: Goldens, expected: Goldens) -> None:
    assert replace(found, windows=[]) == replace(expected, windows=[])
    assert len(found.windows) == len(expected.windows)
    for a, b in zip(found.windows, expected.windows, strict=True):
        assert torch.equal(a.mel, b.mel)
        assert list(a.taps) == list(b.taps)
        for name in a.taps:
            assert torch.equal(a.taps[name], b.taps[name]), name
            assert a.taps[name].dtype == torch.float32
        assert list(a.floor.items()) == list(b.floor.items())
        assert list(a.own_floor.items()) == list(b.own_floor.items())
        assert (a.file, a.window, a.audio_sha256) == (b.file, b.window, b.audio_sha256)
        assert a.mel_sha256 == b.mel_sha256


def test_round_trip(small: Goldens, file: Path):
    assert_same(load(file), small)
    assert_same(load(str(file), small_checkpoint()), small)


def test_what_is_known_about_the_reference(small: Goldens):
    assert small.model == "small-1.safetensors"
    assert small.weights_sha256 == small_checkpoint().source.sha256
    assert small.versions.keys() == {"torch", "numpy", "openai-whisper", "safetensors"}
    assert small.windows[0].mel_sha256 != small.windows[1].mel_sha256
    assert len(small.windows[0].taps) == len(stages(small.dims))


def test_a_golden_of_demo(demo_checkpoint: Checkpoint, tmp_path: Path):
    """Real sizes; the file is as large as the module says, and saving leaves nothing beside it."""
    reference, mel = Reference(demo_checkpoint), first_window(SAMPLES / "demo.flac")
    taps = reference.taps(mel)
    ones = dict.fromkeys(taps, 1e-6)
    goldens = goldens_of(demo_checkpoint, [Golden(mel, taps, ones, ones, "demo.flac")])
    path = tmp_path / "golden.safetensors"
    save(path, goldens)
    assert path.stat().st_size == pytest.approx(185.3e6, rel=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["golden.safetensors"]
    assert_same(load(path, demo_checkpoint), goldens)


def test_fewer_taps(small: Goldens, tmp_path: Path):
    path, whole = tmp_path / "few", tmp_path / "all"
    save(path, small, taps=["ln_post", "blocks.0"])
    save(whole, small)
    found = load(path).windows[1]
    assert list(found.taps) == ["mel", "blocks.0", "ln_post"]
    assert torch.equal(found.taps["blocks.0"], small.windows[1].taps["blocks.0"])
    assert torch.equal(found.mel, small.windows[1].mel)
    assert found.floor == small.windows[1].floor
    assert path.stat().st_size < whole.stat().st_size / 5


def test_a_tap_that_is_not_there_cannot_be_kept(small: Goldens, tmp_path: Path):
    with pytest.raises(GoldenError, match=r"no tap blocks\.7, conv3, so"):
        save(tmp_path / "golden", small, taps=["conv3", "ln_post", "blocks.7"])
    assert not list(tmp_path.iterdir())


def test_what_is_no_golden_is_refused(small: Goldens, tmp_path: Path):
    window = small.windows[0]
    other = replace(window, taps={**window.taps, "mel": window.mel + 1})
    with pytest.raises(ValueError, match="window 0: the tap mel is not the window's mel"):
        save(tmp_path / "golden", replace(small, windows=[other]))
    double = replace(window, taps={**window.taps, "conv1": window.taps["conv1"].double()})
    with pytest.raises(ValueError, match=r"conv1 is torch\.float64, expected torch\.float32"):
        save(tmp_path / "golden", replace(small, windows=[double]))
    nan = replace(window, floor={**window.floor, "conv1": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "golden", replace(small, windows=[nan]))
    assert not list(tmp_path.iterdir())


def test_a_transposed_tap_is_kept_as_it_reads(small: Goldens, tmp_path: Path):
    """The values in row order, whatever the memory was."""
    window = small.windows[0]
    turned = window.taps["conv1"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    save(tmp_path / "a", replace(small, windows=[window]))
    save(
        tmp_path / "b",
        replace(small, windows=[replace(window, taps={**window.taps, "conv1": turned})]),
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Which encoder


def test_another_encoder_is_refused(file: Path):
    expected = r"reference of small-1\.safetensors, .* and small-2\.safetensors has .* --model"
    with pytest.raises(GoldenError, match=expected):
        load(file, small_checkpoint(2))


def test_one_element_makes_another_encoder(file: Path):
    checkpoint = small_checkpoint()
    name = "encoder.blocks.1.mlp.2.bias"
    other = checkpoint.tensors[name].clone()
    other[3] += 1e-6
    with pytest.raises(GoldenError, match="SHA-256"):
        load(file, replace(checkpoint, tensors={**checkpoint.tensors, name: other}))


def test_the_encoder_is_known_whatever_file_it_is_in():
    """Alone or with a decoder, in float16 or in float32 with the same values, in any order."""
    checkpoint = small_checkpoint()
    with_decoder = replace(
        checkpoint, tensors={"decoder.ln.bias": torch.zeros(128), **checkpoint.tensors}
    )
    tensors = checkpoint.encoder_tensors()
    half = {name: t.half() for name, t in tensors.items()}
    known = encoder_sha256(tensors)
    assert encoder_sha256(with_decoder.encoder_tensors()) == known
    assert encoder_sha256(dict(reversed(tensors.items()))) == known
    assert encoder_sha256({n: t.float() for n, t in half.items()}) == encoder_sha256(half) != known
    renamed = {n.replace("attn.query", "attn.k"): t for n, t in tensors.items()}
    assert encoder_sha256(renamed) != known
    reshaped = {n: t.T if n == "positional_embedding" else t for n, t in tensors.items()}
    assert encoder_sha256(reshaped) != known


# Damage


def flip(offset: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        at = offset % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return damage


def in_the_floor(data: bytes) -> bytes:
    """One digit of a noise floor, in the description: the JSON stays JSON."""
    start = data.index(b'\\"floor\\"')
    at = next(i for i in range(start, len(data)) if chr(data[i]) in "12345678")
    return data[:at] + bytes([data[at] + 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip(-1),
        flip(-100_000),
        in_the_floor,
        lambda data: data.replace(b"speech.flac", b"quiet.flac ", 1),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: b"RIFF" + data[4:],
        flip(9),
    ],
    ids=["last bit", "a bit", "floor", "name", "a byte short", "half", "4 bytes", "empty", "longer",
         "another file", "header"],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(file: Path, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(GoldenError, match=r"golden\.safetensors is damaged") as caught:
        load(file)
    assert "\n" not in str(caught.value)


def change(file: Path, edit: Callable[[dict], None]) -> None:
    """Edit the description, with a content hash that fits again."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    edit(description)
    tensors = load_file(file)
    description["content_sha256"] = golden._content_sha256(description, tensors)
    save_file(tensors, file, metadata={KEY: json.dumps(description)})


def test_another_format_is_refused(file: Path, small: Goldens):
    change(file, lambda d: d.update(model="the same but for the name"))
    assert load(file).model == "the same but for the name"
    change(file, lambda d: d.update(format=FORMAT + 1))
    expected = r"is a golden of format 2, this version reads format 1; make it again"
    with pytest.raises(GoldenError, match=expected):
        load(file)


def test_a_description_that_lacks_something_is_refused(file: Path):
    change(file, lambda d: d["windows"][1].pop("floor"))
    with pytest.raises(GoldenError, match=r"lacks 'floor'"):
        load(file)


def test_a_tap_that_is_stated_and_not_there_is_refused(file: Path):
    change(file, lambda d: d["windows"][1]["taps"].append("blocks.5"))
    with pytest.raises(GoldenError, match=r"lacks '1/blocks\.5'"):
        load(file)


def test_other_safetensors_are_no_golden(tmp_path: Path):
    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(GoldenError, match=r"weights\.safetensors is no golden"):
        load(tmp_path / "weights.safetensors")


def test_a_file_that_is_not_there(tmp_path: Path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(GoldenError, match="cannot be read: there is no such file"):
            load(path)


# Writing


def test_a_folder_that_is_not_there(small: Goldens, tmp_path: Path):
    with pytest.raises(GoldenError, match=r"none/golden cannot be written: No such file"):
        save(tmp_path / "none" / "golden", small)


def test_what_fails_half_way_leaves_the_old_file(small: Goldens, file: Path, monkeypatch):
    before = file.read_bytes()

    def fail(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(golden, "save_file", fail)
    with pytest.raises(GoldenError, match=r"cannot be written: No space left on device$"):
        save(file, small)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_the_file_may_be_read_by_others(file: Path):
    """It has the rights of any new file, not those of a temporary one."""
    other = file.with_name("other")
    other.touch()
    assert os.stat(file).st_mode == os.stat(other).st_mode
