"""Tiny real models, built in the test: a Llama with a word-level tokenizer and a chat template, and a BERT encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"]


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, "system", "user", "assistant", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    fast.chat_template = CHAT
    return fast


def tiny_llama(vocabulary: int, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A Llama small enough to train in seconds, with grouped-query attention like the real ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=3,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def save_llm(folder: Path, words: Sequence[str], **shape: int) -> Path:
    """Write a tiny chat model as a folder that `from_pretrained` reads."""
    tokenizer = word_tokenizer(words)
    tiny_llama(len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path, words: Sequence[str], *, hidden: int = 16, seed: int = 0) -> Path:
    """Write a tiny BERT encoder as a folder that `from_pretrained` reads."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        pad_token_id=3,
    )
    BertModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_word_encoder(folder: Path, words: Sequence[str]) -> Path:
    """Write a BERT encoder that knows these words alone: each has a direction of its own, every other one is zero."""
    tokenizer = word_tokenizer(words)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * ((len(words) + 1) // 2),
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=64,
        pad_token_id=3,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" not in name:
                parameter.zero_()
        for column, token in enumerate(tokenizer.convert_tokens_to_ids(list(words))):
            model.embeddings.word_embeddings.weight[token, column] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
