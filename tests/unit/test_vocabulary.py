import pytest

from cleangpt.errors import InputError
from cleangpt.vocabulary import check_same_tokens, token_rows
from tests.byte_tokenizer import make_tokenizer

TOKENS = {"a": 0, "b": 1, "c": 2}


def test_rows_are_counted_by_the_largest_id() -> None:
    tokenizer = make_tokenizer(eos_token="<end>")
    assert token_rows(tokenizer) == len(tokenizer) == 258
    tokenizer.get_vocab = lambda: {"a": 0, "b": 300}
    assert token_rows(tokenizer) == 301


def test_equal_maps_pass_whatever_their_order() -> None:
    check_same_tokens(dict(reversed(TOKENS.items())), TOKENS, "it", "remedy")


def test_placeholders_of_padding_are_no_tokens() -> None:
    check_same_tokens({**TOKENS, "[PAD3]": 3, "[PAD4]": 4}, TOKENS, "it", "remedy")
    with pytest.raises(InputError, match=r"first 3 \('\[PAD4\]', not no token\)"):
        check_same_tokens({**TOKENS, "[PAD4]": 3}, TOKENS, "it", "remedy")


@pytest.mark.parametrize(
    ("own", "cause"),
    [
        ({"a": 1, "b": 0, "c": 2}, r"2 ids differ, first 0 \('b', not 'a'\), 1 \('a', not 'b'\);"),
        ({**TOKENS, "d": 3}, r"4 and 3 of them, and 1 ids differ, first 3 \('d', not no token\)"),
        ({"a": 0, "b": 1}, r"first 2 \(no token, not 'c'\)"),
        ({f"{i}\n": i for i in range(9)}, r"9 ids differ, first 0 .*, 2 \('2\\n', not 'c'\);"),
    ],
)
def test_other_maps_are_refused_with_the_first_ids(own: dict[str, int], cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        check_same_tokens(own, TOKENS, "it", "the remedy")
    assert caught.value.exit_code == 3
    assert str(caught.value).splitlines()[1:] == ["the remedy"]
