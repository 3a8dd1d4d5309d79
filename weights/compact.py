"""The compact token embedding of the embedded checkpoint; it refuses token ids that are out of
range, repeated or out of order.

A checkpoint that was trained on a small part of the vocabulary needs a row only for the tokens it
can say. All other tokens share one row, the last.
"""

from __future__ import annotations

import torch

from .errors import WeightsError

TOKENS = "decoder.token_embedding.tokens"

# Whisper's largest vocabulary has 51 866 tokens (large-v3). A larger one in a compact file could
# ask for any amount of memory, since nothing in the file has that size.
MOST_TOKENS = 100_000


def expand(rows: torch.Tensor, tokens: torch.Tensor, n_vocab: int) -> torch.Tensor:
    """The whole token embedding.

    rows     (n_used + 1, n_text_state), the last row for every token that `tokens` does not name
    tokens   (n_used,) int32 token ids, strictly increasing, in [0, n_vocab)
    returns  (n_vocab, n_text_state), the dtype of `rows`

    Raises WeightsError, without the name of a file, which the caller knows.
    """
    if n_vocab > MOST_TOKENS:
        raise WeightsError(f"n_vocab is {n_vocab}, expected {MOST_TOKENS} at most")
    if tokens.ndim != 1 or tokens.dtype != torch.int32:
        raise WeightsError(
            f"{TOKENS} has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, "
            "expected (n_used,) int32"
        )
    n_used = tokens.numel()
    if rows.ndim != 2 or rows.shape[0] != n_used + 1:
        raise WeightsError(
            f"the compact token embedding has shape {tuple(rows.shape)}, expected {n_used + 1} "
            f"rows: one for each of {n_used} tokens, and one that the others share"
        )
    if n_used and (int(tokens.min()) < 0 or int(tokens.max()) >= n_vocab):
        raise WeightsError(
            f"{TOKENS} holds ids from {int(tokens.min())} to {int(tokens.max())}, "
            f"expected 0 to {n_vocab - 1}"
        )
    if n_used > 1 and not bool((tokens[1:] > tokens[:-1]).all()):
        raise WeightsError(
            f"{TOKENS} holds ids that do not increase, expected each id once, in order"
        )
    row_of_token = torch.full((n_vocab,), n_used, dtype=torch.long)
    row_of_token[tokens.long()] = torch.arange(n_used)
    return rows[row_of_token]
