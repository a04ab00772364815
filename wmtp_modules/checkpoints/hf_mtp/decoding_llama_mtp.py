# SPDX-License-Identifier: MIT
"""Self-speculative decoding of a ``LlamaMTPForCausalLM``. Needs torch and transformers only.

Shapes: B rows, S positions fed at once, K heads, D width, V vocabulary.

Heads 1, 2, ... at a row's last token guess the tokens after the next one. The next forward is fed
that next token and the guesses; head 0 draws at each of these positions as it always would, and its
draws count as long as the one before equals the guess that was fed. Rows accept different numbers
of tokens, so each has positions of its own: its tokens without padding lie at 0, 1, ... in the
caches, and rejected guesses after them, where no query of the row looks before they are
overwritten.
"""

import inspect

import torch
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(LlamaDecoderLayer.forward).parameters
)

# They read the logits of one position and nothing else, so positions may be given to them as rows.
WITHOUT_CONTEXT = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
}
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def why_not(
    model, input_ids, logits_processor, stopping_criteria, config, synced_gpus, streamer, kwargs
):
    """Why a call of ``generate`` cannot be decoded self-speculatively; None if it can.

    (Beams, assistants and the like do not come here: ``transformers`` has loops of their own for
    them, which know nothing of heads.)
    """
    B = input_ids.shape[0]
    names = [type(processor).__name__ for processor in logits_processor]
    others = [name for name in names if name not in WITHOUT_CONTEXT]
    outputs = [name for name in OUTPUTS if getattr(config, name, None)]
    attention = model.config._attn_implementation
    caches = [kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None]
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    mask_BT = kwargs.get("attention_mask")
    reasons = {
        "a prompt is empty": mask_BT is not None and not mask_BT.any(dim=1).all(),
        "the model has one head": not len(model.extra_heads),
        f"{', '.join(others)} may look at the tokens before": others,
        f"{', '.join(outputs)} asks for every forward's": config.return_dict_in_generate
        and outputs,
        "a streamer takes one row only": streamer is not None and B > 1,
        "there is no eos_token_id, without which rows do not end by themselves": B > 1 and not ends,
        f"attn_implementation is {attention}, not sdpa or eager": attention
        not in ("sdpa", "eager"),
        "the prompt continues a cache": any(cache.get_seq_length() > 0 for cache in caches),
        "use_cache is off": kwargs.get("use_cache") is False,
        "the prompt is inputs_embeds": kwargs.get("inputs_embeds") is not None,
        "position_ids are not those of the attention mask": _other_positions(kwargs),
        "ranks run in step (synced_gpus)": synced_gpus,
        "the model trains with gradient checkpointing": model.training
        and model.is_gradient_checkpointing,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _other_positions(kwargs):
    """Whether the caller's positions are others than the count of tokens before."""
    given_BT, mask_BT = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if given_BT is None:
        return False
    if mask_BT is None:
        return bool((given_BT != torch.arange(given_BT.shape[1], device=given_BT.device)).any())
    return bool(((given_BT != mask_BT.cumsum(-1) - 1) & (mask_BT == 1)).any())


class RowCache:
    """Keys and values of every block, each row at positions of its own.

    Takes the place of transformers' caches in its attention, which calls ``update`` only.
    """

    def __init__(self):
        self.layers = {}  # by index: keys and values, [B, heads, capacity, head width]
        self.position_BS, self.end = torch.empty(0), 0

    def place(self, position_BS, end):
        """Where the next forward's tokens go; it sees the positions below ``end``."""
        self.position_BS, self.end = position_BS, end

    def update(self, key, value, layer_idx, *args, **kwargs):
        new = (key, value)  # [B, heads, S, head width]
        stored = self.layers.get(layer_idx)
        if stored is None or stored[0].shape[2] < self.end:
            grown = [x.new_zeros(*x.shape[:2], 2 * self.end, x.shape[3]) for x in new]
            for old, wider in zip(stored or (), grown, strict=False):
                wider[:, :, : old.shape[2]] = old
            stored = self.layers[layer_idx] = grown
        position_BS = self.position_BS.to(key.device)
        row_B1 = torch.arange(key.shape[0], device=key.device)[:, None]
        for x, kept in zip(new, stored, strict=True):
            kept[row_B1, :, position_BS] = x.transpose(1, 2)
        return tuple(kept[:, :, : self.end] for kept in stored)

    def select(self, rows):
        """Keep these rows, in this order."""
        for index, stored in self.layers.items():
            self.layers[index] = [x[rows.to(x.device)] for x in stored]


class Noise:
    """The random numbers with which ``torch.multinomial`` draws a plain ``generate``'s tokens.

    It takes argmax_v of probs[v] / q[v], q exponential, one [B, V] a step. Step n's are kept until
    every row has had its n-th token. At the end the generator stands where a plain run leaves it.
    """

    def __init__(self, B, V, device):
        self._shape, self._device = (B, V), device
        self._drawn, self._first, self._states = [], 0, []
        self._rng = torch if device.type == "cpu" else torch.get_device_module(device)
        self._of = () if device.type == "cpu" else (device,)

    def at(self, rows, index_BS):
        """q of each row's tokens with these indices, [B, S, V]."""
        while self._first + len(self._drawn) <= max(map(max, index_BS)):
            self._states.append(self._rng.get_rng_state(*self._of))
            self._drawn.append(torch.empty(self._shape, device=self._device).exponential_())
        least = min(map(min, index_BS))
        del self._drawn[: least - self._first]
        self._first = least
        return torch.stack(
            [
                torch.stack([self._drawn[n - self._first][row] for n in index_S])
                for row, index_S in zip(rows, index_BS, strict=True)
            ]
        )

    def close(self, n_tokens):
        if n_tokens < len(self._states):
            self._rng.set_rng_state(self._states[n_tokens], *self._of)


@torch.no_grad()
def decode(
    model, input_ids, logits_processor, stopping_criteria, config, streamer, attention_mask_BT
):
    """Decode until every row has ended.

    Returns what ``transformers``' own loop returns, and new tokens of a row per forward after the
    prompt's (None if there was none).
    """
    B, T = input_ids.shape
    device = model.model.embed_tokens.weight.device  # prompts may lie elsewhere
    K = 1 + len(model.extra_heads)
    cache, blocks, head_0 = RowCache(), model.model.layers[:-1], model.model.layers[-1]
    heads = [head_0, *model.extra_heads]
    noise = None
    if config.do_sample:
        noise = Noise(B, model.config.vocab_size, input_ids.device)

    def forward(tokens_BS, position_BS, end):
        """Each head's output [B, S, D]; those that guess see every token, to cache its key."""
        cache.place(position_BS, end)
        hidden = model.model.embed_tokens(tokens_BS)
        mask = None
        if end > tokens_BS.shape[1] or model.config._attn_implementation == "eager":
            sees = torch.arange(end, device=device) <= position_BS[:, :, None]
            mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=device)
            mask = mask.masked_fill(~sees, torch.finfo(hidden.dtype).min)[:, None]
        how = {
            "attention_mask": mask,  # None: causal
            "position_ids": position_BS,
            "position_embeddings": model.model.rotary_emb(hidden, position_ids=position_BS),
            CACHE: cache,
            "use_cache": True,
        }
        for block in blocks:
            hidden = block(hidden, **how)
        return [head(hidden, **how).to(device) for head in heads]

    def logits_of(hidden):
        return model.lm_head(model.model.norm(hidden)).to(device, torch.float32)

    # Without padding: a row's tokens from position 0 on, anything after them.
    prompts = [
        ids if attention_mask_BT is None else ids[attention_mask_BT[b].bool()]
        for b, ids in enumerate(input_ids)
    ]
    longest = max(map(len, prompts))
    tokens_BT = torch.zeros(B, longest, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    position_BT = torch.arange(longest, device=device).expand(B, longest)
    hidden_K = forward(tokens_BT, position_BT, longest)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    at = (torch.arange(B, device=device)[:, None], last_B[:, None])
    fed_BS, hidden_K = tokens_BT[at], [hidden[at] for hidden in hidden_K]

    # As the criteria see a row: with its padding, on the CPU, where they cost no wait.
    ids_BL = input_ids.cpu()
    length = [T] * B  # of each row's tokens there
    rows = [*range(B)]  # of ``ids_BL`` that are still decoded
    tokens = forwards = 0
    while True:
        S = fed_BS.shape[1]
        logits_BSV = logits_of(hidden_K[0])
        scores_BSV = logits_BSV
        if logits_processor:
            flat = logits_BSV.flatten(0, 1)
            scores_BSV = logits_processor(fed_BS.reshape(-1, 1), flat).view_as(logits_BSV)
        if noise is None:
            draws_BS = scores_BSV.argmax(-1)
        else:
            q_BSV = noise.at(rows, [[length[b] - T + s for s in range(S)] for b in rows])
            draws_BS = (scores_BSV.softmax(-1) / q_BSV.to(device)).argmax(-1)
        kept_B = (fed_BS[:, 1:] == draws_BS[:, :-1]).cumprod(dim=1).sum(dim=1)
        is_nan_B = logits_BSV.isnan().flatten(1).any(dim=1)
        table = torch.cat([draws_BS, kept_B[:, None], is_nan_B[:, None]], dim=1)
        host = table.cpu()  # the step's only wait
        if host[:, -1].any():
            raise ValueError("the model's logits are NaN: check its weights and their dtype")
        need = max(length) + S
        if ids_BL.shape[1] < need:
            ids_BL = torch.nn.functional.pad(ids_BL, (0, 2 * need - ids_BL.shape[1]))
        live = []
        for i, b in enumerate(rows):
            ended = False
            for token in host[i, : int(host[i, -2]) + 1]:
                ids_BL[b, length[b]] = token
                length[b] += 1
                tokens += length[b] > T + 1
                if streamer is not None:
                    streamer.put(token[None])
                if stopping_criteria(ids_BL[b : b + 1, : length[b]], None).item():
                    ended = True
                    break
            if not ended:
                live.append(i)
        if not live:
            break
        all_B = torch.arange(len(rows), device=device)
        next_B = draws_BS[all_B, kept_B]
        hidden_K = [hidden[all_B, kept_B] for hidden in hidden_K]
        last_B = last_B + kept_B + 1
        if len(live) < len(rows):
            live_B = torch.tensor(live, device=device)
            rows = [rows[i] for i in live]
            next_B, last_B = next_B[live_B], last_B[live_B]
            hidden_K = [hidden[live_B] for hidden in hidden_K]
            cache.select(live_B)
        # The most likely tokens, also when sampling: head 0, which sees the tokens in between, is
        # more certain than the other heads.
        guesses_BS = logits_of(torch.stack(hidden_K[1:], dim=1)).argmax(-1)
        fed_BS = torch.cat([next_B[:, None], guesses_BS], dim=1)
        position_BS = last_B[:, None] + torch.arange(K, device=device)
        # Without padding no row is longer than its tokens with it.
        end = max(length[b] - T + len(prompts[b]) for b in rows) - 1 + K
        hidden_K = forward(fed_BS, position_BS, end)
        forwards += len(rows)
    if streamer is not None:
        streamer.end()
    if noise is not None:
        noise.close(max(length) - T)
    ids_BL = ids_BL[:, : max(length)]
    for b in range(B):
        if length[b] < max(length):
            ids_BL[b, length[b] :] = config._pad_token_tensor.item()
    ids_BL = ids_BL.to(input_ids.device)
    per_forward = tokens / forwards if forwards else None
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids_BL), per_forward
    return ids_BL, per_forward
