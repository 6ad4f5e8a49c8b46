"""Steps over rows of several sequences, whose blocks lie in any order: each row as alone, wherever the model is."""

import pytest
import torch
from gpu_cases import DEVICE
from step_cases import StepCase, relative_error, some_tokens, tiny_model, use_references

from hybrid import SamplingSettings
from hybrid.model.kv_cache import Row
from hybrid.runtime.gpu.rows import size_of
from hybrid.runtime.sampling import Sampler

pytest.importorskip("transformers")
FLOATS = 5e-6  # relative
LENGTHS = (0, 3, 7, 8, 13)
ADDED = (1, 4, 2, 1, 3)  # rows of each sequence, which come by turns


@pytest.fixture
def _references(monkeypatch):
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def mixed_rows(sequences, added=ADDED):
    """The tokens of all sequences, a row of each by turns."""
    tokens = [some_tokens(count, 50 + number) for number, count in enumerate(added)]
    return [
        Row(cache, tokens[number][turn])
        for turn in range(max(added))
        for number, cache in enumerate(sequences)
        if turn < added[number]
    ]


def check_rows(case, strategy, lengths=LENGTHS, added=ADDED, tolerance=FLOATS):
    """All rows in one step against one by one, which writes the same keys and values again."""
    sequences = case.sequences(lengths, strategy)
    assert any(abs(a - b) > 1 for cache in sequences for a, b in zip(cache.blocks, cache.blocks[1:], strict=False))
    rows = mixed_rows(sequences, added)
    together = case.step.run(rows, strategy).clone()
    assert [cache.length for cache in sequences] == [sum(both) for both in zip(lengths, added, strict=True)]
    for cache, length in zip(sequences, lengths, strict=True):
        cache.truncate(length)
    alone = torch.stack([case.step.run([row], strategy)[0].clone() for row in rows])
    for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
        assert relative_error(found, expected) < tolerance, f"row {number} of {len(rows)}"
    assert together.argmax(1).tolist() == alone.argmax(1).tolist()
    assert len({tuple(row.tolist()) for row in alone}) == len(rows)
    return rows


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("strategy", ["dense", "exact", "learned"])
@pytest.mark.parametrize(
    "placed",
    [
        {"share": 0.4},
        {"share": 1.0},
        {"share": 0.0, "head": False},
        {"share": 0.4, "zero_copy": 20},
        {"on_cpu": (0,), "head": False},
    ],
)
def test_rows_of_several_sequences(models, placed, strategy):
    case = StepCase(tiny_model("llama-relu", models), predictors=True, rows=32, **placed)
    check_rows(case, strategy)
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", ["opt", "mistral-window", "falcon", "gemma3"])
def test_families(models, name):
    case = StepCase(tiny_model(name, models), predictors=True, rows=32, on_cpu=(1,))
    check_rows(case, "learned")
    case.close()


@pytest.mark.usefixtures("_references")
def test_masks_have_a_bit_for_each_of_32_rows(models):
    """Those of the last rows count as those of the first do."""
    case = StepCase(tiny_model("llama-relu", models), predictors=True, rows=32)
    check_rows(case, "learned", (0, 2, 5, 9), (8, 8, 8, 8))
    sequences = case.sequences((4, 1, 3, 6), "learned")
    rows = mixed_rows(sequences, (8, 8, 8, 8))
    case.step.run(rows, "learned")
    bits, named = case.step._buffers.masks.clone(), []
    for number in range(20, 32):
        sequences[number % 4].length = (4, 1, 3, 6)[number % 4] + number // 4
        case.step.run(rows[number : number + 1], "learned")
        assert torch.equal(case.step._buffers.masks & 1, bits >> number & 1)
        named.append(int((bits >> number & 1).sum()))
    assert named[-1] and len(set(named)) > 3
    case.close()


@pytest.mark.parametrize("placed", [{"share": 0.1}, {"on_cpu": (0,), "head": False}])
def test_the_kernels_themselves(models, placed, monkeypatch):
    """In the interpreter where there is no GPU: four rows in groups of two, of which the last repeats the third."""
    monkeypatch.setattr("gpu_kernels.tiles.TOGETHER", 2)
    threads = 1 if DEVICE == "cpu" else 2
    case = StepCase(tiny_model("llama-relu", models, layers=1), predictors=True, rows=32, threads=threads, **placed)
    sequences = case.sequences((0, 0), "learned")
    rows = mixed_rows(sequences, (2, 1))
    found = case.step.run(rows, "learned").clone()
    for cache in sequences:
        cache.truncate(1)
    alone = case.step.run(rows[2:], "learned")
    assert relative_error(alone[0], found[2]) < FLOATS and relative_error(found[1], found[2]) > 0.1
    case.close()


