"""Whisper's tokens in the forms that the peers' files hold, from openai-whisper's own tokenizer.

It refuses a vocabulary of a size that is not Whisper's: the tokens of another are not known.
"""

from __future__ import annotations

from itertools import pairwise

from tiktoken import Encoding
from whisper.model import ModelDimensions
from whisper.tokenizer import LANGUAGES, Tokenizer, get_encoding, get_tokenizer

from validation.peers import PeerError

MULTILINGUAL = 51865  # the smallest n_vocab of a multilingual model
WITHOUT_LANGUAGES = 51765  # tokens of an English model besides those of languages


def is_multilingual(dims: ModelDimensions) -> bool:
    """As `whisper.Whisper.is_multilingual`."""
    return dims.n_vocab >= MULTILINGUAL


def languages_of(dims: ModelDimensions) -> int:
    """How many languages the vocabulary has tokens for; PeerError where it is none of Whisper's."""
    languages = dims.n_vocab - WITHOUT_LANGUAGES - int(is_multilingual(dims))
    if not 1 <= languages <= len(LANGUAGES):
        raise PeerError(f"a vocabulary of {dims.n_vocab} tokens is none of Whisper's")
    return languages


def encoding_of(dims: ModelDimensions) -> Encoding:
    """openai-whisper's encoding for this vocabulary."""
    return get_encoding("multilingual" if is_multilingual(dims) else "gpt2", languages_of(dims))


def tokenizer_of(dims: ModelDimensions) -> Tokenizer:
    """openai-whisper's tokenizer, which knows what its tokens mean."""
    return get_tokenizer(is_multilingual(dims), num_languages=languages_of(dims))


def plain_tokens(encoding: Encoding) -> list[bytes]:
    """The tokens that are no special ones, by id."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]


def special_tokens(encoding: Encoding) -> list[str]:
    """ "<|endoftext|>" and all after it, by id."""
    ids = range(encoding.eot_token, encoding.n_vocab)
    return [encoding.decode_single_token_bytes(i).decode() for i in ids]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: what is visible in Latin-1 stands for itself, the rest for the
    letters from 256 on. https://github.com/openai/gpt-2/blob/master/src/encoder.py"""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }


def spelled(token: bytes, alphabet: dict[int, str]) -> str:
    return "".join(alphabet[byte] for byte in token)


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one is made of, in the order of their ids, which is the
    order in which byte pair encoding joins them."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, own in ids.items():
        if len(token) < 2:  # the multilingual vocabulary has an empty one
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ids.get(a + b, own) for a, b in pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] >= own:
                raise PeerError(f"the token {token!r} is not made of two others")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found.append((parts[0], parts[1]))
    return found
