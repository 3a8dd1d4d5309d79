"""The MAX decoder is the stock decoder: logits, caches, beams, and the text token for token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, first_window
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingResult, PyTorchInference

import decoder_bridge.graph
from decoder_bridge.decoding import MaxDecodingTask, MaxInference, decode
from decoder_bridge.engine import KINDS, Cache, Decoder, TappedDecoder, with_half
from decoder_bridge.graph import (
    DECODER,
    HALF,
    KEYS_VALUES,
    STEP,
    TOKEN_EMBEDDING,
    decoder_shapes,
    tap_names,
    tap_shapes,
)
from encoder.engine import EngineError, artifact_name, select_device
from validation.metrics import relative_l2
from validation.numbers import noise_mel
from weights import Checkpoint, WeightsError

RELATIVE_L2 = 1e-5  # the encoder's limit too; on `demo` 2e-6 is the most that was seen
FILES = ["demo.flac", "flite-slt.flac", "espeak-ng-en-us.flac"]


@pytest.fixture(scope="session")
def decoder(demo_checkpoint: Checkpoint) -> Decoder:
    return Decoder(demo_checkpoint, "cpu")


@pytest.fixture(scope="session")
def features(demo: Pair) -> Tensor:
    """(3, 1500, 384): the stock encoder's output for three recordings."""
    with torch.no_grad():
        return demo.stock.encoder(torch.cat([first_window(SAMPLES / name) for name in FILES]))


@pytest.fixture(scope="session")
def tokens(demo: Pair) -> Tensor:
    """(3, 40): any tokens, the largest and the smallest among them."""
    n_vocab = demo.stock.dims.n_vocab
    drawn = torch.randint(0, n_vocab, (3, 40), generator=torch.Generator().manual_seed(5))
    drawn[0, 3], drawn[1, 7] = 0, n_vocab - 1
    return drawn


@pytest.fixture(scope="session")
def expected(demo: Pair, features: Tensor, tokens: Tensor) -> Tensor:
    """(3, 40, n_vocab): the stock decoder's logits of all tokens at once."""
    with torch.no_grad():
        return demo.stock.decoder(tokens, features)


def assert_same(ours: Tensor, stock: Tensor) -> None:
    """Every position of every sequence within the limit of the stock logits."""
    assert ours.shape == stock.shape
    assert ours.dtype == torch.float32
    for a, b in zip(ours.flatten(0, 1), stock.flatten(0, 1), strict=True):
        assert relative_l2(a, b) <= RELATIVE_L2


@pytest.mark.parametrize("batch", [1, 3])
def test_all_tokens_at_once(decoder, features, tokens, expected, batch):
    assert_same(decoder(tokens[:batch], features[:batch]), expected[:batch])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("first", [1, 6])
def test_step_by_step(decoder, features, tokens, expected, batch, first):
    """A prompt, then one token at a time, and two more at once: the logits of all at once."""
    cache = decoder.start(features[:batch])
    assert_same(decoder.logits(cache, tokens[:batch, :first]), expected[:batch, :first])
    for i in range(first, 12):
        assert cache.length == i
        ours = decoder.logits(cache, tokens[:batch, i : i + 1])
        assert_same(ours, expected[:batch, i : i + 1])
    assert_same(decoder.logits(cache, tokens[:batch, 12:14]), expected[:batch, 12:14])


