"""The 4-head multi-token-prediction Llama of Meta's release (arXiv 2404.19737).

Shapes: B batch, T positions, K heads (future tokens), D model width, V vocabulary.
Head k (0-based) at position t predicts token t + k + 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import nn
from torch.func import functional_call
from torchtune.modules import RMSNorm, TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import _MaskType, _sdpa_or_flex_attention
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from wmtp_modules.loss.distill import Distill, distilled_cross_entropy
from wmtp_modules.loss.linear_cross_entropy import (
    linear_cross_entropy,
    linear_logits,
    losses_and_choices,
)
from wmtp_modules.models.kv_cache import CachedRoPE, RowKVCache, cached_attention
from wmtp_modules.models.lora import LoRA, adapt_block

ExtraHeads = Literal["full", "isolated", "only"]


class LogitLinear(nn.Linear):
    """Projection to the vocabulary, without bias, whose logits are fp32 also in a bf16 model.

    Probabilities and choices of tokens are then those of the loss: bf16 ties logits that differ.
    """

    def __init__(self, embed_dim: int, vocab_size: int) -> None:
        super().__init__(embed_dim, vocab_size, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear_logits(input, self.weight)


class MTPOutput(nn.Module):
    """Final norm, output projection and loss, shared by all heads.

    The loss is computed inside this forward so that, under FSDP2, it uses the gathered plain
    weight and its gradient returns through the same unit.

    Attributes:
        is_apart: heads 1 to K - 1 do not train norm and projection.
    """

    def __init__(self, norm: RMSNorm, proj: LogitLinear) -> None:
        super().__init__()
        self.norm = norm
        self.proj = proj
        self.loss_impl = "chunked"
        self.is_apart = False

    def forward(
        self,
        hidden_BTKD: torch.Tensor,
        labels_BTK: torch.Tensor | None = None,
        token_weights_BTK: torch.Tensor | None = None,
        further_BTJD: torch.Tensor | None = None,
        distill: Distill | None = None,
        with_choices: bool = False,
        n_supervised: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """As that of ``MTPTransformer``.

        With ``further_BTJD`` these are heads 1 to K - 1, and ``hidden_BTKD`` is of head 0, whose
        loss then has chunks, and so bits, of its own: those of a model without further heads.
        """
        normed_BTKD = self.norm(hidden_BTKD)
        if labels_BTK is None:
            return self.proj(normed_BTKD)
        n = hidden_BTKD.shape[2]
        if with_choices:
            sides = [(normed_BTKD, labels_BTK[..., :n])]
            if further_BTJD is not None:
                sides.append((self.norm(further_BTJD), labels_BTK[..., n:]))
            weight, impl = self.proj.weight, self.loss_impl
            found = [losses_and_choices(x, weight, labels, impl=impl) for x, labels in sides]
            losses_BTK, choices_BTK = map(_joined, zip(*found, strict=True))
            return losses_BTK, choices_BTK
        weights = (None, None)
        if token_weights_BTK is not None:
            weights = token_weights_BTK[..., :n], token_weights_BTK[..., n:]
        own = labels_BTK[..., :n], weights[0], n_supervised
        parts = [self._plain(normed_BTKD, self.proj.weight, *own)]
        if further_BTJD is not None:
            others = labels_BTK[..., n:], weights[1], n_supervised
            parts.append(self._further(further_BTJD, *others, normed_BTKD[:, :, 0], distill))
        trained, losses_BTK, distilled_BTK = map(_joined, zip(*parts, strict=True))
        if distill is not None:
            return trained, losses_BTK, distilled_BTK
        return trained if token_weights_BTK is None else (trained, losses_BTK)

    def _further(
        self,
        hidden_BTJD: torch.Tensor,
        labels_BTJ: torch.Tensor,
        weights_BTJ: torch.Tensor | None,
        n_supervised: int | None,
        teacher_BTD: torch.Tensor,
        distill: Distill | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, weight_VD = self.norm.scale, self.proj.weight
        if self.is_apart:
            scale, weight_VD = scale.detach(), weight_VD.detach()
        normed_BTJD = functional_call(self.norm, {"scale": scale}, (hidden_BTJD,))
        if not (distill and distill.weight):
            return self._plain(normed_BTJD, weight_VD, labels_BTJ, weights_BTJ, n_supervised)
        tensors = normed_BTJD, weight_VD, labels_BTJ, teacher_BTD
        how = {"impl": self.loss_impl, "most_targets": n_supervised}
        return distilled_cross_entropy(*tensors, distill, weights_BTJ, **how)

    def _plain(
        self,
        normed_BTKD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_BTK: torch.Tensor,
        weights_BTK: torch.Tensor | None,
        n_supervised: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to train on, losses, and that nothing is distilled."""
        most = None if n_supervised is None else n_supervised * labels_BTK.shape[-1]
        how = {"impl": self.loss_impl, "most_targets": most}
        result = linear_cross_entropy(normed_BTKD, weight_VD, labels_BTK, weights_BTK, **how)
        trained, losses_BTK = result if isinstance(result, tuple) else (result, result.detach())
        return trained, losses_BTK, torch.zeros_like(losses_BTK)


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sums added up, figures of head 0 and of the others side by side."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, -1) if parts[0].dim() else torch.stack(parts).sum()


