"""The words of an evaluation: what its figures mean, and what was read and compared."""

from distillation.evaluation.results import EvaluationResult

STITCH_TEXTS = {
    "saved": "through the run's own stitching layers",
    "identity": "directly, as both have the same width",
    "least_squares": "through stitches fitted by least squares on every other window and measured "
    "on the rest, as the run saved none",
}
GLOSSARY = {
    "perplexity": "exp of the mean negative log likelihood per token. Every token but the first is "
    "scored once, in a sliding window, with the same context for all models.",
    "KL to teacher": "KL(teacher || model) in nats per token, at temperature 1; 0 for the teacher.",
    "top-1 agreement": "how often the model's most likely token is the teacher's.",
    "bits per byte": "the loss per byte of text; comparable between tokenizers.",
    "calibration error": "how far the probability of the first token is from how often it is the "
    "one that comes, mean over 15 bins of that probability: 0 is perfect.",
    "KL on its own": "KL to the teacher on text that the model sampled itself, beside that on the "
    "text itself at the same places. One that grows along the continuation, more than on the text, "
    "says that errors add up. The teacher's loss of it tells how likely such text is to the "
    "teacher; too low a loss is a text that goes round in circles.",
    "repeated": "share of 4-grams that repeat an earlier one, in greedy continuations.",
    "chained error": "squared error of a block's hidden states, divided by that of the teacher's "
    "own mean: 0 is perfect, 1 is what a constant reaches. The block reads what the student's "
    "blocks before it make.",
    "local error": "the same share as the run recorded it when the block had learnt: on the inputs "
    "it learnt from (--block_inputs), on training text, and on states as its loss compares them.",
    "KL in the teacher": "KL to the teacher, in nats per token, of the teacher itself with this "
    "student block in place of those it stands for; then with all student blocks before it too.",
    "layer pairs": "linear CKA (centred kernel alignment, unbiased) of the hidden states of any "
    "two blocks, channels standardised: 1 where they are the same up to rotation and scale, 0 "
    "where they have nothing in common.",
    "tokens/s": "one window at a time; models take turns, and the median counts.",
    "decode tokens/s": "greedy generation with the cache, batch 1.",
}


def data_sentence(result: EvaluationResult, name: str) -> str:
    """What text was read, and how."""
    data = result["data"]
    return (
        f"Text: {name}, {data['num_documents']:,} documents, {data['num_tokens']:,} tokens, in "
        f"{data['num_windows']:,} windows of {data['seq_len']} tokens, stride {data['stride']}."
    )


def hidden_sentence(result: EvaluationResult) -> str:
    """How hidden states were compared; empty where they were not."""
    hidden = result["hidden_states"]
    if hidden is None:
        return ""
    return (
        f"Raw block outputs compared {STITCH_TEXTS[hidden['stitch']]}, over "
        f"{hidden['num_positions']:,} positions, as chained: each block gets its own model's input."
    )


def own_text_sentence(result: EvaluationResult) -> str:
    """How models were compared on text of their own; empty where they were not."""
    found = result.get("own_text")
    if found is None:
        return ""
    return (
        f"{found['num_windows']} beginnings of {found['prompt_tokens']} tokens, continued by each "
        f"model with {found['new_tokens']} of its own, sampled at temperature 1; greedy for what "
        "is repeated."
    )