def test_the_last_position(demo, decoder, features):
    """448 tokens fit, in a prompt and one by one, and not one more."""
    drawn = torch.randint(0, 50_000, (1, 449), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = demo.stock.decoder(drawn[:, :448], features[:1])
    cache = decoder.start(features[:1])
    assert_same(decoder.logits(cache, drawn[:, :447], [0, 446]), expected[:, [0, 446]])
    assert_same(decoder.logits(cache, drawn[:, 447:448]), expected[:, 447:])
    with pytest.raises(ValueError, match=r"448 \+ 1 tokens are more than the decoder's 448$"):
        decoder.logits(cache, drawn[:, 448:])


def test_logits_of_some_rows(decoder, features, tokens, expected):
    asked = [0, 5, 5]
    ours = decoder.logits(decoder.start(features), tokens[:, :6], asked)
    assert_same(ours, expected[:, asked])
    alone = decoder.logits(decoder.start(features[:1]), tokens[:1, :1], [0, 0])
    assert_same(alone, expected[:1, [0, 0]])


def test_beams_go_their_own_ways(demo, decoder, features):
    """Two windows, three beams each, rearranged as a search does it: the logits are those of the
    stock decoder for each beam's whole history."""
    ours = MaxInference(decoder, 3, (0, 1, 2))
    heard = features[:2].repeat_interleave(3, dim=0)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.tensor([[50257, 50362, 400]]).repeat(6, 1)
    rows = 3
    for move in ([0, 0, 0], [1, 1, 2], [2, 0, 1], [0, 1, 2], [1, 0, 0], [2, 1, 0]):
        with torch.no_grad():
            expected = demo.stock.decoder(tokens, heard)[:, -rows:]
        assert_same(ours.logits(tokens, heard), expected)
        sources = [*move, *(3 + i for i in reversed(move))]
        ours.rearrange_kv_cache(sources)
        new = torch.randint(0, 50_000, (6, 1), generator=generator)
        tokens, rows = torch.cat([tokens[sources], new], dim=1), 1
    assert len({tuple(t) for t in tokens.tolist()}) == 6
    ours.cleanup_caching()
    assert ours.cache is None


def test_a_beam_stays_in_its_window(decoder, features):
    cache = decoder.start(features[:2])
    cache.spread(2)
    with pytest.raises(ValueError, match=r"another window: \[0, 1, 1, 3\]"):
        cache.rearrange([0, 1, 1, 3])
    with pytest.raises(ValueError, match="3 sources are given for 4 sequences"):
        cache.rearrange([0, 1, 2])
    with pytest.raises(ValueError, match="spread already, over 2 sequences each"):
        cache.spread(2)


def test_two_caches_do_not_disturb_each_other(decoder, features, tokens, expected):
    caches = [decoder.start(features[i : i + 1]) for i in range(3)]
    for j in range(0, 8, 2):
        for i, cache in enumerate(caches):
            ours = decoder.logits(cache, tokens[i : i + 1, j : j + 2])
            assert_same(ours, expected[i : i + 1, j : j + 2])


def test_a_later_call_does_not_overwrite_an_earlier_result(decoder, features, tokens):
    """The rules write into the logits: that changes neither the cache nor what comes after."""
    cache: Cache = decoder.start(features[:1])
    first = decoder.logits(cache, tokens[:1, :1])
    kept = first.clone()
    second = decoder.logits(cache, tokens[:1, 1:2]).clone()
    assert torch.equal(first, kept)
    again = decoder.start(features[:1])
    decoder.logits(again, tokens[:1, :1]).fill_(-torch.inf)
    assert torch.equal(decoder.logits(again, tokens[:1, 1:2]), second)


def perturbed(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with one element of one tensor changed by 0.5."""
    tensor = checkpoint.tensors[name].clone().float()
    tensor.view(-1)[0] += 0.5
    return replace(checkpoint, tensors={**checkpoint.tensors, name: tensor})


@pytest.mark.parametrize(
    "name",
    [
        "positional_embedding",
        "blocks.0.attn.key.weight",
        "blocks.1.cross_attn.value.bias",
        "blocks.0.cross_attn.query.weight",
        "blocks.1.mlp.2.bias",
        "ln.weight",
    ],
)
def test_our_code_ran(demo_checkpoint, demo, decoder, features, tokens, expected, name):
    """One weight perturbed in what is bound to MAX: the logits change, as the stock ones do."""
    other = perturbed(demo_checkpoint, f"decoder.{name}")
    ours = Decoder(other, "cpu")(tokens[:1, :9], features[:1])
    assert relative_l2(ours, expected[:1, :9]) > 2 * RELATIVE_L2
    state = demo.stock.decoder.state_dict()
    kept = state[name].clone()
    try:
        state[name].copy_(other.tensors[f"decoder.{name}"])
        with torch.no_grad():
            assert_same(ours, demo.stock.decoder(tokens[:1, :9], features[:1]))
    finally:
        state[name].copy_(kept)


def test_the_embedding_is_read_in_half_of_the_bytes(demo_checkpoint, decoder, features, tokens):
    """`demo` is published in float16, so its embedding is read in float16, the same bits of
    logits; a checkpoint with one number that float16 lacks keeps float32."""
    name = "decoder.token_embedding.weight"
    other = demo_checkpoint.tensors[name].clone().float()
    other[50_000, 0] += 2**-20
    fine = Decoder(replace(demo_checkpoint, tensors={**demo_checkpoint.tensors, name: other}))
    assert decoder.half
    assert not fine.half
    assert decoder._weights[HALF].dtype == torch.float16
    assert not any(x.dtype == torch.float16 for x in fine._weights.values())
    rows = [i for i in range(demo_checkpoint.dims.n_vocab) if i != 50_000]
    caches = decoder.start(features[:1]), fine.start(features[:1])
    for i in range(12):
        ours, theirs = (
            one.logits(cache, tokens[:1, i : i + 1])
            for one, cache in zip((decoder, fine), caches, strict=True)
        )
        assert torch.equal(ours[..., rows], theirs[..., rows])
    changed = torch.tensor(2.0**-20)
    kept = demo_checkpoint.tensors[name].float()
    for table in (kept, kept * 1e5, kept + torch.nan, kept + changed):
        assert (HALF in with_half({TOKEN_EMBEDDING: table})) == torch.equal(table, kept)


def test_products_are_in_mojo_and_attention_is_the_fused_kernel(decoder, demo_checkpoint):
    """Of both graphs every product, once and no more, and one fused kernel for each attention."""
    layers = demo_checkpoint.dims.n_text_layer
    for masked, kernel in ((True, "masked_flash_attention_cpu"), (False, "no_mask_flash_")):
        found = [k for k in decoder.kernels if f"composite.{kernel}" in k]
        assert len(found) == 2 * layers, masked
    for graph, count in (
        (KEYS_VALUES, 2 * layers),
        (DECODER, 8 * layers + 1),
        (STEP, 8 * layers + 1),
    ):
        found = list(decoder._models[graph].kernel_summaries)
        assert len([k for k in found if "custom__max_whisper.linear" in k]) == count, graph
        assert not [k for k in found if "mo.matmul" in k or "mo.transpose" in k], graph


OPTIONS: list[dict] = [
    {},
    {"without_timestamps": True},
    {"beam_size": 5},
    {"beam_size": 5, "without_timestamps": True, "patience": 2.0, "length_penalty": 0.6},
    {"prompt": " Some words that were said before."},
    {"prompt": list(range(300, 500)), "beam_size": 2},
    {"prefix": " the", "sample_len": 12},
]


def same_result(ours: DecodingResult, stock: DecodingResult) -> None:
    """Two results agree: tokens and text; log-probabilities to 1e-4, of no speech to 1e-6."""
    assert ours.tokens == stock.tokens
    assert ours.text == stock.text
    assert ours.language == stock.language
    assert ours.avg_logprob == pytest.approx(stock.avg_logprob, abs=1e-4)
    assert ours.no_speech_prob == pytest.approx(stock.no_speech_prob, rel=1e-3, abs=1e-9)
    assert torch.equal(ours.audio_features, stock.audio_features)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "greedy")
@pytest.mark.parametrize("name", FILES)
def test_decoding_is_token_for_token_the_stock_one(demo, decoder, features, options, name):
    heard = features[FILES.index(name)]
    given = DecodingOptions(language="en", fp16=False, **options)
    ours = decode(demo.stock, decoder, heard[None], given)
    stock = demo.stock.decode(heard[None], given)
    assert isinstance(ours, list)
    assert len(ours) == 1
    same_result(ours[0], stock[0])
    assert ours[0].tokens  # an empty text would agree too


def test_sampling_draws_the_same_tokens(demo, decoder, features):
    """At a temperature the rules draw from PyTorch's generator: from one seed the same tokens."""
    given = DecodingOptions(language="en", fp16=False, temperature=0.8, best_of=3)
    torch.manual_seed(11)
    ours = decode(demo.stock, decoder, features[:1], given)
    torch.manual_seed(11)
    same_result(ours[0], demo.stock.decode(features[:1], given)[0])


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}], ids=["greedy", "beam_size"])
def test_a_batch_is_its_windows(demo, decoder, features, options):
    """Several windows with several beams each, which the stock task refuses, are each as alone."""
    given = DecodingOptions(language="en", fp16=False, **options)
    ours = decode(demo.stock, decoder, features, given)
    assert len(ours) == 3
    for i, result in enumerate(ours):
        same_result(result, demo.stock.decode(features[i : i + 1], given)[0])
    assert len({r.text for r in ours}) == 3


