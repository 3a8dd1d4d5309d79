"""Every variant that can run here says what stock openai-whisper says, and what ran is what it
says; the ones that cannot run are refused with a sentence."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest
import torch
import whisper
from conftest import SAMPLES, first_window
from whisper.decoding import DecodingOptions
from whisper.model import MultiHeadAttention

import decoder_bridge
import encoder.engine
from decoder_bridge.attention import Attention, attention_shapes
from decoder_bridge.graph import HALF, TOKEN_EMBEDDING
from decoder_bridge.model import MaxAttention, MaxAudioEncoder, MaxWhisper, stock_model
from decoder_bridge.variants import DEFAULT, VARIANTS, VariantError, reason_against, what_ran
from encoder.audio import load_audio
from encoder.engine import EngineError
from encoder.run import build_parser, main
from validation.metrics import relative_l2
from weights import Checkpoint

NAMES = ["cpu", "gpu", "max-attention", "max", "max-fast"]
HERE = [name for name in NAMES if reason_against(name, "auto") is None]
FILES = ["demo.flac", "flite-slt.flac"]
RELATIVE_L2 = 1e-5  # the limit of the encoder's other tests


@pytest.fixture(scope="module")
def models(demo_checkpoint: Checkpoint) -> dict[str, whisper.Whisper]:
    """Each variant that can run here, from the registry."""
    return {name: VARIANTS[name].load(demo_checkpoint, "auto") for name in HERE}


@pytest.fixture(scope="module")
def stock(demo_checkpoint: Checkpoint) -> whisper.Whisper:
    """Loaded apart from the registry."""
    return stock_model(demo_checkpoint)


def decode(model: whisper.Whisper, name: str, **options: object) -> whisper.DecodingResult:
    """The first window of a sample in English, greedy, with timestamps unless `options` differ."""
    mel = first_window(SAMPLES / name)[0].to(model.device)
    return model.decode(mel, DecodingOptions(language="en", fp16=False, **options))


def transcript(model: whisper.Whisper, name: str, **options: object) -> list[tuple]:
    """Tokens and times of every segment, and of every word where `word_timestamps` asks for it."""
    audio = load_audio(SAMPLES / name)
    result = model.transcribe(audio, temperature=0.0, fp16=False, **options)
    return [
        (s["tokens"], s["start"], s["end"], [(w["word"], w["start"]) for w in s.get("words", [])])
        for s in result["segments"]
    ]


# ---------------------------------------------------------------- what they say


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", HERE)
def test_the_tokens_are_the_stock_ones(models, stock, name, file):
    ours, expected = decode(models[name], file), decode(stock, file)
    assert ours.tokens == expected.tokens
    assert ours.text == expected.text
    assert ours.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
    assert ours.tokens  # an empty text would agree too


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", HERE)
def test_the_transcript_is_the_stock_one(models, stock, name, file):
    ours = transcript(models[name], file)
    assert ours == transcript(stock, file)
    assert ours


@pytest.mark.parametrize("file", FILES)
def test_max_fast_searches_with_beams_as_stock_does(models, stock, file):
    ours, expected = (decode(m, file, beam_size=5) for m in (models["max-fast"], stock))
    assert ours.tokens == expected.tokens
    ours, expected = (transcript(m, file, beam_size=5) for m in (models["max-fast"], stock))
    assert ours == expected


def test_max_fast_has_the_times_of_words_from_the_stock_decoder(models, stock):
    ours = transcript(models["max-fast"], "demo.flac", word_timestamps=True)
    expected = transcript(stock, "demo.flac", word_timestamps=True)
    assert [s[0] for s in ours] == [s[0] for s in expected]
    heard, said = ([w for s in found for w in s[3]] for found in (ours, expected))
    assert [w for w, _ in heard] == [w for w, _ in said]
    assert [t for _, t in heard] == pytest.approx([t for _, t in said], abs=0.02)
    assert len(heard) > 3


def test_a_batch_and_several_beams_at_once(models, stock):
    """Which the stock task cannot: each window is as it is alone."""
    mel = torch.cat([first_window(SAMPLES / file) for file in FILES])
    options = DecodingOptions(language="en", fp16=False, beam_size=3)
    found = models["max-fast"].decode(mel, options)
    expected = [decode(stock, file, beam_size=3).tokens for file in FILES]
    assert [result.tokens for result in found] == expected


# ---------------------------------------------------------------- what runs


def test_max_attention_asks_max_once_for_each_layer(models, monkeypatch):
    """And the stock attention, which the decoder keeps, never for the encoder."""
    model = models["max-attention"]
    asked, stock_calls = [], []
    execute, forward = Attention.__call__, MultiHeadAttention.forward
    monkeypatch.setattr(Attention, "__call__", lambda *a: asked.append(1) or execute(*a))
    monkeypatch.setattr(
        MultiHeadAttention, "forward", lambda *a, **k: stock_calls.append(1) or forward(*a, **k)
    )
    with torch.no_grad():
        model.encoder(first_window(SAMPLES / "demo.flac"))
    assert len(asked) == model.dims.n_audio_layer
    assert not stock_calls
    assert all(type(b.attn) is MaxAttention for b in model.encoder.blocks)
    assert len({id(b.attn.engine) for b in model.encoder.blocks}) == 1
    assert all(type(b.attn) is MultiHeadAttention for b in model.decoder.blocks)


@pytest.mark.parametrize("batch", [1, 2])
def test_max_attention_is_the_stock_encoder(models, stock, batch):
    mel = torch.cat([first_window(SAMPLES / file) for file in FILES])[:batch]
    with torch.no_grad():
        ours, expected = models["max-attention"].encoder(mel), stock.encoder(mel)
    for a, b in zip(ours, expected, strict=True):
        assert relative_l2(a, b) <= RELATIVE_L2


@pytest.mark.parametrize("name", ["query.weight", "key.weight", "value.bias", "out.weight"])
@pytest.mark.parametrize("layer", [0, -1])
def test_max_attention_reads_the_models_own_tensors(models, stock, name, layer):
    """One number changed in place in both models: our attention changes as the stock one does."""
    x = torch.randn(1, 1500, 384, generator=torch.Generator().manual_seed(3))
    ours, theirs = (m.encoder.blocks[layer].attn for m in (models["max-attention"], stock))
    tensors = [attn.get_parameter(name) for attn in (ours, theirs)]
    kept = tensors[0].detach().clone()
    with torch.no_grad():
        before = ours(x)[0]
        try:
            for tensor in tensors:
                tensor.view(-1)[0] += 20
            after, expected = ours(x)[0], theirs(x)[0]
        finally:
            for tensor in tensors:
                tensor.copy_(kept)
        assert relative_l2(after, before) > 2 * RELATIVE_L2
        assert relative_l2(after, expected) <= RELATIVE_L2
        assert torch.equal(ours(x)[0], before)


def test_max_attention_is_the_encoders(models):
    kernels = models["max-attention"].encoder.blocks[0].attn.engine.kernels
    assert len([k for k in kernels if "max_whisper.qkv_attention" in k]) == 1
    assert len([k for k in kernels if "max_whisper.linear" in k]) == 4


def test_max_attention_keeps_the_names_of_the_checkpoint(models, stock):
    ours, expected = models["max-attention"].state_dict(), stock.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_max_fast_asks_the_stock_decoder_for_nothing_but_words(models):
    """And MAX is bound to the decoder's tensors where PyTorch has them."""
    model = models["max-fast"]
    assert type(model) is MaxWhisper
    assert isinstance(model.encoder, MaxAudioEncoder)
    calls: list[int] = []
    hook = model.decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert transcript(model, "demo.flac")
        assert not calls
        assert transcript(model, "demo.flac", word_timestamps=True)
        assert calls
    finally:
        hook.remove()
    bound = model.max_decoder._weights
    parameters = dict(model.decoder.named_parameters())
    assert parameters.keys() ^ bound.keys() == {HALF, TOKEN_EMBEDDING}
    for name in parameters.keys() & bound.keys():
        assert bound[name].data_ptr() == parameters[name].data_ptr(), name
    for name in ("transcribe", "detect_language", "logits", "embed_audio", "forward"):
        assert getattr(MaxWhisper, name) is getattr(whisper.Whisper, name)


