"""How fast a model would decode by itself, from the teacher-forced pass of a validation.

Shapes: B rows, T positions, K heads, V vocabulary, N positions, C classes of positions.

One forward of self-speculative greedy decoding (``generation/self_speculative.py``) verifies the
guesses that heads 1..K-1 made at some position t: it keeps those up to the first one that head 0
does not draw itself, once it gets there, and adds one draw of head 0. Heads 1..j are kept where

    argmax head i at t == argmax head 0 at t + i    for all i <= j,

so that tokens per forward are 1 + sum_{j=1..K-1} (share of positions at which heads 1..j are kept).

The share is of the positions at which the decoder verifies, t, t + 1 + kept(t), ..., from the first
one of each run of supervised tokens. A mean over all positions is another figure, and larger: the
decoder leaps over positions within blocks that are kept, which are the easy ones. (Measured on what
a small model had decoded: 2.25 of the decoder, 2.26 so, 3.05 over all positions.)

A position counts if every head has a target there, so that t + 1 .. t + K are supervised tokens of
t's own document: a decoder may stop within its last block. On text that the model has decoded by
itself it is what the decoder does; on text of others, where head 0 need not agree with what comes
next, it is an estimate.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, shift_to_heads
from wmtp_modules.parallel.process_group import all_reduce_sum

# Classes of a position by the token after it, which is the first one of its block. A word is of
# letters, digits and underscores and begins with no digit; a symbol is all else that is visible.
CLASSES = ("word_start", "word_rest", "layout", "symbol")
WORD_START, WORD_REST, LAYOUT, SYMBOL = range(len(CLASSES))
MARKS = ("clean", "marked")  # by the rows' ``noise``


class TokenKinds(NamedTuple):
    """What each token of a vocabulary is by itself."""

    class_V: torch.Tensor  # int64; WORD_REST where a word goes on if the token before ends in one
    ends_word_V: torch.Tensor  # bool: ends in a character of a word


@lru_cache(1)  # each validation asks
def token_kinds(tokenizer: Llama2Tokenizer) -> TokenKinds:
    """Kinds of the tokens of a SentencePiece model, by their pieces."""
    spm = tokenizer._spm_model.spm_model
    kinds = []
    for i in range(spm.vocab_size()):
        text = spm.id_to_piece(i).replace("\u2581", " ")
        if spm.is_byte(i):  # beyond ASCII it is a part of a character, taken for a letter
            byte = int(text[1:-1], 16)
            text = chr(byte) if byte < 128 else "x"
        kinds.append((SYMBOL, False) if spm.is_control(i) or spm.is_unknown(i) else kind_of(text))
    classes, ends = zip(*kinds, strict=True)
    return TokenKinds(torch.tensor(classes), torch.tensor(ends))


def kind_of(text: str) -> tuple[int, bool]:
    """Class of a token, and whether it ends in a character of a word."""
    seen = text.lstrip()
    if not seen:
        return LAYOUT, False
    ends = text[-1].isalnum() or text[-1] == "_"
    if not (seen[0].isalpha() or seen[0] == "_"):
        return SYMBOL, ends
    return (WORD_REST if seen == text else WORD_START), ends


def kept_guesses(choices_BTK: torch.Tensor, labels_BTK: torch.Tensor) -> torch.Tensor:
    """How many guesses a greedy decoder at each position would keep, int64 [B, T]: 0 to K - 1.

    -1 where a head has no target, which does not count.

    Args:
        choices_BTK: likeliest token of each head, int64.
        labels_BTK: as ``mtp_labels`` gives them.
    """
    later_BTJ = shift_to_heads(choices_BTK[..., 0], choices_BTK.shape[-1] - 1, -1)
    kept_BT = (choices_BTK[..., 1:] == later_BTJ).cumprod(-1).sum(-1)
    return torch.where((labels_BTK != IGNORE_INDEX).all(-1), kept_BT, -1)


def verified_positions(kept_BT: torch.Tensor) -> torch.Tensor:
    """Where a greedy decoder would verify guesses, bool [B, T], on the CPU.

    From the first position that counts, behind each block to the one after the last token that
    the block's forward has drawn; the same again in the next run of positions that count.
    """
    is_verified_BT = torch.zeros(kept_BT.shape, dtype=torch.bool)
    for row, kept_T in zip(is_verified_BT.numpy(), kept_BT.tolist(), strict=True):
        t = 0
        while t < len(kept_T):
            row[t] = kept_T[t] >= 0
            t += 1 + max(kept_T[t], 0)
    return is_verified_BT


class Acceptance:
    """Counts kept guesses over the batches of a validation, by class and mark."""

    def __init__(self, n_future_tokens: int, kinds: TokenKinds) -> None:
        self._kinds = kinds
        self._shape = len(MARKS), len(CLASSES), n_future_tokens
        # By mark, class and number of kept guesses; last by that number at all positions.
        M, C, K = self._shape
        self._counts = torch.zeros((M * C + 1) * K, dtype=torch.int64)
        self._device = self._counts.device

    def add(
        self,
        choices_BTK: torch.Tensor,
        labels_BTK: torch.Tensor,
        tokens_BT: torch.Tensor,
        noise_BT: torch.Tensor,
    ) -> None:
        """Add a batch of this rank; ``tokens_BT`` and ``noise_BT`` are a packed batch's."""
        self._device = tokens_BT.device
        kept_BT = kept_guesses(choices_BTK, labels_BTK).cpu()
        next_BT = shift_to_heads(tokens_BT.cpu(), 1, 0)[..., 0]
        class_BT = self._kinds.class_V[next_BT]
        starts_BT = (class_BT == WORD_REST) & ~self._kinds.ends_word_V[tokens_BT.cpu()]
        class_BT = torch.where(starts_BT, WORD_START, class_BT)
        mark_BT = shift_to_heads(noise_BT.cpu(), 1, False)[..., 0].long()
        M, C, K = self._shape
        at_BT = (mark_BT * C + class_BT) * K + kept_BT
        at_N = at_BT[verified_positions(kept_BT)]
        any_N = M * C * K + kept_BT[kept_BT >= 0]
        self._counts += torch.cat([at_N, any_N]).bincount(minlength=len(self._counts))

    def figures(self) -> dict:
        """The figures over all ranks; a collective.

        Returns:
            ``tokens_per_forward``; ``per_head``: for heads 1..K-1 the share of verified positions
            at which the guesses of all heads up to it are kept, of which it is 1 + the sum;
            ``acceptance_length``: the same as it over all positions, as an evaluation has it;
            ``by_class``: for each class that occurs, and for marked and clean tokens if any is
            marked, the ``share`` of verified positions and ``tokens_per_forward``. A model of one
            head has no classes. Empty if no position has targets for all heads.
        """
        (counts,) = all_reduce_sum(self._counts.to(self._device))
        *_, K = self._shape
        counts_MCK, any_K = counts[:-K].view(self._shape).cpu(), counts[-K:].cpu()
        n = float(counts_MCK.sum())
        if not n:
            return {}
        groups = dict(zip(CLASSES, counts_MCK.sum(0), strict=True)) if K > 1 else {}
        if K > 1 and counts_MCK[1].any():
            groups |= dict(zip(MARKS, counts_MCK.sum(1), strict=True))
        counts_K = counts_MCK.sum((0, 1))
        return {
            "tokens_per_forward": _tokens_per_forward(counts_K),
            "acceptance_length": _tokens_per_forward(any_K),
            "per_head": [float(counts_K[k:].sum()) / n for k in range(1, K)],
            "by_class": {
                name: {
                    "share": float(of_K.sum()) / n,
                    "tokens_per_forward": _tokens_per_forward(of_K),
                }
                for name, of_K in groups.items()
                if of_K.any()
            },
        }


def _tokens_per_forward(counts_K: torch.Tensor) -> float:
    """1 + the mean number of kept guesses, from how often each number occurred."""
    return 1 + float((counts_K * torch.arange(len(counts_K))).sum() / counts_K.sum())


def acceptance_metrics(figures: dict) -> dict[str, float]:
    """``Acceptance.figures`` under names that every logger takes; empty of an empty one."""
    if not figures:
        return {}
    return {
        "tokens_per_forward": figures["tokens_per_forward"],
        "acceptance_length": figures["acceptance_length"],
        **{f"acceptance_head_{k}": share for k, share in enumerate(figures["per_head"], start=1)},
        **{
            f"tokens_per_forward/{name}": one["tokens_per_forward"]
            for name, one in figures["by_class"].items()
        },
    }