def test_both_engines_from_a_mel_spectrogram(demo, decoder):
    """One mel of two axes through MAX's encoder and MAX's decoder: one result, the stock one."""
    mel = first_window(SAMPLES / "demo.flac")[0]
    ours = decode(demo.ours, decoder, mel, language="en", fp16=False)
    stock = demo.stock.decode(mel, DecodingOptions(language="en", fp16=False))
    assert isinstance(ours, DecodingResult)
    assert ours.tokens == stock.tokens
    assert ours.text == stock.text


def test_the_language_is_detected_once_for_each_window(demo, decoder, features, monkeypatch):
    asked: list[Tensor] = []

    def detect_language(heard: Tensor, tokenizer: object) -> tuple[Tensor, list[dict]]:
        asked.append(heard)
        return torch.zeros(len(heard)), [{"en": 0.9, "de": 0.1}] * len(heard)

    monkeypatch.setattr(demo.stock, "detect_language", detect_language, raising=False)
    options = {"task": "lang_id", "language": "en", "fp16": False, "beam_size": 5}
    results = decode(demo.stock, decoder, features, **options)
    assert [r.language for r in results] == ["en"] * 3
    assert torch.equal(torch.stack([r.audio_features for r in results]), features)
    assert torch.equal(asked[0], features)


