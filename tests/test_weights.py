"""weights: every published form becomes the same tensors, and every damaged one a sentence.

All but the last tests use a random Whisper of 64 numbers a token, so nothing is downloaded.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import whisper
from conftest import shared
from safetensors import safe_open
from safetensors.torch import save_file
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder, Whisper

import weights
from weights import WeightsError, compact, expected_shapes, export, files, names
from weights.__main__ import main

TINY = ModelDimensions(
    n_mels=80,
    n_audio_ctx=20,
    n_audio_state=64,
    n_audio_head=1,
    n_audio_layer=2,
    n_vocab=120,
    n_text_ctx=16,
    n_text_state=64,
    n_text_head=1,
    n_text_layer=1,
)
WIDE = replace(TINY, n_mels=128, n_audio_state=128, n_text_state=128, n_audio_head=2, n_text_head=4)

# OpenAI's name, and transformers' without its "model.". Written by hand from the two model files,
# not with the rules of weights/names.py; `#` stands for the number of a layer.
IN_ENCODER = """
conv1.weight                       conv1.weight
conv1.bias                         conv1.bias
conv2.weight                       conv2.weight
conv2.bias                         conv2.bias
positional_embedding               embed_positions.weight
ln_post.weight                     layer_norm.weight
ln_post.bias                       layer_norm.bias
"""
IN_DECODER = """
token_embedding.weight             embed_tokens.weight
positional_embedding               embed_positions.weight
ln.weight                          layer_norm.weight
ln.bias                            layer_norm.bias
"""
IN_BLOCK = """
blocks.#.attn.query.weight         layers.#.self_attn.q_proj.weight
blocks.#.attn.query.bias           layers.#.self_attn.q_proj.bias
blocks.#.attn.key.weight           layers.#.self_attn.k_proj.weight
blocks.#.attn.value.weight         layers.#.self_attn.v_proj.weight
blocks.#.attn.value.bias           layers.#.self_attn.v_proj.bias
blocks.#.attn.out.weight           layers.#.self_attn.out_proj.weight
blocks.#.attn.out.bias             layers.#.self_attn.out_proj.bias
blocks.#.attn_ln.weight            layers.#.self_attn_layer_norm.weight
blocks.#.attn_ln.bias              layers.#.self_attn_layer_norm.bias
blocks.#.mlp.0.weight              layers.#.fc1.weight
blocks.#.mlp.0.bias                layers.#.fc1.bias
blocks.#.mlp.2.weight              layers.#.fc2.weight
blocks.#.mlp.2.bias                layers.#.fc2.bias
blocks.#.mlp_ln.weight             layers.#.final_layer_norm.weight
blocks.#.mlp_ln.bias               layers.#.final_layer_norm.bias
"""
IN_CROSS = """
blocks.#.cross_attn.query.weight   layers.#.encoder_attn.q_proj.weight
blocks.#.cross_attn.query.bias     layers.#.encoder_attn.q_proj.bias
blocks.#.cross_attn.key.weight     layers.#.encoder_attn.k_proj.weight
blocks.#.cross_attn.value.weight   layers.#.encoder_attn.v_proj.weight
blocks.#.cross_attn.value.bias     layers.#.encoder_attn.v_proj.bias
blocks.#.cross_attn.out.weight     layers.#.encoder_attn.out_proj.weight
blocks.#.cross_attn.out.bias       layers.#.encoder_attn.out_proj.bias
blocks.#.cross_attn_ln.weight      layers.#.encoder_attn_layer_norm.weight
blocks.#.cross_attn_ln.bias        layers.#.encoder_attn_layer_norm.bias
"""


def hugging_face_names(dims: ModelDimensions) -> dict[str, str]:
    """OpenAI's name -> transformers', for every tensor, from the lists above."""
    pairs = {}
    for side, outside, inside, layers in (
        ("encoder", IN_ENCODER, IN_BLOCK, dims.n_audio_layer),
        ("decoder", IN_DECODER, IN_BLOCK + IN_CROSS, dims.n_text_layer),
    ):
        lines = outside + "".join(inside.replace("#", str(layer)) for layer in range(layers))
        for line in filter(None, lines.splitlines()):
            ours, theirs = line.split()
            pairs[f"{side}.{ours}"] = f"{side}.{theirs}"
    return pairs


def stock_state(dims: ModelDimensions) -> dict[str, torch.Tensor]:
    """Names and shapes as openai-whisper itself builds them, without memory behind them. The whole
    `Whisper` cannot be built so: it holds a sparse mask."""
    with torch.device("meta"):
        encoder = AudioEncoder(
            dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer
        )
        decoder = TextDecoder(
            dims.n_vocab, dims.n_text_ctx, dims.n_text_state, dims.n_text_head, dims.n_text_layer
        )
    return {
        **{f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()},
        **{f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
    }


def random_tensors(dims: ModelDimensions, seed: int = 0) -> dict[str, torch.Tensor]:
    """A Whisper of noise, in half precision as it is published."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=random).half()
        for name, tensor in stock_state(dims).items()
    }


