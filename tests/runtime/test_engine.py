"""The engine: prompts, cache reuse, stop conditions, statistics, refusals. On a small random model."""

import json
import shutil
from dataclasses import replace

import numba
import pytest
import torch
from model_cases import make_model
from tokenizers import Tokenizer

from cpu_kernels.worker_pool import Each, WorkerPool
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.chat.interrupts import InterruptGuard
from hybrid.errors import ArtifactError, ContextError, InputError
from placement import Placement
from profiler.common.openmp import torch_threads

pytest.importorskip("transformers")
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama-relu", path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (path / "generation_config.json").write_text("{}")
    return path


@pytest.fixture
def engine(folder):
    made = Engine.load(folder, EngineConfig("exact", threads=1))
    yield made
    made.close()


def tokens(steps):
    return [step.token for step in steps]


def test_the_documented_way_to_use_it(folder):
    text = "".join(step.text for step in Engine.load(folder, EngineConfig("dense")).generate("abc", GREEDY))
    assert text


def test_text_and_token_prompts_are_the_same(engine):
    first = tokens(engine.generate("abc", GREEDY))
    assert tokens(engine.generate(engine.codec.encode("abc"), GREEDY)) == first


def test_answers_need_no_kernels_but_those_that_were_loaded(folder, monkeypatch):
    needed, run = set(), WorkerPool.run

    def note(pool, kernel, workers, *args):
        types = tuple(numba.typeof(value[0] if isinstance(value, Each) else value) for value in args)
        needed.add((kernel, types))
        run(pool, kernel, workers, *args)

    monkeypatch.setattr(WorkerPool, "run", note)
    engine = Engine.load(folder, EngineConfig("exact", threads=2))
    loaded = set(needed)
    for prompt_tokens in (1, 2, 40):
        list(engine.generate([5] * prompt_tokens, GREEDY))
    engine.close()
    assert needed == loaded


@pytest.mark.parametrize("messages", ["text", [{"role": "user"}], [("user", "text")], {"role": "user", "content": "x"}])
def test_what_is_no_conversation(engine, messages):
    for use in (engine.reply, engine.count_tokens):
        with pytest.raises(InputError, match=r'expected a list such as \[{"role": "user", "content": "Hello"}\]'):
            use(messages)


def test_statistics_of_the_last_step(engine):
    *_, last = engine.generate("abcdef", GREEDY)
    stats = last.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (6, 0, 12)
    assert last.finish == "length" and stats.ttft_seconds > 0 and stats.decode_seconds > 0
    assert 0 < stats.active_share < 1 and stats.hot_share is None
    assert stats.ffn_seconds > 0 and stats.attention_seconds > 0


def test_without_a_gpu_nothing_is_called_hot(folder):
    """Whatever the placement was made for: its hot neurons are the CPU's like all others."""
    spec = Engine.load(folder, EngineConfig("exact")).model.spec
    engine = Engine.load(folder, EngineConfig("exact", vram_budget=0), Placement.all_hot(spec))
    *_, last = engine.generate("abc", GREEDY)
    assert last.stats.hot_share is None and "hot" not in engine.plan.summary()
    assert engine.runtime.counters.fired_hot == engine.runtime.counters.fired > 0


def test_two_engines_share_one_loaded_model(folder):
    first = Engine.load(folder, EngineConfig("exact", threads=1))
    second = Engine(first.loaded)
    assert second.model is first.model
    answers = first.generate("abcd", GREEDY), second.generate("xyz", GREEDY)
    mixed = [[next(answer).token for answer in answers] for _ in range(12)]
    fresh = Engine.load(folder, EngineConfig("exact", threads=1))
    assert [row[0] for row in mixed] == tokens(fresh.generate("abcd", GREEDY))
    assert [row[1] for row in mixed] == tokens(fresh.generate("xyz", GREEDY))