MAX, PYTORCH = r"MAX 26\.\S+ on cpu", r"PyTorch 2\.\S+ on "


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cpu", rf"encoder: {PYTORCH}cpu, 4 layers of 384"),
        ("gpu", rf"encoder: {PYTORCH}cuda, 4 layers of 384"),
        (
            "max-attention",
            rf"encoder: {PYTORCH}cpu, attention in 4 of its layers: MAX 26\.\S+, 4 layers of 384",
        ),
        ("max", rf"encoder: {MAX}, 4 layers of 384"),
        ("max-fast", rf"encoder: {MAX}, 4 layers of 384 · decoder: {MAX}, 3 layers of 384"),
    ],
)
def test_what_ran_is_said_by_the_model(models, name, line):
    if name not in HERE:
        pytest.skip(str(reason_against(name, "auto")))
    assert re.fullmatch(line, what_ran(models[name]))


def test_what_ran_looks_at_the_model_and_not_at_its_variant(models, stock):
    """Where the stock encoder, or some of its attention, is put back, the line says so."""
    attn = models["max-attention"].encoder.blocks[1].attn
    models["max-attention"].encoder.blocks[1].attn = stock.encoder.blocks[1].attn
    try:
        assert "attention in 3 of its layers: MAX" in what_ran(models["max-attention"])
    finally:
        models["max-attention"].encoder.blocks[1].attn = attn
    ours = models["max"].encoder
    models["max"].encoder = stock.encoder
    try:
        assert re.match(rf"encoder: {PYTORCH}", what_ran(models["max"]))
    finally:
        models["max"].encoder = ours
    assert "on cpu in float16, 4 layers" in what_ran(stock, fp16=True)