class _Attention(Protocol):
    """What the caches need of a block's attention; torchtune's own is typed for its own cache."""

    kv_cache: RowKVCache | None
    cache_enabled: bool
    pos_embeddings: nn.Module
    _attention_call: Callable[..., torch.Tensor]
    num_kv_heads: int
    head_dim: int


class MTPTransformer(nn.Module):
    """Trunk of Transformer blocks whose output feeds K parallel head blocks.

    All heads read the same trunk output; norm and output projection are shared. With one head
    this is an ordinary Llama whose last block is called head 0.

    Args:
        args: the builder's arguments, kept so that exports can write a matching config.

    Attributes:
        context: longest row in tokens that the weights were trained on; may exceed
            ``max_seq_len``, the longest row that this model accepts.
        lora: how it is adapted; None if all of it trains.
        extra_heads: how heads 1 to K - 1 train, see ``set_extra_heads``.
        distill: what a training forward is to be given.
        read_frozen: gives what does not train as its checkpoint has it, by our key, to be exported;
            None if all of it trains.
    """

    def __init__(
        self,
        *,
        tok_embeddings: nn.Embedding,
        layers: Sequence[TransformerSelfAttentionLayer],
        heads: Sequence[TransformerSelfAttentionLayer],
        output: MTPOutput,
        args: dict,
    ) -> None:
        super().__init__()
        self.tok_embeddings = tok_embeddings
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.output = output
        self.args = args
        self.context: int = args["max_seq_len"]
        self.lora: LoRA | None = None
        self.extra_heads: ExtraHeads = "full"
        self.distill = Distill()
        self.read_frozen: Callable[[str], torch.Tensor] | None = None

    @property
    def n_future_tokens(self) -> int:
        return len(self.heads)

    @property
    def max_seq_len(self) -> int:
        return self.args["max_seq_len"]

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BTK: torch.Tensor | None = None,
        *,
        mask: _MaskType | None = None,
        input_pos: torch.Tensor | None = None,
        token_weights_BTK: torch.Tensor | None = None,
        distill: Distill | None = None,
        with_choices: bool = False,
        n_supervised: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits, per-token losses, or a loss with the weights folded in.

        Args:
            tokens_BT: token ids, int64.
            labels_BTK: target of each head, -100 where there is none (see ``mtp_labels``).
            mask: attention mask as ``document_mask`` makes it; causal
                over the whole row if None.
            input_pos: position of each token inside its document, int64 [B, T].
            token_weights_BTK: fp32 weights that are known before the forward.
            distill: what heads 1 to K - 1 learn from head 0, as training asks for it.
            with_choices: whether each head's likeliest token is asked for beside its losses.
            n_supervised: how many targets a head has, at most, where the host knows; rows without
                one are then no part of the product with the output matrix.

        Returns:
            Without labels fp32 logits_BTKV. With labels fp32 losses_BTK, differentiable, so that
            weights may be applied afterwards. With weights as well, the pair
            (sum of weight * loss, losses_BTK without gradient), which saves one matrix product.
            With ``distill`` always three: what to train on, which is such a sum or a loss per token
            that holds the distillation's, then without gradient the plain losses_BTK and the
            distillation's, which are 0 for head 0 and where nothing is distilled.
            With choices the pair (losses_BTK, choices_BTK) instead, without gradient.

        Raises:
            ValueError: if the row is longer than the model's ``max_seq_len``.
        """
        if tokens_BT.shape[1] > self.max_seq_len:
            raise ValueError(
                f"a row of {tokens_BT.shape[1]} tokens exceeds the model's max_seq_len "
                f"{self.max_seq_len}: raise model.max_seq_len or lower tokenizer.max_seq_len"
            )
        hidden_BTD = self.trunk(tokens_BT, mask=mask, input_pos=input_pos)
        is_full, distils = self.extra_heads == "full", bool(distill and distill.weight)
        read_BTD = hidden_BTD if is_full else hidden_BTD.detach()
        heads = [
            head(read_BTD if k else hidden_BTD, mask=mask, input_pos=input_pos)
            for k, head in enumerate(self.heads)
        ]
        further_BTJD = None
        if labels_BTK is not None and len(heads) > 1 and (distils or not is_full):
            further_BTJD, heads = torch.stack(heads[1:], dim=2), heads[:1]
        hidden_BTKD = torch.stack(heads, dim=2)
        further = further_BTJD, distill, with_choices, n_supervised
        return self.output(hidden_BTKD, labels_BTK, token_weights_BTK, *further)

    def trunk(
        self,
        tokens_BT: torch.Tensor,
        *,
        mask: _MaskType | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The trunk's output hidden_BTD, which all heads and a critic read.

        Call it directly only on a model that is not sharded: FSDP2 gathers in ``forward``.
        """
        hidden_BTD = self.tok_embeddings(tokens_BT)
        for block in self.layers:
            hidden_BTD = block(hidden_BTD, mask=mask, input_pos=input_pos)
        return hidden_BTD

    def add_lora(self, lora: LoRA, *, adapter_dtype: torch.dtype) -> None:
        """Put adapters on the blocks and freeze everything else.

        Frozen weights stay where they are and in their dtype, which NF4 takes over; adapters lie
        beside them and have no values yet (``init_adapters_``). On the meta device nothing is
        allocated.

        Raises:
            ValueError: if a layer cannot have the rank, or does not divide into NF4's blocks.
        """
        for block in (*self.layers, *(self.heads if lora.heads else self.heads[:1])):
            adapt_block(block, lora, adapter_dtype)
        set_trainable_params(self, get_adapter_params(self))
        self.lora = lora

    def set_extra_heads(self, how: ExtraHeads) -> None:
        """How heads 1 to K - 1 train; before the model is sharded, after ``add_lora``.

        ``full``: they train the trunk, norm and projection as head 0 does. ``isolated``: their
        gradient ends at the trunk's output, the norm and the projection, so that all else trains
        as it would without them. ``only``: all else is frozen as well.
        """
        self.extra_heads = how
        self.output.is_apart = how != "full"
        if how == "only":
            self.requires_grad_(False)
            for head in self.heads[1:]:
                head.requires_grad_(True)

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, cache_len: int) -> None:
        """Give every block, heads included, a KV cache of ``cache_len`` positions per row."""
        self.delete_caches()
        self.cache_len = cache_len
        attentions = self._attentions()
        self._rope = [CachedRoPE(attentions[0].pos_embeddings)]  # listed: no part of the model
        for attn in attentions:
            with self.tok_embeddings.weight.device:  # created there: it may not fit in host memory
                attn.kv_cache = RowKVCache(
                    batch_size, cache_len, attn.num_kv_heads, attn.head_dim, dtype
                )
            attn.cache_enabled = True
            attn.pos_embeddings = self._rope[0]
            attn._attention_call = cached_attention

    def place_in_caches(
        self, input_pos: torch.Tensor, end: int, *, masked: bool = True
    ) -> torch.Tensor | None:
        """Tell every cache that the next tokens continue its first rows, before that forward.

        Args:
            input_pos: position of each token, int64 [B, S], below ``end``.
            end: cache positions that the blocks look at, at most ``cache_len``.
            masked: False promises that S is 1 and every position is ``end - 1``: a query then sees
                all keys, and kernels that take no mask can be used.

        Returns:
            that forward's mask, to be added to the scores, [B, S, end]; None if not ``masked``.
            Keys are cached at their own position, so a query sees every position that is not later.
        """
        rows = torch.arange(input_pos.shape[0], device=input_pos.device)[:, None]
        for cache in self._caches():
            cache.rows, cache.input_pos, cache.end = rows, input_pos, end
        self._rope[0].look_up(input_pos)
        if not masked:
            return None
        later = torch.arange(end, device=input_pos.device) > input_pos[:, :, None]
        # Made once here: of a boolean mask, attention would make the same in every block.
        mask = torch.zeros(later.shape, dtype=self.tok_embeddings.weight.dtype, device=later.device)
        return mask.masked_fill_(later, -math.inf)

    def place_prompts_in_caches(self, rows: torch.Tensor, length: int) -> None:
        """Tell every cache that whole texts come next, which see nothing but themselves.

        That forward needs neither mask nor ``input_pos``.

        Args:
            rows: of the caches, that the texts are written to, int64 [B].
            length: tokens of each text, the padding on its right included.
        """
        input_pos = torch.arange(length, device=rows.device).expand(len(rows), length)
        for cache in self._caches():
            cache.rows, cache.input_pos, cache.end = rows[:, None], input_pos, None
        self._rope[0].look_up(input_pos[:1])

    def copy_cache_rows(self, source: torch.Tensor, to: torch.Tensor, end: int) -> None:
        """Copy rows of every cache, int64, onto others, up to position ``end``."""
        for cache in self._caches():
            cache.copy_rows(source, to, end)

    def delete_caches(self) -> None:
        """Drop the KV caches, e.g. to train or score again."""
        for attn in self._attentions():
            attn.kv_cache = None
            attn.cache_enabled = False
            if isinstance(attn.pos_embeddings, CachedRoPE):
                attn.pos_embeddings = attn.pos_embeddings.own
                attn._attention_call = _sdpa_or_flex_attention()  # as torchtune sets it

    def _attentions(self) -> list[_Attention]:
        return [cast(_Attention, block.attn) for block in (*self.layers, *self.heads)]

    def _caches(self) -> list[RowKVCache]:
        return [attn.kv_cache for attn in self._attentions() if attn.kv_cache is not None]