def test_a_conversation_reuses_the_cache_and_answers_the_same(engine):
    chat = [{"role": "user", "content": "hello there"}]
    *_, last = engine.reply(chat, GREEDY)
    answer = engine.codec.decode(tokens(engine.reply(chat, GREEDY)))
    longer = [*chat, {"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
    told = []
    again = list(engine.reply(longer, GREEDY, lambda *progress: told.append(progress)))
    assert again[-1].stats.cached_tokens >= last.stats.prompt_tokens
    read = again[-1].stats.prompt_tokens - again[-1].stats.cached_tokens
    assert (told[0], told[-1]) == ((0, read), (read, read))
    engine.reset()
    fresh = list(engine.reply(longer, GREEDY))
    assert fresh[-1].stats.cached_tokens == 0
    assert tokens(fresh) == tokens(again)
    assert engine.count_tokens(longer) == fresh[-1].stats.prompt_tokens


def test_the_same_prompt_twice_recomputes_one_token_only(engine):
    *_, first = engine.generate("abcdefgh", GREEDY)
    *_, second = engine.generate("abcdefgh", GREEDY)
    assert second.stats.cached_tokens == 7 and first.token == second.token


def test_closing_an_answer_early_leaves_the_engine_ready(engine):
    whole = tokens(engine.generate("abcd", GREEDY))
    engine.reset()
    steps = engine.generate("abcd", GREEDY)
    partial = [next(steps).token for _ in range(5)]
    steps.close()
    assert partial == whole[:5]
    assert tokens(engine.generate("abcd", GREEDY)) == whole


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_interrupt_inside_a_step_leaves_the_engine_ready(engine, at, computed, monkeypatch):
    whole = tokens(engine.generate("abcd", GREEDY))
    engine.reset()
    calls = []
    real = WorkerPool.run

    def interrupted(pool, *args):
        calls.append(pool)
        if len(calls) == at:
            if computed:
                real(pool, *args)
            raise KeyboardInterrupt
        return real(pool, *args)

    monkeypatch.setattr(WorkerPool, "run", interrupted)
    with InterruptGuard(), pytest.raises(KeyboardInterrupt):
        tokens(engine.generate("abcd", GREEDY))
    monkeypatch.undo()
    assert tokens(engine.generate("abcd", GREEDY)) == whole


def test_two_answers_at_once_are_refused(engine):
    first = engine.generate("abc", GREEDY)
    next(first)
    tokens(engine.generate("xyz", GREEDY))
    with pytest.raises(InputError, match="one answer at a time"):
        next(first)


def test_an_engine_is_a_context_manager(folder):
    with Engine.load(folder, EngineConfig("dense", threads=3)) as engine:
        assert tokens(engine.generate("abc", GREEDY))
    assert engine.runtime.pool.threads == 1


def test_end_tokens_of_all_files_end_an_answer(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert Engine.load(copy, EngineConfig("dense")).end_tokens == {7}
    (copy / "generation_config.json").write_text('{"eos_token_id": [8], "top_k": "many", "do_sample": true}')
    (copy / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    engine = Engine.load(copy, EngineConfig("dense"))
    assert engine.end_tokens == {7, 8, *engine.codec.encode("A")}
    note = "generation_config.json: top_k is 'many', expected an integer, 0 (off) or more; 0 is taken"
    assert engine.notices[-1] == note


def test_a_stop_string_that_is_a_special_token_stops(folder, tmp_path, engine):
    said = tokens(engine.generate("xyz", GREEDY))
    count = next(n for n, token in enumerate(said) if n and token < 128 and token not in said[:n])
    marker = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(said[count])
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [marker]}))
    special = Engine.load(copy, EngineConfig("exact", threads=1))
    assert tokens(special.generate("xyz", GREEDY)) == said
    cut = list(special.generate("xyz", replace(GREEDY, stop=("no", marker))))
    assert tokens(cut) == said[: count + 1] and cut[-1].finish == "stop"
    assert "".join(step.text for step in cut) == engine.codec.decode(said[:count])


def test_long_prompts_are_read_in_chunks(folder, monkeypatch):
    monkeypatch.setattr("hybrid.runtime.runner.CpuRunner.chunk", 7)
    engine, seen = Engine.load(folder, EngineConfig("dense")), []
    chunked = tokens(engine.generate("a" * 20, GREEDY, lambda done, total: seen.append((done, total))))
    assert seen == [(0, 20), (7, 20), (14, 20), (20, 20)]
    monkeypatch.undo()
    assert tokens(Engine.load(folder, EngineConfig("dense")).generate("a" * 20, GREEDY)) == chunked


def test_stop_strings_and_end_tokens(engine):
    steps = list(engine.generate("xyz", GREEDY))
    text = "".join(step.text for step in steps)
    stop = text[4:6]
    cut = list(engine.generate("xyz", SamplingSettings(temperature=0, max_new_tokens=12, stop=(stop, "never"))))
    assert "".join(step.text for step in cut) == text[: text.index(stop)]
    assert cut[-1].finish == "stop"
    engine.end_tokens = frozenset({steps[3].token})
    first = tokens(steps).index(steps[3].token)
    ended = list(engine.generate("xyz", GREEDY))
    assert ended[-1].finish == "stop" and len(ended) == first + 1
    assert "".join(step.text for step in ended) == engine.codec.decode(tokens(steps)[:first])


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(engine):
    text = "".join(step.text for step in engine.generate("xyz", GREEDY))
    almost = SamplingSettings(temperature=0, max_new_tokens=12, stop=(text[-2:] + "\x00",))
    assert "".join(step.text for step in engine.generate("xyz", almost)) == text


def test_a_full_context_ends_the_answer(folder):
    engine = Engine.load(folder, EngineConfig("exact", context=10))
    steps = list(engine.generate("abcd", GREEDY))
    assert steps[-1].finish == "context" and len(steps) == 6
    with pytest.raises(ContextError, match="prompt of at least 10 tokens leaves no room in a context of 10"):
        engine.generate("a" * 10, GREEDY)


def test_seeded_sampling_repeats(engine):
    settings = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=3, max_new_tokens=12)
    assert tokens(engine.generate("abc", settings)) == tokens(engine.generate("abc", settings))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([1, 500], "0 to 130, got 1 to 500"),
        (b"abc", "the prompt is of type bytes"),
        ("a" * 70, "prompt of at least 70 tokens leaves no room in a context of 64"),
        ("a" * 10**6, "prompt of at least 64004 tokens leaves no room in a context of 64"),
    ],
)
def test_bad_prompts(engine, prompt, message):
    with pytest.raises(InputError, match=message):
        engine.generate(prompt, GREEDY)


