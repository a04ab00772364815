"""The decoding loop: the model drafts its own next tokens and one forward checks them.

Shapes: B rows, S positions fed at once, K heads, D model width, V vocabulary, N new tokens.

Heads 1, 2, ... at the position of the last token guess the tokens after the next one. The next
forward is fed that next token and the guesses. Head 0 draws at each of these positions as it
always would, and its draws count as long as the previous draw equals the guess that was fed. A
guess therefore decides how far a forward gets, never what is generated: the tokens are those of
decoding one at a time, both greedily and when sampling with the same uniform numbers. Without
guesses (S = 1) the same loop is plain decoding.

Rows have prompts of different lengths and accept different numbers of tokens, so they are at
different positions. Padding and rejected guesses lie after a row's own positions, where no query of
the row looks before they are overwritten.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.new_text import NewText
from wmtp_modules.generation.sampling import draw_tokens
from wmtp_modules.models.mtp_transformer import MTPTransformer

FinishReason = Literal["eos", "stop", "length"]


def count_kept(fed_BS: torch.Tensor, draws_BS: torch.Tensor) -> torch.Tensor:
    """How many guesses of each row (after its last token) head 0 draws, up to the first miss."""
    return (fed_BS[:, 1:] == draws_BS[:, :-1]).cumprod(dim=1).sum(dim=1)


class Row:
    """The host's record of one request: its tokens, its text, whether it has ended, and counts."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Llama2Tokenizer,
        stop: tuple[str, ...],
        max_new_tokens: int,
        n_drafts: int,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = NewText(tokenizer, prompt, stop)
        self.finish_reason: FinishReason | None = None
        self.forwards = 0
        self.accepted = [0] * n_drafts
        self._eos_id = tokenizer.eos_id
        self._max_new_tokens = max_new_tokens

    @property
    def position(self) -> int:
        """Position of the last token."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def ended_by(self) -> FinishReason:
        assert self.finish_reason is not None, "the row has not ended"
        return self.finish_reason

    def take(self, run: list[int]) -> None:
        """Take the tokens of one forward, in order, until one of them ends the row."""
        for i, token in enumerate(run):
            self.tokens.append(token)
            if i:
                self.accepted[i - 1] += 1  # token i comes after guesses 1..i
            if token == self._eos_id:
                self.finish_reason = "eos"
            elif self.text.push(token):
                self.finish_reason = "stop"
            elif len(self.tokens) == self._max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                return


class Decoder:
    """Decodes a batch of rows, not yet started, until all have ended.

    Rows that have ended leave the batch together with their keys and values: copying the caches
    costs about as much as one forward reads of them, and a row that stays would cost that in every
    forward.

    Args:
        model: with caches for the distinct prompts, in eval mode, not sharded.
        uniforms_BN: fp64, on the model's device; None for greedy decoding.
        n_drafts: guesses per forward, less than the model's number of heads; 0 is plain decoding,
            in which only the trunk and head 0 run.
        sampling: temperature, top_k and top_p; see ``draw_tokens``.
    """

    def __init__(
        self,
        model: MTPTransformer,
        rows: list[Row],
        uniforms_BN: torch.Tensor | None,
        *,
        n_drafts: int,
        **sampling: Any,
    ) -> None:
        self.model = model
        self.rows = rows
        self.n_drafts = n_drafts
        self._uniforms_BN = uniforms_BN
        self._sampling = sampling
        self._device = model.tok_embeddings.weight.device
        self._prompt_B = self._ids([len(row.prompt) for row in rows])
        # Position of each row's last token, whose successor is drawn next.
        self._position_B = self._prompt_B - 1

    def run(self) -> None:
        """Decode until every row has ended; ValueError if the model's logits are not finite."""
        fed_BS, hidden_KBSD = self._prefill()
        while True:
            draws_BS, finite_B = self._draw(hidden_KBSD[0])
            kept_B = count_kept(fed_BS, draws_BS)
            # The only wait for the device in a step.
            table = torch.cat([draws_BS, kept_B[:, None], finite_B[:, None]], dim=1).tolist()
            for row, (*draws, kept, finite) in zip(self.rows, table, strict=True):
                if not finite:
                    raise ValueError(
                        f"the model's logits after token {row.position} are not finite: check the "
                        "checkpoint and the dtype"
                    )
                row.take(draws[: kept + 1])
            self._position_B = self._position_B + kept_B + 1
            live = [b for b, row in enumerate(self.rows) if row.finish_reason is None]
            if not live:
                return
            all_B = torch.arange(len(self.rows), device=self._device)
            last_B = draws_BS[all_B, kept_B]
            hidden_KBD = [hidden_BSD[all_B, kept_B] for hidden_BSD in hidden_KBSD[1:]]
            if len(live) < len(self.rows):
                live_B = self._ids(live)
                last_B = last_B[live_B]
                hidden_KBD = [hidden_BD[live_B] for hidden_BD in hidden_KBD]
                self._select(live, live_B)
            fed_BS = last_B[:, None]
            if self.n_drafts:
                logits_BKV = self.model.output(torch.stack(hidden_KBD, dim=1))
                fed_BS = torch.cat([fed_BS, self.draft(logits_BKV)], dim=1)
            hidden_KBSD = self._decode(fed_BS)

    def draft(self, logits_BKV: torch.Tensor) -> torch.Tensor:
        """Guess the tokens after the last one of each row, from the logits of heads 1..n_drafts.

        The most likely tokens, also when sampling: head 0, which sees the tokens in between, is
        more certain than the other heads, so its draw is usually that token.
        """
        return logits_BKV.argmax(-1)

    def _ids(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _prefill(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run each distinct prompt once, and give every row its copy of the caches.

        Returns the rows' last tokens fed_BS and each head's output there, both with S = 1.
        """
        prompts = list(dict.fromkeys(row.prompt for row in self.rows))
        place = {prompt: u for u, prompt in enumerate(prompts)}
        T = max(map(len, prompts))
        # Padded on the right with an arbitrary token: see the top of the file.
        tokens_UT = self._ids([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts])
        pos_UT = torch.arange(T, device=self._device).expand(len(prompts), T)
        hidden_KUTD = self._heads(tokens_UT, pos_UT, T)
        rows_B = self._ids([place[row.prompt] for row in self.rows])
        self.model.select_cache_rows(rows_B)
        at = (rows_B[:, None], self._position_B[:, None])
        return tokens_UT[at], [hidden_UTD[at] for hidden_UTD in hidden_KUTD]

    def _decode(self, fed_BS: torch.Tensor) -> list[torch.Tensor]:
        """One forward over each row's last token and its guesses; every head's output [B, S, D]."""
        S = fed_BS.shape[1]
        for row in self.rows:
            row.forwards += 1
        pos_BS = self._position_B[:, None] + torch.arange(S, device=self._device)
        # Guesses beyond max_new_tokens share the last position, which no accepted draw reads.
        end = min(max(row.position for row in self.rows) + S, self.model.cache_len)
        return self._heads(fed_BS, pos_BS.clamp(max=end - 1), end)

    def _heads(self, tokens_BS: torch.Tensor, pos_BS: torch.Tensor, end: int) -> list[torch.Tensor]:
        """Output of the heads in use; those that draft see every token, to cache its key."""
        mask = self.model.place_in_caches(pos_BS, end)
        hidden_BSD = self.model.trunk(tokens_BS, mask=mask, input_pos=pos_BS)
        heads = self.model.heads[: 1 + self.n_drafts]
        return [head(hidden_BSD, mask=mask, input_pos=pos_BS) for head in heads]

    def _draw(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head 0's draw at each position, and whether all logits of the row are finite."""
        logits_BSV = self.model.output(hidden_BSD)
        uniforms_BS = None
        if self._uniforms_BN is not None:
            first_B = self._position_B + 1 - self._prompt_B  # index of the token drawn first
            index_BS = first_B[:, None] + torch.arange(hidden_BSD.shape[1], device=self._device)
            last = self._uniforms_BN.shape[1] - 1
            uniforms_BS = self._uniforms_BN.gather(1, index_BS.clamp(max=last))
        draws_BS = draw_tokens(logits_BSV, uniforms_BS, **self._sampling)
        return draws_BS, logits_BSV.isfinite().flatten(1).all(dim=1)

    def _select(self, live: list[int], live_B: torch.Tensor) -> None:
        self.rows = [self.rows[b] for b in live]
        self._prompt_B = self._prompt_B[live_B]
        self._position_B = self._position_B[live_B]
        if self._uniforms_BN is not None:
            self._uniforms_BN = self._uniforms_BN[live_B]
        self.model.select_cache_rows(live_B)