@pytest.mark.usefixtures("_references")
def test_rows_between_two_sizes_repeat_the_last(models):
    """It needs no other neurons, goes to the same place, and its logits are not seen."""
    case = StepCase(tiny_model("llama-relu", models), predictors=True, rows=32)
    (cache,) = case.sequences((5,), "learned")
    rows = [Row(cache, token) for token in some_tokens(3, 7)]
    found = case.step.run(rows, "learned")
    places = case.step._rows.places
    assert found.shape[0] == 3 and cache.length == 8
    assert places[:4].tolist() == [5, 6, 7, 7] and torch.equal(case.step._rows.embedded[2], case.step._rows.embedded[3])
    bits = case.step._buffers.masks
    assert torch.equal(bits >> 2 & 1, bits >> 3 & 1) and not (bits >> 4).any()
    case.close()


def test_sizes():
    assert [size_of(rows) for rows in (1, 2, 3, 5, 8, 9, 17, 32)] == [1, 2, 4, 8, 8, 16, 32, 32]
    for rows in (0, 33):
        with pytest.raises(ValueError, match=f"1 to 32 rows, got {rows}"):
            size_of(rows)


@pytest.mark.usefixtures("_references")
def test_more_rows_than_there_is_room_for_are_refused(models):
    case = StepCase(tiny_model("llama-relu", models, layers=1))
    with pytest.raises(ValueError, match="1 to 8 rows, got 9"):
        case.step.run([Row(case.cache, 5)] * 9, "exact")
    assert case.cache.length == 0
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("head", [True, False])
def test_next_tokens_of_mixed_choices(models, head):
    """Greedy, drawn on the GPU, and chosen by the host from all logits, as each alone with the same seed."""
    case = StepCase(tiny_model("llama-relu", models), rows=32, head=head)
    sequences = case.sequences(LENGTHS, "exact")
    given = [{"temperature": 0}, {"top_k": 5}, {"temperature": 0.7, "top_k": 0, "top_p": 0.8}]
    given += [{"top_k": 0, "top_p": 1.0}, {"top_k": 9, "repetition_penalty": 1.4}]
    settings = [SamplingSettings(**{"temperature": 1.5, "seed": seed} | change) for seed, change in enumerate(given)]
    rows = [Row(cache, token) for cache, token in zip(sequences, some_tokens(5, 3), strict=True)]
    together = case.step.next_tokens(rows, [Sampler(each, [4, 9]) for each in settings], "exact")
    alone = []
    for row, each, length in zip(rows, settings, LENGTHS, strict=True):
        row.cache.truncate(length)
        alone += case.step.next_tokens([row], [Sampler(each, [4, 9])], "exact")
    assert together == alone and len(set(together)) > 2
    case.close()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need an NVIDIA GPU")
@pytest.mark.parametrize("placed", [{"share": 0.4}, {"share": 1.0}, {"on_cpu": (1,), "head": False}])
@pytest.mark.parametrize("strategy", ["dense", "exact", "learned"])
def test_graphs_of_16_rows_of_5_sequences(models, placed, strategy):
    """Captured and replayed; the answers that follow are those of each sequence alone."""
    case = StepCase(tiny_model("llama-relu", models), predictors=True, rows=32, **placed)
    check_rows(case, strategy, LENGTHS, (3, 5, 2, 2, 4))
    sequences, greedy = case.sequences(LENGTHS, strategy), Sampler(SamplingSettings(temperature=0))

    def answers(groups):
        tokens = dict.fromkeys(range(5), 7)
        found = [[] for _ in sequences]
        for group in groups:
            for _ in range(6):
                rows = [Row(sequences[number], tokens[number]) for number in group]
                for number, token in zip(
                    group, case.step.next_tokens(rows, [greedy] * len(rows), strategy), strict=True
                ):
                    found[number].append(token)
                    tokens[number] = token
        for cache, length in zip(sequences, LENGTHS, strict=True):
            cache.truncate(length)
        return found

    alone = answers([[number] for number in range(5)])
    assert answers([[0, 1, 2, 3, 4]]) == alone and answers([[4, 2], [0, 3, 1]]) == alone
    case.close()