def test_what_cannot_be_loaded_says_why(folder, tmp_path):
    with pytest.raises(ContextError, match="context 65 is out of range: this model takes 1 to 64"):
        Engine.load(folder, EngineConfig("dense", context=65))
    missing = (
        r"predictors\.safetensors is missing; make it with: hybrid prepare .* --corpus FILE.*; or use sparsity exact"
    )
    with pytest.raises(ArtifactError, match=missing):
        Engine.load(folder, EngineConfig("learned"))
    make_model("mistral-full", tmp_path)
    with pytest.raises(InputError, match="silu fires densely, so sparsity exact has no meaning"):
        Engine.load(tmp_path, EngineConfig("exact"))
    assert "silu fires densely" in Engine.load(tmp_path).notices[0]


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(temperature=1, max_new_tokens=3)])
def test_torch_has_one_thread_in_decode_and_the_callers_number_between_tokens(engine, settings, monkeypatch):
    inside, step = [], engine.runner._step.rows

    def note(*given):
        inside.append(torch.get_num_threads())
        return step(*given)

    monkeypatch.setattr(engine.runner._step, "rows", note)
    with torch_threads(3):
        for prompt_tokens in (1, 40):
            for _ in engine.generate([5] * prompt_tokens, settings):
                assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    assert set(inside) == {1}