def test_pytorch_gets_its_threads_back(demo, decoder, features, monkeypatch):
    before, seen = torch.get_num_threads(), []
    logits = MaxInference.logits

    def watched(self: MaxInference, *given: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) == 3:
            raise EngineError("unplugged")
        return logits(self, *given)

    monkeypatch.setattr(MaxInference, "logits", watched)
    given = DecodingOptions(language="en", fp16=False)
    task = MaxDecodingTask(demo.stock, decoder, given)
    with pytest.raises(EngineError, match="unplugged"):
        task.run(features[:1])
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
    assert isinstance(task.inference, MaxInference)
    assert task.inference.cache is None  # the stock loop cleans up


def test_half_precision_is_refused(demo, decoder, features):
    with pytest.raises(ValueError, match=r"computes in float32: pass fp16=False$"):
        decode(demo.stock, decoder, features, fp16=True)
    with pytest.raises(TypeError, match="incorrect dtype"):
        decode(demo.stock, decoder, features.half(), fp16=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), r"shape \(2, 1\), expected \(3, 1 or more\)"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\), expected"),
        (torch.zeros(3, 0, dtype=torch.int64), r"shape \(3, 0\), expected"),
        (torch.zeros(3, 1, dtype=torch.int32), r"torch\.int32 on cpu, expected torch\.int64"),
        (torch.tensor([[1], [-1], [2]]), "token -1 is none of the 51864"),
        (torch.tensor([[1], [51864], [2]]), "token 51864 is none of the 51864"),
        (torch.zeros(3, 449, dtype=torch.int64), r"0 \+ 449 tokens are more"),
    ],
)
def test_other_tokens_are_refused(decoder, features, tokens, expected, given, message):
    cache = decoder.start(features)
    with pytest.raises(ValueError, match=message):
        decoder.logits(cache, given)
    assert_same(decoder.logits(cache, tokens[:, :2]), expected[:, :2])  # the cache is as before


def test_other_rows_and_features_are_refused(decoder, features, tokens):
    cache = decoder.start(features)
    for rows in ([], [-1], [2]):
        with pytest.raises(ValueError, match=r"are asked for, expected some of 0 \.\. 1$"):
            decoder.logits(cache, tokens[:, :2], rows)
    for wrong in (features[:, :1499], features[0], features.half(), noise_mel()):
        with pytest.raises(ValueError, match=r"audio_features .* expected"):
            decoder.start(wrong)


def test_weights_are_checked_by_name_and_shape(demo_checkpoint):
    tensors = dict(demo_checkpoint.tensors)
    del tensors["decoder.ln.bias"]
    with pytest.raises(EngineError, match=r"^decoder\.ln\.bias: found nothing, the graph expects"):
        Decoder(replace(demo_checkpoint, tensors=tensors))
    wrong = {**demo_checkpoint.tensors, "decoder.ln.bias": torch.zeros(80)}
    with pytest.raises(EngineError, match=r"^decoder\.ln\.bias: found \(80,\), .* \(384,\)$"):
        Decoder(replace(demo_checkpoint, tensors=wrong))


def test_a_checkpoint_without_a_decoder_is_refused(demo_checkpoint):
    part = {k: x for k, x in demo_checkpoint.tensors.items() if k.startswith("encoder.")}
    with pytest.raises(WeightsError, match="decoder"):
        Decoder(replace(demo_checkpoint, tensors=part))


def test_a_gpu_is_refused(demo_checkpoint):
    with pytest.raises(EngineError, match=r"^device gpu was asked for .* use --device cpu$"):
        Decoder(demo_checkpoint, "gpu")
    with pytest.raises(EngineError, match="device is 'tpu'"):
        Decoder(demo_checkpoint, "tpu")


