"""A tiny reward model in Hugging Face format, with a tokenizer and a chat template of its own.

Other test folders load this file by path, see ``conftest.py`` beside it.
"""

import sysconfig
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|role|>{{ message['role'] }}\n{{ message['content'] | trim }}<|eot|>{% endfor %}"
)


def make_reward_model(folder: Path, *, seed: int = 0, max_position_embeddings: int = 512) -> Path:
    """Write a Llama classifier with one label whose padding token is the one that ends a text.

    As in Llama 3 the tokenizer adds a BOS of its own, and so does the chat template.

    Args:
        folder: where to write.
        seed: of the weights.
        max_position_embeddings: longest input in tokens.

    Returns:
        The folder.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    bos, eos, role = "<|begin|>", "<|eot|>", "<|role|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[bos, eos, role],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = Path(sysconfig.get_paths()["stdlib"], "bisect.py").read_text()
    tokenizer.train_from_iterator([source], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        num_labels=1,
        initializer_range=0.3,  # so that scores differ well between texts
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder
