"""`AsyncEngine` on the embedded model: answers of many at once are those of `Engine`, and what an answer carries."""

import asyncio
import json

import pytest

from hybrid import AsyncEngine, Engine, EngineConfig, Request, SamplingSettings, ServingConfig
from hybrid.errors import ContextError, InputError
from hybrid.serving.request import EngineStoppedError

# In which pieces a prompt is read depends on the moment: what must be the same then is what precise promises.
CONFIG = EngineConfig(threads=1, prefill="precise")
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)
WORDS = "Once upon a time there was a little dog who lived by the sea and liked to bark at the waves. " * 9


@pytest.fixture(scope="module")
def engine():
    made = AsyncEngine.load(config=CONFIG, serving=ServingConfig(kv_tokens=4096))
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def alone():
    made = Engine.load(config=CONFIG)
    yield made
    made.close()


def ask(engine, prompt, settings=GREEDY, **more):
    return engine.generate(Request(tuple(engine.codec.encode(prompt)), settings, **more))


async def steps_of(answer):
    return [step async for step in answer]


def run(engine, prompt, settings=GREEDY, **more):
    return asyncio.run(steps_of(ask(engine, prompt, settings, **more)))


def test_the_longest_pause_can_begin_anew(engine):
    engine._scheduler.tally.longest_pause_seconds = 1.0
    assert engine.figures().longest_pause_seconds == 1
    engine.restart_longest_pause()
    assert engine.figures().longest_pause_seconds == 0


def test_a_mixed_batch_of_16_answers_as_each_alone(engine, alone):
    requests = []
    for n in range(16):
        sampled = SamplingSettings(temperature=0.8, top_k=(0, 40)[n % 2], top_p=0.9, seed=n, repetition_penalty=1.1)
        settings = GREEDY if n % 4 else SamplingSettings(**(vars(sampled) | {"max_new_tokens": 12}))
        requests.append(Request(tuple(engine.codec.encode(WORDS)[n : n + 1 + n * n]), settings))

    async def late(n):
        await asyncio.sleep(0.01 * (n * 7 % 16))
        return await steps_of(engine.generate(requests[n]))

    async def all_of():
        return await asyncio.gather(*map(late, range(16)))

    found = asyncio.run(all_of())
    assert engine.figures().rows_total > engine.figures().steps_total
    for one, steps in zip(requests, found, strict=True):
        expected = list(alone.generate(one.prompt, one.settings))
        assert [served.step.token for served in steps] == [step.token for step in expected]
        assert [served.step.text for served in steps] == [step.text for step in expected]
        assert steps[-1].step.finish == expected[-1].finish


def test_statistics_are_those_of_an_engine(engine, alone):
    prompt = "The cat " * 40
    *_, expected = alone.generate(prompt, GREEDY)
    *_, last = run(engine, prompt)
    found = last.step.stats
    assert (found.prompt_tokens, found.cached_tokens, found.generated_tokens) == (
        len(engine.codec.encode(prompt)),
        0,
        12,
    )
    assert found.active_share == pytest.approx(expected.stats.active_share, rel=1e-6) and found.hot_share is None
    assert found.ttft_seconds > 0 and found.decode_seconds > found.ffn_seconds > 0
    *_, again = run(engine, prompt)
    assert again.step.stats.cached_tokens == (found.prompt_tokens - 1) // 32 * 32 > 0
    assert again.step.token == last.step.token


def test_a_stop_string_ends_an_answer_and_frees_its_blocks(engine):
    text = "".join(step.step.text for step in run(engine, "Once upon a time"))
    stop = text[len(text) // 2 :][:4]
    cancelled = engine.figures().cancelled_total
    settings = SamplingSettings(temperature=0, max_new_tokens=500, stop=(stop,))
    steps = run(engine, "Once upon a time", settings)
    assert "".join(step.step.text for step in steps) == text[: text.index(stop)] and steps[-1].step.finish == "stop"

    async def settled():
        while engine.figures().running:
            await asyncio.sleep(0.002)

    asyncio.run(asyncio.wait_for(settled(), 5))
    assert engine.figures().kv_blocks_used == 0 and engine.figures().cancelled_total == cancelled + 1


@pytest.mark.parametrize("leave", ["aclose", "cancel", "abandon"])
def test_leaving_early_frees_its_blocks(engine, leave):
    async def main():
        answer = ask(engine, "Once upon a time", SamplingSettings(temperature=0, max_new_tokens=900))
        if leave == "cancel":
            task = asyncio.create_task(steps_of(answer))
            while not engine.figures().running:
                await asyncio.sleep(0.002)
            task.cancel()
        else:
            await anext(answer)
            assert engine.figures().kv_blocks_used > 0
            if leave == "aclose":
                await answer.aclose()
        del answer
        while engine.figures().running:
            await asyncio.sleep(0.002)

    asyncio.run(asyncio.wait_for(main(), 5))
    assert engine.figures().kv_blocks_used == 0


def test_logprobs_of_answers_and_prompts_agree(engine):
    steps = run(engine, "The dog was", top_logprobs=3)
    prompt = [*engine.codec.encode("The dog was"), *(step.step.token for step in steps)]
    scores = asyncio.run(engine.score(prompt, top=3))
    assert [score.token for score in scores] == prompt and scores[0].logprob is None
    for step, score in zip(steps, scores[-len(steps) :], strict=True):
        assert step.logprob.logprob == pytest.approx(score.logprob, abs=1e-3)
        assert step.logprob.token == step.logprob.top[0][0] == score.top[0][0] and len(score.top) == 3


def test_an_answer_of_a_given_form(engine):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"pet": {"enum": ["cat", "dog"]}}, "required": ["pet"]}
    constraint = engine.constraints.json_schema(schema | {"additionalProperties": False})
    steps = run(engine, "My pet: ", SamplingSettings(temperature=0.7, seed=1, max_new_tokens=40), constraint=constraint)
    assert json.loads("".join(step.step.text for step in steps))["pet"] in ("cat", "dog")
    assert steps[-1].step.finish == "stop"


@pytest.mark.parametrize(
    ("prompt", "more", "error", "message"),
    [
        ((), {}, InputError, "the prompt is empty"),
        ((9999,), {}, InputError, "token ids must be 0 to 8191, got 9999 to 9999"),
        ((5,) * 1024, {}, ContextError, "leaves no room in a context of 1024"),
        ((5,), {"logit_bias": {8192: 1.0}}, InputError, "logit_bias names the token 8192, expected 0 to 8191"),
    ],
)
def test_what_is_refused_at_the_first_step(engine, prompt, more, error, message):
    answer = engine.generate(Request(prompt, GREEDY, **more))
    with pytest.raises(error, match=message):
        asyncio.run(steps_of(answer))


def test_the_documented_way_to_use_it():
    async def main():
        async with AsyncEngine.load(config=CONFIG) as engine:
            text = "".join([served.step.text async for served in ask(engine, "abc")])
            assert text and engine.name == "model" and engine.failure is None
            with pytest.raises(InputError, match="top is 21, expected 0 to 20"):
                await engine.score([1], 21)
        with pytest.raises(EngineStoppedError, match="was closed"):
            await anext(ask(engine, "abc"))

    asyncio.run(main())


def test_a_pool_of_fewer_tokens_than_a_context_makes_the_context_shorter():
    async def main():
        async with AsyncEngine.load(config=CONFIG, serving=ServingConfig(kv_tokens=64)) as engine:
            assert engine.context == 64 and engine.figures().kv_blocks == 2
            with pytest.raises(ContextError, match="in a context of 64"):
                await anext(engine.generate(Request((5,) * 64, GREEDY)))
            *_, last = await steps_of(engine.generate(Request((5,) * 60, GREEDY)))
            assert last.step.finish == "context" and last.step.stats.generated_tokens == 4

    asyncio.run(main())


def test_a_failed_step_ends_all_and_is_told(monkeypatch):
    async def main():
        engine, told = AsyncEngine.load(config=CONFIG), []
        engine.on_failure(told.append)
        runner = engine._scheduler._runner
        monkeypatch.setattr(runner, "next_tokens", lambda rows, choices: [] / 0)
        found = await asyncio.gather(*(steps_of(ask(engine, "abc")) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [EngineStoppedError] * 3
        await asyncio.to_thread(engine._stepper.join)
        assert isinstance(engine.failure, TypeError) and told == [engine.failure]
        with pytest.raises(EngineStoppedError, match="failed and answers no more: TypeError"):
            await anext(ask(engine, "abc"))
        await engine.close()

    asyncio.run(main())
