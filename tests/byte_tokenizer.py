"""A tokenizer of single bytes, made without any file."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = 256
START = 257


def make_tokenizer(*, adds_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One token per byte, then <end> (256) and <start> (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<end>", "<start>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<start> $A", special_tokens=[("<start>", START)]
        )
        special["bos_token"] = "<start>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **special)
