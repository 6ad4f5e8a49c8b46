"""Answers of a given form, for tokenizers of bytes and SentencePiece's; what is refused, in one line."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.serving.constraint import Constraints

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 3, "maximum": 5}},
    "required": ["on", "n"],
    "additionalProperties": False,
}
END = 1


def of_bytes():
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


def of_sentencepiece():
    vocab = {"<unk>": 0, "</s>": END} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for text in ["\u2581", *'abtrueflsno0123456789{}",:']:
        vocab.setdefault(text, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["</s>"])
    return made


@pytest.fixture(scope="module", params=[of_bytes, of_sentencepiece])
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def constraints(tokenizer):
    made = Constraints(tokenizer, tokenizer.get_vocab_size() + 5, [END])
    yield made
    made.close()


def answer(constraint, tokenizer, seed):
    """Tokens drawn from what is allowed, until the end."""
    rng, tokens = np.random.default_rng(seed), []
    for _ in range(300):
        token = int(rng.choice(np.flatnonzero(constraint.allowed())))
        constraint.accept(token)
        if token == END:
            return tokenizer.decode(tokens)
        tokens.append(token)
    raise AssertionError("no end")


def test_whatever_is_drawn_is_what_the_schema_says(constraints, tokenizer):
    for seed in range(5):
        found = json.loads(answer(constraints.json_schema(SCHEMA), tokenizer, seed))
        assert set(found) == {"on", "n"} and type(found["on"]) is bool and 3 <= found["n"] <= 5


def test_after_the_last_brace_only_an_end_may_follow(constraints, tokenizer):
    constraint = constraints.json_schema(SCHEMA)
    assert constraint.allowed().shape == (tokenizer.get_vocab_size() + 5,) and not constraint.is_finished
    for token in tokenizer.encode('{"on": true, "n": 4}', add_special_tokens=False).ids:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert np.flatnonzero(constraint.allowed()).tolist() == [END] and constraint.is_finished


def test_white_space_ends(constraints, tokenizer):
    constraint = constraints.json_object()
    (space,) = tokenizer.encode(" ", add_special_tokens=False).ids
    for token in tokenizer.encode('{"a":', add_special_tokens=False).ids:
        constraint.accept(token)
    assert constraint.allowed()[space]
    constraint.accept(space)
    assert not constraint.allowed()[space]


def test_a_call_of_one_of_the_tools(constraints, tokenizer):
    tools = {"a": {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}, "b": {"enum": [{}]}}
    tools["a"]["additionalProperties"] = False
    found = {
        answer(constraints.tool_call(tools), tokenizer, seed).replace(" ", "").replace("\n", "") for seed in range(9)
    }
    assert {text.replace("\t", "") for text in found} == {
        '{"name":"a","arguments":{"n":7}}',
        '{"name":"b","arguments":{}}',
    }


def test_a_token_that_is_not_allowed_is_an_error_of_the_next(constraints):
    constraint = constraints.json_object()
    constraint.accept(7)
    with pytest.raises(InputError, match="the answer's form cannot be kept: Parser Error: token") as caught:
        constraint.allowed()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "the schema cannot be used: Invalid type: objekt"),
        ({"not": {"type": "string"}}, r'the schema cannot be used: Unimplemented keys: \["not"\]'),
        ({"type": "string", "pattern": "(?=x)"}, "regex parse error: .* look-around.* is not supported"),
        ({"type": "string", "minLength": {1}}, "cannot be used: Object of type set is not JSON serializable"),
    ],
)
def test_a_schema_that_cannot_be_used(constraints, schema, reason):
    with pytest.raises(InputError, match=reason) as caught:
        constraints.json_schema(schema)
    assert "\n" not in str(caught.value)


def test_no_tools_and_no_grammar(constraints):
    with pytest.raises(InputError, match="no tool to call"):
        constraints.tool_call({})
    with pytest.raises(InputError, match="the grammar cannot be used: "):
        constraints.grammar("start: nobody")


def test_models_that_have_no_such_answers(monkeypatch):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(InputError, match="llguidance cannot use this model's tokenizer: can't determine decoder type"):
        Constraints(words, 2, [END])
    words.decoder = decoders.Metaspace()
    with pytest.raises(InputError, match=r"can't determine decoder type: .*Metaspace"):
        Constraints(words, 2, [END])
    with pytest.raises(InputError, match="need an end token"):
        Constraints(words, 2, [])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"llguidance: pip install hybrid-inference\[serve\]"):
        Constraints(words, 2, [END])