def config_json(dims: ModelDimensions) -> dict[str, object]:
    return {
        "model_type": "whisper",
        "num_mel_bins": dims.n_mels,
        "max_source_positions": dims.n_audio_ctx,
        "d_model": dims.n_audio_state,
        "encoder_attention_heads": dims.n_audio_head,
        "encoder_layers": dims.n_audio_layer,
        "vocab_size": dims.n_vocab,
        "max_target_positions": dims.n_text_ctx,
        "decoder_attention_heads": dims.n_text_head,
        "decoder_layers": dims.n_text_layer,
        "encoder_ffn_dim": 4 * dims.n_audio_state,
        "decoder_ffn_dim": 4 * dims.n_text_state,
        "activation_function": "gelu",
        "scale_embedding": False,
    }


def metadata(dims: ModelDimensions, **more: str) -> dict[str, str]:
    return {"format": "pt", "dims": json.dumps(asdict(dims)), **more}


def to_hugging_face(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    pairs = hugging_face_names(TINY)
    return {prefix + pairs[name]: tensor for name, tensor in tensors.items()}


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Three files with an index, as transformers shards a large checkpoint."""
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[i::3])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


def refusal(path: Path | str, **options: bool) -> str:
    """The sentence with which `load` refuses `path`."""
    with pytest.raises(WeightsError) as caught:
        weights.load(str(path), **options)
    sentence = str(caught.value)
    assert sentence.startswith("weights: ")
    assert "\n" not in sentence
    return sentence


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(TINY)


@pytest.fixture
def openai_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    save_file(tensors, path, metadata(TINY))
    return path


# --- the table ---------------------------------------------------------------------------------


LARGE_V3_TURBO = ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 4)
TINY_EN = ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)


@pytest.mark.parametrize(
    "dims",
    [TINY, WIDE, TINY_EN, LARGE_V3_TURBO],
    ids=lambda dims: (
        f"{dims.n_audio_state} wide, {dims.n_audio_layer} + {dims.n_text_layer} blocks"
    ),
)
def test_table_is_the_state_of_openais_whisper(dims: ModelDimensions) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in stock_state(dims).items()}
    assert expected_shapes(dims) == expected
    encoder = {name: shape for name, shape in expected.items() if name.startswith("encoder.")}
    assert expected_shapes(dims, decoder=False) == encoder


def test_every_hugging_face_name_is_mapped() -> None:
    pairs = hugging_face_names(TINY)
    assert pairs.keys() == expected_shapes(TINY).keys()
    for ours, theirs in pairs.items():
        assert names.from_hugging_face(theirs) == ours
        assert names.from_hugging_face("model." + theirs) == ours


@pytest.mark.parametrize(
    "name",
    [
        "proj_out.weight",
        "encoder.layers.0.self_attn.qkv_proj.weight",
        "encoder.layers.01.fc1.weight",
        "encoder.layers.0.fc1",
        "encoder.embed_positions.weight.weight.bias",
        "decoder.layers.0.fc1.weight.bias",
        "lm_head.weight",
    ],
)
def test_no_other_hugging_face_name_is_mapped(name: str) -> None:
    assert names.from_hugging_face(name) is None


# --- the forms ---------------------------------------------------------------------------------


def test_openai_names(openai_file: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = weights.load(str(openai_file))
    assert checkpoint.dims == TINY
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.alignment_heads is None
    assert checkpoint.has_decoder
    checkpoint.require_decoder()
    assert checkpoint.source.name == str(openai_file)
    assert checkpoint.source.revision is None
    assert checkpoint.source.path == openai_file
    sum_ = subprocess.run(["sha256sum", openai_file], capture_output=True, text=True, check=True)
    assert checkpoint.source.sha256 == sum_.stdout.split()[0]


@pytest.mark.parametrize("said", [True, False], ids=["dims stated", "dims from shapes"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_hugging_face_file(
    tmp_path: Path, tensors: dict[str, torch.Tensor], prefix: str, said: bool
) -> None:
    path = tmp_path / "fine-tuned.safetensors"
    save_file(to_hugging_face(tensors, prefix), path, metadata(TINY) if said else {})
    checkpoint = weights.load(str(path))
    assert checkpoint.dims == TINY
    assert_same(checkpoint.tensors, tensors)


def test_hugging_face_folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Four heads of 16: only config.json can tell, the shapes would imply one of 64.
    dims = replace(TINY, n_audio_head=4, n_text_head=4)
    save_file(to_hugging_face(tensors, "model."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(dims)))
    for spec in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = weights.load(str(spec))
        assert checkpoint.dims == dims
        assert_same(checkpoint.tensors, tensors)


def test_folder_of_openai_names(openai_file: Path, tensors: dict[str, torch.Tensor]) -> None:
    openai_file.rename(openai_file.with_name("model.safetensors"))
    assert_same(weights.load(str(openai_file.parent)).tensors, tensors)


def test_openai_names_take_no_notice_of_a_config_beside_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    assert weights.load(str(tmp_path / "a.safetensors")).dims == TINY


def test_sharded_folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    index = save_shards(tmp_path, to_hugging_face(tensors, "model."))
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    for spec in (tmp_path, index):
        checkpoint = weights.load(str(spec))
        assert_same(checkpoint.tensors, tensors)
        assert checkpoint.source.path == index
    whole = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors")))
    joined = tmp_path / "joined"
    joined.write_bytes(whole)
    assert checkpoint.source.sha256 == files.sha256([joined])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_openai_pt(tmp_path: Path, tensors: dict[str, torch.Tensor], zipped: bool) -> None:
    path = tmp_path / "tiny.pt"
    torch.save(
        {"dims": asdict(TINY), "model_state_dict": tensors},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    checkpoint = weights.load(str(path))
    assert checkpoint.dims == TINY
    assert_same(checkpoint.tensors, tensors)


def test_pt_with_shared_and_transposed_tensors_can_be_exported(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """torch.save keeps strides and shared memory; safetensors has neither."""
    state = dict(tensors)
    state["encoder.ln_post.weight"] = state["encoder.conv1.bias"]
    query = "encoder.blocks.0.attn.query.weight"
    state[query] = state[query].T.contiguous().T
    assert not state[query].is_contiguous()
    path = tmp_path / "tied.pt"
    torch.save({"dims": asdict(TINY), "model_state_dict": state}, path)
    checkpoint = weights.load(str(path))
    export.export(checkpoint, tmp_path / "out.safetensors")
    assert_same(weights.load(str(tmp_path / "out.safetensors")).tensors, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_published_dtype_is_kept(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(cast, tmp_path / "a.safetensors", metadata(TINY))
    assert_same(weights.load(str(tmp_path / "a.safetensors")).tensors, cast)


def test_state_fits_openais_whisper(openai_file: Path) -> None:
    checkpoint = weights.load(str(openai_file))
    model = Whisper(checkpoint.dims)
    model.load_state_dict(checkpoint.tensors)
    encoder = checkpoint.encoder_tensors()
    assert encoder.keys() == model.encoder.state_dict().keys()
    assert torch.equal(encoder["conv1.weight"], checkpoint.tensors["encoder.conv1.weight"])


# --- the encoder alone -------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False], ids=["dims stated", "dims from shapes"])
def test_encoder_file(tmp_path: Path, tensors: dict[str, torch.Tensor], said: bool) -> None:
    encoder = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    path = tmp_path / "encoder.safetensors"
    save_file(encoder, path, metadata(TINY) if said else {})
    checkpoint = weights.load(str(path))
    no_text = dict.fromkeys(("n_vocab", "n_text_ctx", "n_text_state", "n_text_head"), 0)
    assert checkpoint.dims == (TINY if said else replace(TINY, **no_text, n_text_layer=0))
    assert_same(checkpoint.tensors, encoder)
    assert not checkpoint.has_decoder
    with pytest.raises(WeightsError, match="holds the encoder alone"):
        checkpoint.require_decoder()


def test_encoder_only_leaves_the_decoder_unread(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    damaged = dict(tensors)
    damaged["decoder.ln.bias"] = torch.full((64,), torch.nan).half()
    path = tmp_path / "a.safetensors"
    save_file(damaged, path, metadata(TINY))
    assert "decoder.ln.bias holds NaN" in refusal(path)
    checkpoint = weights.load(str(path), encoder_only=True)
    assert set(checkpoint.tensors) == set(expected_shapes(TINY, decoder=False))
    assert checkpoint.dims == TINY
    assert not checkpoint.has_decoder


def test_encoder_names_without_their_prefix(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    bare = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    save_file(bare, tmp_path / "a.safetensors", metadata(TINY))
    assert "no 'encoder.' before them" in refusal(tmp_path / "a.safetensors")


# --- wrong tensors -----------------------------------------------------------------------------

KEY = "encoder.blocks.1.attn.key.weight"


def damaged_file(tmp_path: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    """The file with tensors replaced, or taken out (None); `__` in a keyword stands for a dot."""
    state = dict(tensors)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            assert isinstance(tensor, torch.Tensor)
            state[name] = tensor
    path = tmp_path / "checkpoint.safetensors"
    save_file(state, path, metadata(TINY))
    return path


def test_wrong_shape(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = damaged_file(tmp_path, tensors, **{KEY: torch.zeros(64, 80)})
    assert refusal(path) == (
        f"weights: {KEY} has shape (64, 80), expected (64, 64) (checkpoint.safetensors)"
    )


def test_missing_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = damaged_file(tmp_path, tensors, **{KEY: None})
    assert refusal(path) == (
        f"weights: {KEY} is missing, expected shape (64, 64) (checkpoint.safetensors)"
    )


def test_unknown_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = damaged_file(tmp_path, tensors, encoder__blocks__0__attn__key__bias=torch.zeros(64))
    assert refusal(path) == (
        "weights: encoder.blocks.0.attn.key.bias is unknown, expected no such tensor "
        "(checkpoint.safetensors)"
    )


def test_perturbed_key(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One letter off in one name: the stranger and the gap are both named."""
    stranger = KEY.replace("key", "kay")
    path = damaged_file(tmp_path, tensors, **{KEY: None, stranger: tensors[KEY]})
    sentence = refusal(path)
    assert "2 problems (checkpoint.safetensors)" in sentence
    assert f"{stranger} is unknown" in sentence
    assert f"{KEY} is missing" in sentence


def test_hugging_face_tensor_is_named_both_ways(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    state = to_hugging_face(tensors, "model.")
    theirs = "model.encoder.layers.1.self_attn.k_proj.weight"
    state[theirs] = torch.zeros(64, 80)
    save_file(state, tmp_path / "a.safetensors", metadata(TINY))
    assert f"{KEY} (stored as {theirs}) has shape (64, 80)" in refusal(tmp_path / "a.safetensors")


def test_names_of_both_conventions(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    state = dict(tensors)
    state["encoder.layers.1.self_attn.k_proj.weight"] = state.pop(KEY)
    save_file(state, tmp_path / "a.safetensors", metadata(TINY))
    sentence = refusal(tmp_path / "a.safetensors")
    assert "is unknown" in sentence
    assert "more" in sentence


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_numbers_that_are_not_floating(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    path = damaged_file(tmp_path, tensors, **{KEY: torch.zeros(64, 64, dtype=dtype)})
    assert f"{KEY} has dtype " in refusal(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite(
    tmp_path: Path, tensors: dict[str, torch.Tensor], value: float
) -> None:
    key = tensors[KEY].clone()
    key[3, 5] = value
    path = damaged_file(tmp_path, tensors, **{KEY: key})
    assert refusal(path) == (
        f"weights: {KEY} holds NaN or Inf in 1 of 4096 places, expected finite numbers "
        "(checkpoint.safetensors)"
    )


def test_decoder_in_part(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    state = {name: t for name, t in tensors.items() if not name.startswith("decoder.blocks.")}
    save_file(state, tmp_path / "a.safetensors", metadata(TINY))
    sentence = refusal(tmp_path / "a.safetensors")
    assert "24 problems" in sentence
    assert sentence.count("is missing") == 5
    assert "and 19 more" in sentence
    assert "whole or absent" in sentence


def test_metadata_and_shapes_disagree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata(replace(TINY, n_mels=128)))
    assert "encoder.conv1.weight has shape (64, 80, 3), expected (64, 128, 3)" in refusal(path)


def test_config_and_shapes_disagree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(to_hugging_face(tensors, "model."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(replace(TINY, n_vocab=121))))
    assert "has shape (120, 64), expected (121, 64)" in refusal(tmp_path)


def test_config_and_metadata_disagree(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(to_hugging_face(tensors, "model."), tmp_path / "model.safetensors", metadata(TINY))
    (tmp_path / "config.json").write_text(json.dumps(config_json(replace(TINY, n_audio_head=2))))
    assert "n_audio_head is 2, expected 1" in refusal(tmp_path)


def test_untied_output(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """transformers' proj_out: welcome where it repeats the embedding, refused where it does not."""
    embedding = tensors["decoder.token_embedding.weight"]
    state = to_hugging_face(tensors, "model.")
    path = tmp_path / "a.safetensors"
    save_file(state | {"proj_out.weight": embedding.clone()}, path)
    assert_same(weights.load(str(path)).tensors, tensors)
    other = embedding.clone()
    other[7, 7] += 1
    save_file(state | {"proj_out.weight": other}, path)
    assert "proj_out.weight differs from decoder.token_embedding.weight" in refusal(path)
    save_file(state | {"proj_out.weight": other[:-1].clone()}, path)
    assert "proj_out.weight has shape (119, 64)" in refusal(path)
    del state["model.decoder.embed_tokens.weight"]
    save_file(state | {"proj_out.weight": embedding}, path, metadata(TINY))
    assert "decoder.token_embedding.weight is missing" in refusal(path)
    save_file(tensors | {"proj_out.weight": embedding.clone()}, path, metadata(TINY))
    assert "proj_out.weight is unknown" in refusal(path)


# --- wrong files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "the metadata dims is not JSON"),
        ("[1]", "dims are list, expected the fields"),
        ('{"n_mels": 80}', "dims are ['n_mels'], expected the fields"),
        (json.dumps(asdict(TINY) | {"n_mels": "80"}), "dims n_mels is '80'"),
        (json.dumps(asdict(TINY) | {"n_mels": True}), "dims n_mels is True"),
        (json.dumps(asdict(TINY) | {"n_audio_ctx": 0}), "dims n_audio_ctx is 0"),
        (json.dumps(asdict(TINY) | {"n_audio_head": 3}), "3 heads for a width of 64"),
        (json.dumps(asdict(TINY) | {"n_text_ctx": 0}), "are 0 in part"),
        (json.dumps(asdict(TINY) | {"n_text_state": 128}), "n_text_state is 128"),
        (json.dumps(asdict(TINY) | {"n_audio_layer": 10**12}), "1000000000000 + 1 blocks"),
        (
            json.dumps(asdict(TINY) | dict.fromkeys(files.TEXT_FIELDS, 0)),
            "no text fields but a decoder is there",
        ),
    ],
)
def test_bad_dims(tmp_path: Path, tensors: dict[str, torch.Tensor], value: str, says: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors", {"dims": value})
    assert says in refusal(tmp_path / "a.safetensors")


def test_dims_that_no_shape_tells(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    odd = replace(TINY, n_audio_state=96, n_text_state=96)
    save_file(random_tensors(odd), path)
    assert "its width is 96, expected a multiple of 64" in refusal(path)
    save_file({"encoder.conv1.weight": torch.zeros(64, 80)}, path)
    assert "encoder.conv1.weight has shape (64, 80), expected 3 axes" in refusal(path)
    save_file({"something": torch.zeros(1)}, path)
    assert "encoder.conv1.weight is missing" in refusal(path)
    save_file({}, path)
    assert "holds no tensors" in refusal(path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_safetensors(openai_file: Path, kept: int) -> None:
    openai_file.write_bytes(openai_file.read_bytes()[:kept])
    assert "is truncated or is not a safetensors file" in refusal(openai_file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', expected 'whisper'"),
        ({"scale_embedding": True}, "scale_embedding is True, expected False"),
        ({"activation_function": "relu"}, "activation_function is 'relu', expected 'gelu'"),
        ({"encoder_ffn_dim": 128}, "encoder_ffn_dim is 128, expected 256"),
        ({"d_model": None}, "n_audio_state is None"),
    ],
)
def test_config_of_another_network(
    tmp_path: Path, tensors: dict[str, torch.Tensor], change: dict[str, object], says: str
) -> None:
    save_file(to_hugging_face(tensors, "model."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY) | change))
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b'{"model_type": "whisper"}', "d_model, "),
    ],
)
def test_broken_config(
    tmp_path: Path, tensors: dict[str, torch.Tensor], content: bytes, says: str
) -> None:
    save_file(to_hugging_face(tensors, "model."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    assert says in refusal(tmp_path)


def test_broken_shards(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    index = save_shards(tmp_path, tensors)
    good = json.loads(index.read_text())
    second = tmp_path / "model-00002-of-00003.safetensors"

    def with_map(**changes: str) -> str:
        weight_map = good["weight_map"] | {k.replace("__", "."): v for k, v in changes.items()}
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refusal(tmp_path)

    assert "encoder.extra is missing from model-0000" in with_map(encoder__extra=second.name)
    assert "expected the name of a .safetensors file in the same folder" in with_map(
        encoder__extra="../other.safetensors"
    )
    index.write_text('{"weight_map": {}}')
    assert "has no weight_map" in refusal(tmp_path)
    index.write_text("[")
    assert "is not JSON" in refusal(index)
    lost = dict(good["weight_map"])
    name = next(name for name, file in lost.items() if file == second.name)
    del lost[name]
    index.write_text(json.dumps({"weight_map": lost}))
    assert f"{name} lies in {second.name}, expected nowhere" in refusal(tmp_path)
    index.write_text(json.dumps(good))
    weights.load(str(tmp_path))
    second.unlink()
    assert f"the shard {second.name} is missing" in refusal(tmp_path)


class Malicious:
    """Unpickled by Python's own reader, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "evil.pt"
    value = {"dims": asdict(TINY), "model_state_dict": {"encoder.conv1.weight": Malicious(mark)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    assert "is refused: its pickle wants to run code" in refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the file was indeed malicious


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_pt(
    tmp_path: Path, tensors: dict[str, torch.Tensor], fraction: float, zipped: bool
) -> None:
    path = tmp_path / "a.pt"
    value = {"dims": asdict(TINY), "model_state_dict": tensors}
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    sentence = refusal(path)
    assert "is truncated" in sentence or "is damaged" in sentence


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 2], "holds list, expected dims and model_state_dict"),
        ({"state_dict": {}}, "holds ['state_dict'], expected dims and model_state_dict"),
        ({"dims": {}, "model_state_dict": []}, "model_state_dict is a list"),
        ({"dims": {}, "model_state_dict": {"a": 1}}, "a is a int, expected a dense tensor"),
        ({"dims": {}, "model_state_dict": {"a": torch.eye(2).to_sparse()}}, "sparse"),
        ({"dims": {"n_mels": 1}, "model_state_dict": {}}, "expected the fields"),
        ({"dims": asdict(TINY), "model_state_dict": {}}, "holds no tensors"),
    ],
)
def test_pt_that_is_no_checkpoint(tmp_path: Path, value: object, says: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    assert says in refusal(tmp_path / "a.pt")


# --- what is no checkpoint at all --------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["./tiny", "/no/such", "a.pt", "a/b.safetensors", "~/whisper", "one/two/three"]
)
def test_no_such_file(spec: str) -> None:
    assert refusal(spec) == f"weights: no such file or folder: {spec}"


@pytest.mark.parametrize("spec", ["", "tinny", "-x/y", "a b/c", "owner/", "\0"])
def test_nonsense_lists_what_is_accepted(spec: str) -> None:
    sentence = refusal(spec)
    for word in ("demo", ".safetensors", ".pt", "tiny.en", "large-v3-turbo", "openai/whisper-tiny"):
        assert word in sentence


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "ggml-tiny.bin"
    path.write_bytes(b"lmgg")
    assert "is not a checkpoint that can be read" in refusal(path)
    assert f"the folder {tmp_path} holds neither model.safetensors nor" in refusal(tmp_path)


def test_folder_that_hides_a_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "it hides the model base, which openai/whisper-base names too" in refusal("base")


def test_revision_of_a_file(openai_file: Path) -> None:
    with pytest.raises(WeightsError, match="is no repo, it has no revision main"):
        weights.load(str(openai_file), revision="main")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "cannot read" in refusal(tmp_path)


# --- the embedded checkpoint -------------------------------------------------------------------


def compact_state(tensors: dict[str, torch.Tensor], tokens: list[int]) -> dict[str, torch.Tensor]:
    state = dict(tensors)
    rows = torch.randn(len(tokens) + 1, 64, generator=torch.Generator().manual_seed(1)).half()
    state["decoder.token_embedding.weight"] = rows
    state["decoder.token_embedding.tokens"] = torch.tensor(tokens, dtype=torch.int32)
    return state


def test_demo_expands_its_embedding(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [0, 3, 4, 77, 119]
    state = compact_state(tensors, used)
    path = tmp_path / "demo.safetensors"
    save_file(state, path, metadata(TINY, token_embedding="compact"))
    monkeypatch.setattr("weights.resolve.DEMO_FILE", path)
    checkpoint = weights.load("demo")
    assert set(checkpoint.tensors) == set(expected_shapes(TINY))
    assert checkpoint.source.name == "demo"
    rows, whole = (s["decoder.token_embedding.weight"] for s in (state, checkpoint.tensors))
    assert whole.shape == (120, 64)
    for token in range(120):
        row = used.index(token) if token in used else len(used)
        assert torch.equal(whole[token], rows[row]), token
    assert set(weights.load("demo", encoder_only=True).tensors) == set(
        expected_shapes(TINY, decoder=False)
    )


def test_demo_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weights.resolve.DEMO_FILE", tmp_path / "demo.safetensors")
    assert "the embedded checkpoint is not in this installation" in refusal("demo")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([0, 5, 5], "do not increase"),
        ([5, 4], "do not increase"),
        ([-1, 4], "from -1 to 4, expected 0 to 119"),
        ([4, 120], "from 4 to 120, expected 0 to 119"),
    ],
)
def test_compact_tokens_out_of_order(
    tmp_path: Path, tensors: dict[str, torch.Tensor], tokens: list[int], says: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(compact_state(tensors, tokens), path, metadata(TINY, token_embedding="compact"))
    assert says in refusal(path)
    assert "(a.safetensors)" in refusal(path)


def test_compact_file_that_is_not_one(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    state = compact_state(tensors, [1, 2])
    said = metadata(TINY, token_embedding="compact")
    save_file(state, path, {"token_embedding": "compact"})
    assert "no dims are stated" in refusal(path)
    save_file(tensors, path, said)
    assert "decoder.token_embedding.tokens is missing" in refusal(path)
    save_file(state, path, metadata(TINY))
    assert "decoder.token_embedding.tokens is unknown" in refusal(path)
    save_file(state, path, metadata(TINY, token_embedding="sparse"))
    assert "token_embedding is 'sparse', expected 'compact'" in refusal(path)
    ids = "decoder.token_embedding.tokens"
    save_file(state | {ids: torch.tensor([1, 2, 3], dtype=torch.int32)}, path, said)
    assert "expected (n_used + 1, n_text_state)" in refusal(path)
    save_file(state | {ids: torch.tensor([1, 2])}, path, said)
    assert "dtype torch.int64, expected (n_used,) int32" in refusal(path)
    save_file(state, path, metadata(replace(TINY, n_vocab=10**12), token_embedding="compact"))
    assert "n_vocab is 1000000000000" in refusal(path)


def test_compact_expand_edges() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    none = compact.expand(rows[:1], torch.tensor([], dtype=torch.int32), 4)
    assert torch.equal(none, rows[:1].expand(4, 2))
    every = compact.expand(rows, torch.tensor([0, 1], dtype=torch.int32), 2)
    assert torch.equal(every, rows[:2])


# --- export ------------------------------------------------------------------------------------


def test_export_writes_openai_names(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(to_hugging_face(tensors, "model."), tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path / "in.safetensors"), "-o", str(output)]) == 0
    with safe_open(output, "pt") as file:
        said = file.metadata()
        assert set(file.keys()) == set(expected_shapes(TINY))
    assert json.loads(said["dims"]) == asdict(TINY)
    assert said["format"] == "pt"
    assert said["source"] == str(tmp_path / "in.safetensors")
    assert said["revision"] == ""
    assert said["sha256"] == files.sha256([tmp_path / "in.safetensors"])
    assert_same(weights.load(str(output)).tensors, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert output.stat().st_mode & 0o777 == 0o666 & ~mask


def test_export_encoder_only(openai_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = openai_file.with_name("encoder.safetensors")
    assert main(["export", str(openai_file), "-o", str(output), "--encoder-only"]) == 0
    checkpoint = weights.load(str(output))
    assert set(checkpoint.tensors) == set(expected_shapes(TINY, decoder=False))
    assert checkpoint.dims == TINY
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wrote ")


def test_export_replaces_only_when_told(
    openai_file: Path, tensors: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    output = openai_file.with_name("out.safetensors")
    output.write_bytes(b"precious")
    command = ["export", str(openai_file), "-o", str(output)]
    assert main(command) == 1
    assert "exists: name another file, or give --force" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert main([*command, "--force"]) == 0
    assert_same(weights.load(str(output)).tensors, tensors)


def test_export_never_replaces_its_input(
    openai_file: Path, tensors: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    before = openai_file.read_bytes()
    link = openai_file.with_name("link.safetensors")
    link.symlink_to(openai_file)
    for output in (openai_file, link):
        assert main(["export", str(openai_file), "-o", str(output), "--force"]) == 1
        assert "is the file being exported" in capsys.readouterr().err
    assert openai_file.read_bytes() == before
    assert link.is_symlink()
    folder = openai_file.parent / "sharded"
    folder.mkdir()
    save_shards(folder, tensors)
    shard = folder / "model-00002-of-00003.safetensors"
    assert main(["export", str(folder), "-o", str(shard), "--force"]) == 1
    assert "is the file being exported" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["no/such/folder/a.safetensors", "a.pt", "folder.safetensors"])
def test_export_to_where_it_cannot_go(
    openai_file: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (openai_file.parent / "folder.safetensors").mkdir()
    path = openai_file.parent / output
    assert main(["export", str(openai_file), "-o", str(path), "--force"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("weights: ")
    assert sorted(p.name for p in openai_file.parent.iterdir()) == [
        "checkpoint.safetensors",
        "folder.safetensors",
    ]


def test_export_on_a_full_disk(openai_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the full disk: the write fails half way."""
    output = openai_file.with_name("out.safetensors")
    output.write_bytes(b"precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = weights.load(str(openai_file))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*out\.safetensors: "):
            export.export(checkpoint, output, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert output.read_bytes() == b"precious"
    assert sorted(p.name for p in openai_file.parent.iterdir()) == [
        "checkpoint.safetensors",
        "out.safetensors",
    ]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_export_that_is_interrupted_leaves_nothing(
    openai_file: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half_written(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr("weights.export.save_file", half_written)
    expected = WeightsError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export.export(weights.load(str(openai_file)), openai_file.with_name("out.safetensors"))
    assert [p.name for p in openai_file.parent.iterdir()] == ["checkpoint.safetensors"]


# --- the command line --------------------------------------------------------------------------


def test_show(openai_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(openai_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(expected_shapes(TINY))
    assert [line.split()[0] for line in lines[:count]] == list(expected_shapes(TINY))
    conv1 = next(line for line in lines if line.startswith("encoder.conv1.weight "))
    assert conv1.split()[1:7] == ["64", "x", "80", "x", "3", "float16"]
    assert len(conv1.split()[7]) == 12
    assert "n_vocab=120" in lines[count + 1]
    assert f"{count} tensors" in lines[-1]
    assert main(["show", str(openai_file), "--full"]) == 0
    full = capsys.readouterr().out.splitlines()
    assert len(full[0].split()[-1]) == 64
    assert full[0].split()[-1].startswith(lines[0].split()[-1])


def test_show_json(
    openai_file: Path, tensors: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(openai_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dims"] == asdict(TINY)
    assert found["source"]["sha256"] == files.sha256([openai_file])
    assert found["totals"] == {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": 2 * sum(t.numel() for t in tensors.values()),
    }
    by_name = {entry["name"]: entry for entry in found["tensors"]}
    raw = openai_file.parent / "raw"
    raw.write_bytes(tensors[KEY].numpy().tobytes())
    assert by_name[KEY] == {
        "name": KEY,
        "shape": [64, 64],
        "dtype": "float16",
        "sha256": files.sha256([raw]),
    }


def test_cli_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "./no-such.pt"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "weights: no such file or folder: ./no-such.pt\n"


@pytest.mark.parametrize("command", [[], ["show"], ["export", "demo"], ["frobnicate", "demo"]])
def test_cli_usage(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "usage: python -m weights" in capsys.readouterr().err


def test_cli_help_says_what_a_spec_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["show", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for name in (*weights.MODELS, "demo", "owner/name", ".pt"):
        assert name in out


def test_cli_whose_reader_goes_away(openai_file: Path) -> None:
    """`python -m weights show … | head`, with a pipe closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "weights", "show", str(openai_file)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(weights.__file__).parent.parent,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


# --- the models --------------------------------------------------------------------------------


def test_every_model_name_of_openai_is_known() -> None:
    assert set(weights.MODELS) == set(whisper.available_models())
    for name, model in weights.MODELS.items():
        assert model.revision is None or len(bytes.fromhex(model.revision)) == 20, name
        assert model.sha256 is None or len(bytes.fromhex(model.sha256)) == 32, name
    assert weights.MODELS["large"].repo == "openai/whisper-large-v3"
    assert weights.MODELS["large-v1"].repo == "openai/whisper-large"
    assert weights.MODELS["turbo"].repo == "openai/whisper-large-v3-turbo"
    pins = [(model.revision, model.sha256) for model in weights.MODELS.values()]
    assert len(set(pins)) == len(pins) - 2  # but for the two aliases


# --- real weights ------------------------------------------------------------------------------


def test_real_encoder() -> None:
    checkpoint = weights.load(str(shared("whisper-tiny.en/encoder.safetensors")))
    assert len(checkpoint.tensors) == 67
    assert checkpoint.dims == TINY_EN
    assert not checkpoint.has_decoder
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}


def test_real_checkpoint() -> None:
    checkpoint = weights.load(str(shared("whisper-tiny.en/tiny.en.refit-v0.safetensors")))
    assert len(checkpoint.tensors) == 167
    assert checkpoint.has_decoder
    encoder = weights.load(str(shared("whisper-tiny.en/encoder.safetensors"))).tensors
    for name, tensor in encoder.items():
        assert torch.equal(tensor, checkpoint.tensors[name]), name
