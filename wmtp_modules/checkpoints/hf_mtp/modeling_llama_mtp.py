# SPDX-License-Identifier: MIT
"""A Llama with multi-token-prediction heads (arXiv 2404.19737). Needs torch and transformers only.

Shapes: B batch, T positions, K heads, D width, V vocabulary. Head k at position t predicts token
t + k + 1. Head 0 is the last of ``model.layers``, so a plain Llama that reads these files is trunk
and head 0. Heads 1..K - 1 are ``extra_heads``; all heads read the output of the block before the
last and share ``model.norm`` and ``lm_head``.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from .decoding_llama_mtp import CACHE_NAMES, decode, why_not

logger = logging.get_logger(__name__)

_switched_on = ContextVar("mtp", default=True)  # of the ``generate`` that runs in this thread


@dataclass
class MTPOutput(CausalLMOutputWithPast):
    """``loss`` over all heads; ``losses`` of each, fp32 [K], NaN without targets."""

    losses: torch.Tensor | None = None


class LlamaMTPForCausalLM(LlamaForCausalLM):
    """``config.n_future_tokens`` is K.

    Attributes:
        last_tokens_per_forward: new tokens of a row per forward in the last ``generate``, without
            the prompt's forward and its token. 1.0 where it decoded plainly, None where nothing
            followed the prompt's forward.
    """

    def __init__(self, config):
        super().__init__(config)
        self.extra_heads = nn.ModuleList(
            LlamaDecoderLayer(config, config.num_hidden_layers + k)
            for k in range(config.n_future_tokens - 1)
        )
        self.last_tokens_per_forward: float | None = None
        self.post_init()

    @wraps(LlamaForCausalLM.forward, assigned=(), updated=())  # its signature, which others read
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, *, labels=None, **kwargs
    ):
        """Logits of head 0, as any causal language model; with labels the losses of all heads.

        Args:
            labels: [B, T], the token at each position or -100, which is ignored. Head k at t has
                the target ``labels[:, t + k + 1]``. Where ``position_ids`` begin anew, another
                document begins, across which nothing is predicted.
            num_items_in_batch: as transformers' Trainer gives it under gradient accumulation, the
                targets of head 0 in the whole step: the loss is then the mean over heads of their
                sums over it. Without it: the mean over all targets of all heads.
        """
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        if labels is None:
            return super().forward(**inputs, **kwargs)
        for name in CACHE_NAMES:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"labels need a whole row: give no {name} with them")
        n_items = kwargs.pop("num_items_in_batch", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        logits_to_keep = kwargs.pop("logits_to_keep", 0)
        hidden_K = self._hidden(**inputs, **kwargs | {"use_cache": False})
        T = labels.shape[1]
        logits = self.lm_head(hidden_K[0])
        sums, counts = [], []
        for k, hidden_BTD in enumerate(hidden_K):
            n = max(T - k - 1, 0)
            targets = labels[:, k + 1 :]
            if position_ids is not None:
                same = position_ids[:, k + 1 :] - position_ids[:, :n] == k + 1
                targets = targets.masked_fill(~same, -100)
            # fp32; training holds the logits of all heads (our recipes hold a chunk of them).
            logits_k = logits[:, :n] if k == 0 else self.lm_head(hidden_BTD[:, :n])
            flat = logits_k.float().flatten(0, 1)
            sums.append(cross_entropy(flat, targets.to(flat.device).flatten(), reduction="sum"))
            counts.append((targets != -100).sum())
        sums_K, counts_K = torch.stack(sums), torch.stack(counts).to(sums[0].device)
        if n_items is None:
            loss = sums_K.sum() / counts_K.sum().clamp(min=1)
        else:
            loss = sums_K.mean() / n_items
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        losses_K = (sums_K / counts_K).detach()
        out = MTPOutput(loss=loss, logits=logits[:, keep], losses=losses_K)
        return out.to_tuple() if as_tuple else out

    def mtp_logits(self, input_ids, attention_mask=None, position_ids=None):
        """Logits of every head, fp32 [B, T, K, V]."""
        hidden_K = self._hidden(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
        return torch.stack([self.lm_head(hidden_BTD) for hidden_BTD in hidden_K], dim=2).float()

    def _hidden(self, **inputs):
        """What ``lm_head`` reads of each head, K times [B, T, D].

        Heads 1..K - 1 are given what head 0 is given: trunk output, mask and positions.
        """
        given = []
        hook = self.model.layers[-1].register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        try:
            hidden_BTD = self.model(**inputs).last_hidden_state
        finally:
            hook.remove()
        ((args, kwargs),) = given
        return [hidden_BTD, *(self.model.norm(head(*args, **kwargs)) for head in self.extra_heads)]

    def generate(self, inputs=None, *args, mtp=True, **kwargs):
        """``transformers``' ``generate``, self-speculative where it can be: the text is the same.

        Heads 1..K - 1 guess the next tokens, and one forward of head 0 checks them. Greedy text is
        that of ``mtp=False``, and so is sampled text after the same ``torch.manual_seed``: a token
        is drawn with the random numbers that a plain ``generate`` would draw it with. (Up to the
        rounding of logits, which depends on how many positions a forward has.)

        What cannot be checked this way falls back to plain decoding, says so once and sets
        ``last_tokens_per_forward`` to 1.0: see ``why_not``.

        Args:
            mtp: False leaves all to ``transformers``.
        """
        self.last_tokens_per_forward = None
        if isinstance(kwargs.get("custom_generate"), str):
            kwargs["mtp"] = mtp  # comes back here by custom_generate/generate.py
        token = _switched_on.set(mtp)
        try:
            # Its `self` is typed as a protocol, which its own models do not meet.
            return super().generate(inputs, *args, **kwargs)  # pyrefly: ignore[bad-argument-type]
        finally:
            _switched_on.reset(token)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """The loop of greedy decoding and sampling, which ``transformers`` calls when all else is
        ready: prompt, processors of logits, criteria."""
        how = (input_ids, logits_processor, stopping_criteria, generation_config)
        if _switched_on.get():
            reason = why_not(self, *how, synced_gpus, streamer, model_kwargs)
            if reason is None:
                mask = model_kwargs.get("attention_mask")
                ids, self.last_tokens_per_forward = decode(self, *how, streamer, mask)
                return ids
            logger.warning_once(f"generate decodes plainly, one token a forward, because {reason}")
        self.last_tokens_per_forward = 1.0
        model_kwargs |= dict(synced_gpus=synced_gpus, streamer=streamer)
        return super()._sample(*how, **model_kwargs)  # pyrefly: ignore[bad-argument-type]