def test_the_artifact_depends_on_the_decoder_alone(demo_checkpoint, monkeypatch, tmp_path):
    """Its name changes with the decoder's sizes and builders, and not with the encoder's sizes."""
    dims, device = demo_checkpoint.dims, select_device("cpu")
    name = artifact_name(dims, device, "decoder")
    assert name.startswith(f"decoder-{dims.n_text_layer}x{dims.n_text_state}-cpu-float32-")
    assert artifact_name(replace(dims, n_audio_layer=9, n_mels=128), device, "decoder") == name
    for size in ("n_vocab", "n_text_ctx", "n_text_layer", "n_audio_ctx", "n_text_head"):
        other = replace(dims, **{size: getattr(dims, size) * 2})
        assert artifact_name(other, device, "decoder") != name, size
    assert artifact_name(dims, device, "decoder-taps") != name
    sources = KINDS["decoder"].sources
    folders = [Path(s).parent.name for s in sources]
    assert folders == ["encoder", "encoder", *["mojo"] * 5, "decoder_bridge"]
    for i, source in enumerate(sources):
        copy = tmp_path / f"{i}{Path(source).suffix}"
        copy.write_text(Path(source).read_text() + "\n")
        changed = (*sources[:i], str(copy), *sources[i + 1 :])
        with monkeypatch.context() as patch:
            patch.setitem(KINDS, "decoder", replace(KINDS["decoder"], sources=changed))
            assert artifact_name(dims, device, "decoder") != name


def test_every_tap_is_named_once_in_order(demo_checkpoint):
    dims = demo_checkpoint.dims
    names = tap_names(dims)
    assert len(names) == len(set(names)) == 2 * dims.n_text_layer + 2 + 17 * dims.n_text_layer + 2
    assert names[:2] == ["blocks.0.cross_attn.key", "blocks.0.cross_attn.value"]
    assert names[-3:] == [f"blocks.{dims.n_text_layer - 1}", "ln", "logits"]
    shapes = tap_shapes(dims, 7)
    assert shapes["logits"] == (7, dims.n_vocab)
    assert shapes["blocks.0.mlp.0"] == (7, 4 * dims.n_text_state)
    assert shapes["blocks.0.cross_attn.key"] == (dims.n_audio_ctx, dims.n_text_state)


def test_every_weight_is_used_by_the_builder(demo_checkpoint):
    """Each graph alone asks for its own, and together they ask for all and for nothing else."""
    dims = demo_checkpoint.dims
    text = str(decoder_bridge.graph.build(dims, decoder_bridge.graph.DeviceRef.CPU()).mlir_module)
    for name in decoder_shapes(dims):
        assert f'"{name}"' in text, name


@pytest.fixture(scope="session")
def tapped(demo_checkpoint: Checkpoint) -> TappedDecoder:
    return TappedDecoder(demo_checkpoint, "cpu")


def test_taps_are_what_the_stock_modules_give(demo, tapped, decoder, features, tokens, expected):
    """Every module of the stock decoder, tap by tap, on three windows; and the logits of both of
    our graphs."""
    given = tokens[:, :11]
    taps = tapped(given, features)
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in demo.stock.decoder.named_modules():
        if name in taps:
            keep = lambda _, __, output, name=name: found.update({name: output})  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            demo.stock.decoder(given, features)
    finally:
        for hook in hooks:
            hook.remove()
    layers = demo.stock.dims.n_text_layer
    assert len(found) == 15 * layers + 2
    for name, output in found.items():
        assert relative_l2(taps[name], output) <= RELATIVE_L2, name
    assert_same(taps["logits"], expected[:, :11])
    assert relative_l2(taps["logits"], decoder(given, features)) <= RELATIVE_L2
    state = taps["positional_embedding"]
    for layer in range(layers):
        for branch in ("attn", "cross_attn"):
            state = state + taps[f"blocks.{layer}.{branch}.out"]
            assert relative_l2(taps[f"blocks.{layer}.{branch}.residual"], state) <= RELATIVE_L2
        state = taps[f"blocks.{layer}"]


def test_taps_of_other_tokens_are_refused(tapped, features, tokens):
    with pytest.raises(ValueError, match=r"shape \(2, 40\), expected \(3, 1 or more\)"):
        tapped(tokens[:2], features)
    with pytest.raises(ValueError, match="audio_features"):
        tapped(tokens, features[:, 1:])


def test_the_stock_model_is_left_alone(demo, decoder, features):
    """No hook stays and nothing of whisper is replaced: the stock search gives what it gave."""
    given = DecodingOptions(language="en", fp16=False)
    before = demo.stock.decode(features[:1], given)[0]
    modules = {id(f): f for f in (whisper.decoding.DecodingTask.run, PyTorchInference.logits)}
    decode(demo.stock, decoder, features[:1], given)
    assert not any(m._forward_hooks for m in demo.stock.decoder.modules())
    assert set(modules) == {id(whisper.decoding.DecodingTask.run), id(PyTorchInference.logits)}
    same_result(demo.stock.decode(features[:1], given)[0], before)