# ---------------------------------------------------------------- the registry


def test_the_registry():
    assert list(VARIANTS) == NAMES
    assert DEFAULT == "max"
    assert inspect.signature(decoder_bridge.load_model).parameters["variant"].default == DEFAULT
    assert {name for name, variant in VARIANTS.items() if variant.fp16} == {"gpu"}
    assert {"cpu", "max-attention", "max", "max-fast"} <= set(HERE)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("cpu", "gpu", "it runs on the CPU alone; use --device cpu"),
        ("max-attention", "gpu", "it runs on the CPU alone; use --device cpu"),
        ("max-fast", "gpu", "it runs on the CPU alone; use --device cpu"),
        ("max", "gpu", "device gpu was asked for and MAX sees none; use --device cpu"),
        ("gpu", "cpu", "it runs on CUDA alone; leave --device out"),
        ("gpu", "auto", "PyTorch sees no CUDA device here; use another --variant"),
        ("gpu", "gpu", "PyTorch sees no CUDA device here; use another --variant"),
    ],
)
def test_what_cannot_run_says_why(monkeypatch, tmp_path, capsys, name, device, reason):
    """In `load_model` and in the command, before a checkpoint is looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(encoder.engine, "accelerator_count", lambda: 0)
    sentence = f"variant {name} cannot run: {reason}"
    assert VARIANTS[name].cannot_run(device) == reason
    with pytest.raises(VariantError, match=f"^{re.escape(sentence)}$"):
        decoder_bridge.load_model("no-such", device, offline=True, variant=name)
    argv = ["--variant", name, "--device", device, "--model", "no-such", "--offline"]
    assert main([str(SAMPLES / "demo.flac"), *argv, "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", f"encoder.run: {sentence}.\n")
    assert not (tmp_path / "out").exists()


def test_another_name_or_device_is_refused():
    with pytest.raises(VariantError, match=r"^variant is 'fast', expected one of cpu, gpu, max-a"):
        decoder_bridge.load_model("demo", offline=True, variant="fast")
    with pytest.raises(VariantError, match=r"^device is 'tpu', expected one of auto, cpu, gpu$"):
        decoder_bridge.load_model("demo", "tpu", offline=True)


def test_load_model_loads_what_is_asked_for():
    stock = decoder_bridge.load_model("demo", offline=True, variant="cpu")
    assert type(stock) is whisper.Whisper
    assert type(stock.encoder) is whisper.model.AudioEncoder
    with pytest.raises(AttributeError, match="has no attribute 'Encoder'"):
        _ = decoder_bridge.Encoder


def test_gpu_is_the_stock_model_on_cuda(demo_checkpoint, monkeypatch):
    """As far as it goes without one: the whole stock model is moved, and CUDA's reason is passed
    on."""
    moved: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(whisper.Whisper, "to", lambda self, to: moved.append(to) or self)
    assert reason_against("gpu", "auto") is None
    model = VARIANTS["gpu"].load(demo_checkpoint, "auto")
    assert type(model) is whisper.Whisper
    assert type(model.encoder) is whisper.model.AudioEncoder
    assert moved == ["cuda"]

    def broken(self: whisper.Whisper, to: str) -> None:
        raise RuntimeError("CUDA driver is too old\nat line 5")

    monkeypatch.setattr(whisper.Whisper, "to", broken)
    with pytest.raises(VariantError, match=r"on CUDA: CUDA driver is too old$"):
        VARIANTS["gpu"].load(demo_checkpoint, "auto")


# ---------------------------------------------------------------- what they refuse


def test_half_precision_is_refused(models):
    with pytest.raises(ValueError, match="fp16=False"):
        models["max-fast"].decode(first_window(SAMPLES / "demo.flac")[0])
    for name in ("max-attention", "max"):
        with pytest.raises(RuntimeError, match="fp16=False"):
            models[name].decode(first_window(SAMPLES / "demo.flac")[0])


def test_the_attention_of_a_decoder_is_refused(models):
    attn, x = models["max-attention"].encoder.blocks[0].attn, torch.zeros(1, 1500, 384)
    for given in ({"xa": x}, {"mask": x}, {"kv_cache": {}}):
        with pytest.raises(ValueError, match="takes no xa, no mask and no kv_cache"):
            attn(x, **given)
    with torch.no_grad():
        assert attn(x[:0])[0].shape == (0, 1500, 384)


def test_other_inputs_and_tensors_are_refused(models, demo_checkpoint):
    attn = models["max-attention"].encoder.blocks[0].attn
    tensors, x = dict(attn.named_parameters()), torch.zeros(1, 1500, 384)
    assert tensors.keys() == attention_shapes(demo_checkpoint.dims).keys()
    for wrong in (x[:, 1:], x[0], x.double()):
        with pytest.raises(ValueError, match=r"^x (has shape|is torch\.float64)"):
            attn.engine(x=wrong, tensors=tensors)
    with pytest.raises(EngineError, match=r"^attn\.key\.weight: found \(3,\), the graph expects"):
        attn.engine(x, {**tensors, "key.weight": torch.zeros(3)})
    with pytest.raises(EngineError, match=r"^attn\.key\.bias: found \(384,\), .* expects nothing$"):
        attn.engine(x, {**tensors, "key.bias": torch.zeros(384)})


# ---------------------------------------------------------------- the command


@pytest.fixture
def loaded(models, monkeypatch) -> None:
    """The registry gives the models that are loaded already."""
    for name, model in models.items():
        given = replace(VARIANTS[name], load=lambda checkpoint, device, model=model: model)
        monkeypatch.setitem(VARIANTS, name, given)


@pytest.mark.parametrize("name", HERE)
def test_the_command(loaded, models, stock, capsys, name):
    argv = ["--model", "demo", "--offline", "--variant", name, "--verbose", "True"]
    assert main([str(SAMPLES / "demo.flac"), *argv]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].endswith(f" · {what_ran(models[name])}")
    audio = load_audio(SAMPLES / "demo.flac")
    segments = stock.transcribe(audio, temperature=0.0, beam_size=5, fp16=False)["segments"]
    assert [line.split("]  ")[1] for line in out.splitlines()] == [
        segment["text"].strip() for segment in segments
    ]


def test_half_precision_goes_to_gpu_alone(stock, monkeypatch, capsys):
    asked: list[dict] = []

    def transcribe(audio: object, **options: object) -> dict:
        asked.append(options)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return {"text": " a", "segments": [{"text": " a"}], "language": "en"}

    fake = replace(VARIANTS["gpu"], load=lambda *_: stock, cannot_run=lambda _: None)
    monkeypatch.setitem(VARIANTS, "gpu", fake)
    monkeypatch.setattr(stock, "transcribe", transcribe, raising=False)
    path = str(SAMPLES / "demo.flac")
    argv = ["--model", "demo", "--offline", "--variant", "gpu", "--fp16", "True"]
    assert main([path, *argv]) == 0
    assert asked[0]["fp16"] is True
    assert "variant" not in asked[0]
    assert capsys.readouterr().out == "a\n"
    assert main([path, *argv]) == 1
    expected = f"encoder.run: {path} cannot be transcribed: CUDA out of memory.\n"
    assert capsys.readouterr() == ("", expected)


def test_help_lists_every_variant():
    text = build_parser().format_help()
    for name, variant in VARIANTS.items():
        assert re.search(rf"^  {name} +{re.escape(variant.what)}$", text, re.MULTILINE), name
