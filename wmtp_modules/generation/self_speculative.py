"""The decoding loop: the model drafts its own next tokens and one forward checks them.

Shapes: B rows, S positions fed at once, K heads, D model width, V vocabulary, N new tokens.

Heads 1, 2, ... at the position of the last token guess the tokens after the next one. The next
forward is fed that next token and the guesses. Head 0 draws at each of these positions as it
always would, and its draws count as long as the previous draw equals the guess that was fed. A
guess therefore decides how far a forward gets, never what is generated: the tokens are those of
decoding one at a time, both greedily and when sampling with the same uniform numbers. Without
guesses (S = 1) the same loop is plain decoding.

Rows have prompts of different lengths and accept different numbers of tokens, so they are at
different positions. Padding, rejected guesses and what an earlier row left behind lie after a row's
own positions, where no query of the row looks before they are overwritten.

Rows live in slots: places in the caches and in the tensors that a forward reads. Rows that end
leave, and waiting ones enter (continuous batching: Yu et al. 2022, Orca). The rows being decoded
have the first slots, so that a forward without holes is a slice.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.new_text import NewText
from wmtp_modules.generation.sampling import draw_tokens, request_uniforms
from wmtp_modules.models.mtp_transformer import MTPTransformer

FinishReason = Literal["eos", "stop", "length"]


def count_kept(fed_BS: torch.Tensor, draws_BS: torch.Tensor) -> torch.Tensor:
    """How many guesses of each row (after its last token) head 0 draws, up to the first miss."""
    return (fed_BS[:, 1:] == draws_BS[:, :-1]).cumprod(dim=1).sum(dim=1)


class Row:
    """The host's record of one request: its tokens, its text, whether it has ended, and counts.

    ``index`` is the request's place among the others, ``seed`` that of its uniform numbers.
    """

    def __init__(
        self,
        index: int,
        seed: int,
        prompt: tuple[int, ...],
        tokenizer: Llama2Tokenizer,
        stop: tuple[str, ...],
        max_new_tokens: int,
        n_drafts: int,
    ) -> None:
        self.index = index
        self.seed = seed
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
    """Decodes rows, not yet started, and keeps as many slots busy as it can.

    Args:
        model: with caches of one row for each slot, as long as the longest row may become, in eval
            mode, not sharded.
        rows: in the order in which they enter.
        n_slots: rows decoded together at most.
        n_drafts: guesses per forward, less than the model's number of heads; 0 is plain decoding,
            in which only the trunk and head 0 run.
        max_new_tokens: most tokens of a row.
        static_shapes: every forward has all slots, the idle ones too, and the whole caches, so that
            its shapes never change; on a GPU it is recorded once and replayed.
        sampling: temperature, top_k and top_p; see ``draw_tokens``.
    """

    def __init__(
        self,
        model: MTPTransformer,
        rows: Sequence[Row],
        *,
        n_slots: int,
        n_drafts: int,
        max_new_tokens: int,
        static_shapes: bool,
        **sampling: Any,
    ) -> None:
        self.model = model
        self.rows: list[Row] = []  # of slots 0, 1, ...
        self.n_drafts = n_drafts
        self._waiting = deque(rows)
        self._n_slots = n_slots
        self._max_new_tokens = max_new_tokens
        self._static_shapes = static_shapes
        self._sampling = sampling
        weight = model.tok_embeddings.weight
        self._device = weight.device
        # For each slot: its row's prompt, whose keys stay in the caches also when the row has left,
        # and the output of the heads in use at the prompt's last token.
        self._prompts: list[tuple[int, ...] | None] = [None] * n_slots
        self._hidden_BKD = weight.new_zeros(n_slots, 1 + n_drafts, weight.shape[1])
        self._fed_BS = self._zeros(n_slots, 1 + n_drafts)  # the last token and the guesses
        self._position_B = self._zeros(n_slots)  # of the last token, whose successor is drawn next
        self._drawn_B = self._zeros(n_slots)  # number of tokens drawn
        n_uniforms = max_new_tokens if sampling["temperature"] > 0 else 0
        self._uniforms_BN = self._zeros(n_slots, n_uniforms).double()

    def run(self) -> Iterator[Row]:
        """Decode, and yield each row as it ends; ValueError if logits are not finite.

        Rows wait until a quarter of the slots is free, so that they share a prefill: entering one
        by one, 16 rows of 22 forwards would need a prefill in three of four forwards.
        """
        forward = self._forward
        if self._static_shapes and self._device.type == "cuda":
            forward = _recorded(forward)
        enough = max(1, self._n_slots // 4)
        while self.rows or self._waiting:
            free = self._n_slots - len(self.rows)
            if self._waiting and free >= min(enough, len(self._waiting)):
                self._enter(free)
            else:
                for row in self.rows:
                    row.forwards += 1
                self._take(self.rows, forward())
            yield from self._leave()

    def draft(self, logits_BKV: torch.Tensor) -> torch.Tensor:
        """Guess the tokens after the last one of each row, from the logits of heads 1..n_drafts.

        The most likely tokens, also when sampling: head 0, which sees the tokens in between, is
        more certain than the other heads, so its draw is usually that token.
        """
        return logits_BKV.argmax(-1)

    def _ids(self, values: Sequence[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _enter(self, most: int) -> None:
        """Prefill waiting rows into the slots behind the others, and draw their first tokens.

        A prompt whose keys lie in a slot is not run again.
        """
        first = len(self.rows)
        while self._waiting and len(self.rows) < first + most:
            self.rows.append(self._waiting.popleft())
        entered = self.rows[first:]
        holders = {row.prompt: slot for slot, row in enumerate(self.rows[:first])}
        new, copies = [], {}
        for slot, row in enumerate(entered, first):
            if self._prompts[slot] != row.prompt:
                if row.prompt in holders:
                    copies[slot] = holders[row.prompt]
                else:
                    new.append(slot)
            holders.setdefault(row.prompt, slot)
            self._prompts[slot] = row.prompt
        if new:
            self._prefill(new)
        if copies:
            longest = max(len(self.rows[slot].prompt) for slot in copies)
            self._copy_slots(list(copies.values()), list(copies), longest)
        slots = slice(first, len(self.rows))
        self._position_B[slots] = self._ids([len(row.prompt) - 1 for row in entered])
        self._drawn_B[slots] = 0
        if self._uniforms_BN.shape[1]:
            self._uniforms_BN[slots] = request_uniforms(
                [row.seed for row in entered], self._max_new_tokens
            ).to(self._device)
        hidden_BKSD = self._hidden_BKD[slots, :, None]
        self._take(entered, self._advance(slots, self._fed_BS[slots, :1], hidden_BKSD.unbind(1)))

    def _prefill(self, slots: list[int]) -> None:
        """Run the prompts of these slots."""
        prompts = [self.rows[slot].prompt for slot in slots]
        T = max(map(len, prompts))
        slots_B = self._ids(slots)
        self.model.place_prompts_in_caches(slots_B, T)
        # Padded on the right with an arbitrary token: see the top of the file.
        tokens_BT = self._ids([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts])
        hidden_KBTD = self._heads(tokens_BT)
        at = (torch.arange(len(slots), device=self._device), self._ids([*map(len, prompts)]) - 1)
        self._hidden_BKD[slots_B] = torch.stack([hidden[at] for hidden in hidden_KBTD], dim=1)

    def _forward(self) -> torch.Tensor:
        """One forward over each row's last token and its guesses; see ``_advance``.

        With static shapes nothing of it depends on a value that the host knows.
        """
        S = 1 + self.n_drafts
        n, end, alike = self._n_slots, self.model.cache_len, False
        if not self._static_shapes:
            positions = [row.position for row in self.rows]
            n, end = len(positions), min(max(positions) + S, end)
            alike = S == 1 and min(positions) == max(positions)
        slots = slice(0, n)
        fed_BS = self._fed_BS[slots]
        # Guesses beyond max_new_tokens share the last position, which no accepted draw reads.
        pos_BS = self._position_B[slots, None] + torch.arange(S, device=self._device)
        pos_BS = pos_BS.clamp(max=end - 1)
        mask = self.model.place_in_caches(pos_BS, end, masked=not alike)
        return self._advance(slots, fed_BS, self._heads(fed_BS, mask=mask, input_pos=pos_BS))

    def _heads(self, tokens_BS: torch.Tensor, **where: torch.Tensor | None) -> list[torch.Tensor]:
        """Output of the heads in use; those that draft see every token, to cache its key."""
        hidden_BSD = self.model.trunk(tokens_BS, **where)
        return [head(hidden_BSD, **where) for head in self.model.heads[: 1 + self.n_drafts]]

    def _advance(
        self, slots: slice, fed_BS: torch.Tensor, hidden_KBSD: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Draw behind the tokens fed, move the slots on, and guess what comes next.

        Returns:
            int64 [B, S + 2]: head 0's draws, how many guesses they confirm, and whether all logits
            are finite.
        """
        logits_BSV = self.model.output(hidden_KBSD[0])
        uniforms_BS = None
        if self._uniforms_BN.shape[1]:
            index_BS = self._drawn_B[slots, None] + torch.arange(
                fed_BS.shape[1], device=self._device
            )
            index_BS = index_BS.clamp(max=self._max_new_tokens - 1)
            uniforms_BS = self._uniforms_BN[slots].gather(1, index_BS)
        draws_BS = draw_tokens(logits_BSV, uniforms_BS, **self._sampling)
        finite_B = logits_BSV.isfinite().flatten(1).all(dim=1)
        kept_B = count_kept(fed_BS, draws_BS)
        table = torch.cat([draws_BS, kept_B[:, None], finite_B[:, None]], dim=1)
        self._position_B[slots] += kept_B + 1
        self._drawn_B[slots] += kept_B + 1
        self._fed_BS[slots, :1] = draws_BS.gather(1, kept_B[:, None])
        if self.n_drafts:
            at = (torch.arange(len(kept_B), device=self._device), kept_B)
            hidden_BKD = torch.stack([hidden[at] for hidden in hidden_KBSD[1:]], dim=1)
            self._fed_BS[slots, 1:] = self.draft(self.model.output(hidden_BKD))
        return table

    def _take(self, rows: list[Row], table: torch.Tensor) -> None:
        # The only wait for the device in a step.
        for row, (*draws, kept, finite) in zip(rows, table[: len(rows)].tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"the model's logits after token {row.position} are not finite: check the "
                    "checkpoint and the dtype"
                )
            row.take(draws[: kept + 1])

    def _leave(self) -> list[Row]:
        """Take out the rows that have ended; the last ones move into their slots."""
        ended = [row for row in self.rows if row.finish_reason]
        n = len(self.rows) - len(ended)
        holes = [slot for slot, row in enumerate(self.rows[:n]) if row.finish_reason]
        moved = [slot for slot, row in enumerate(self.rows[n:], n) if not row.finish_reason]
        if moved:
            self._copy_slots(moved, holes, max(self.rows[slot].position for slot in moved))
            for slot, hole in zip(moved, holes, strict=True):
                self.rows[hole] = self.rows[slot]
                self._prompts[hole] = self._prompts[slot]
        del self.rows[n:]
        return ended

    def _copy_slots(self, source: list[int], to: list[int], end: int) -> None:
        """Copy all that the device knows of slots, keys and values up to position ``end``."""
        source_B, to_B = self._ids(source), self._ids(to)
        self.model.copy_cache_rows(source_B, to_B, end)
        for tensor in (
            self._hidden_BKD,
            self._fed_BS,
            self._position_B,
            self._drawn_B,
            self._uniforms_BN,
        ):
            tensor[to_B] = tensor[source_B]


def _recorded(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record a forward of static shapes as a CUDA graph; the result replays it.

    Written after PyTorch's notes on CUDA graphs (warm-up on a side stream, then capture) and not
    run: no GPU was at hand. What the warm-up leaves in the slots is overwritten as rows enter.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return table

    return replay
