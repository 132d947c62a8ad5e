"""A byte-level BPE trained on the digits texts, with the control tokens of each family."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from morebench.errors import ConfigError


@dataclass(frozen=True)
class Family:
    control_tokens: tuple[str, ...]  # in the order of their ids
    bos: str
    eos: str
    pad: str
    unk: str | None
    adds_bos: bool  # the tokenizer itself writes BOS in front
    chat_format: str  # file stem below conf/chat_formats


FAMILIES = {
    "gemma2": Family(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        adds_bos=True,
        chat_format="gemma_2",
    ),
    "phi": Family(
        ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<|endoftext|>",
        adds_bos=False,
        chat_format="phi_4",
    ),
    "llama": Family(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        unk=None,
        adds_bos=True,
        chat_format="llama_3_1",
    ),
}


def find_family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"family {name!r} has no tiny LLM; there are: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def train_tokenizer(family: Family, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Every byte is in the vocabulary, so any text survives the way to ids and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control_tokens = [AddedToken(token, special=True, normalized=False) for token in family.control_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if family.adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{family.bos} $A", None, [bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        unk_token=family.unk,
        additional_special_tokens=list(family.control_tokens),
        clean_up_tokenization_spaces=False,
    )
