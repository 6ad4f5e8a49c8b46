"""The scheduler over a fake runner: every answer is what it would be alone, whatever is shared, set back, read in
pieces or given up beside it; and no block is lost on any way."""

import numpy as np
import pytest
from serving_cases import BLOCK, Served, answer_alone, request, scores_alone

from hybrid import SamplingSettings, ServingConfig
from hybrid.errors import ContextError
from hybrid.serving.request import DeadlineError, QueueFullError

DRAWN = SamplingSettings(temperature=1.0, top_k=0, top_p=0.9, seed=5, max_new_tokens=8)


def test_answers_of_many_are_those_of_each_alone():
    served = Served(64)
    requests = [request(range(n, 2 * n + 1), tokens=3 + n) for n in range(1, 10)]
    answers = [served.add(one) for one in requests]
    served.run()
    assert [served.tokens[answer] for answer in answers] == [answer_alone(one) for one in requests]
    assert set(served.ends.values()) == {"length"}
    served.check_blocks()


def test_rows_of_a_step_are_as_many_as_the_runner_takes():
    served = Served(64, most_rows=4)
    for n in range(6):
        served.add(request([n, 1, 2], tokens=30))
    served.run()
    assert max(served.runner.steps) == 4 and (4, 2) in zip(served.runner.steps, served.runner.steps[1:], strict=False)
    assert served.scheduler.tally.rows == 6 * 29 == sum(served.runner.steps)


def test_no_more_run_than_may():
    served = Served(64, ServingConfig(max_running=2))
    for n in range(5):
        served.add(request([n, 1, 2]))
    while served.scheduler.busy:
        served.step()
        assert len(served.scheduler.running) <= 2
    served.check_blocks()


def test_first_come_first_served():
    served, order = Served(12, ServingConfig(reuse_prefixes=False)), []
    answers = [served.add(request(range(n))) for n in (30, 20, 2, 10, 1)]
    while served.scheduler.busy:
        served.step(lambda event: order.append(event.answer))
    assert list(dict.fromkeys(order)) == answers  # the short ones do not overtake, though they would fit
    served.check_blocks()


def test_a_prompt_is_read_in_pieces_that_fit_the_pause():
    served = Served(256, ServingConfig(max_pause=0.1), capacity=512)
    served.add(request([1, 2], tokens=60))
    served.step()
    served.add(request(range(400 % 61, 400 % 61 + 1), tokens=1))
    long = served.add(request([n % 61 for n in range(400)], tokens=2))
    gaps, last = [], served.clock.now
    while not served.tokens[long]:
        served.step()
        gaps.append(served.clock.now - last)
        last = served.clock.now
    assert max(gaps) <= 0.1 and max(map(len, served.runner.pieces)) == 32
    assert 0.06 < served.scheduler.tally.longest_pause_seconds <= 0.1  # several pieces
    served.run()
    assert served.tokens[long] == answer_alone(long.request)


def test_a_slow_prompt_is_read_8_tokens_at_a_time_while_others_decode():
    served = Served(256, ServingConfig(max_pause=0.1), capacity=512)
    served.runner.read_seconds = lambda tokens: 0.05 * tokens
    served.add(request([1], tokens=40))
    served.step()
    served.runner.pieces.clear()
    long = served.add(request([n % 61 for n in range(100)], tokens=1))
    served.run()
    assert [len(piece) for piece in served.runner.pieces] == [8] * 12 + [4]
    assert served.ends[long] == "length"


def test_where_nobody_decodes_a_prompt_is_read_in_whole_chunks():
    served = Served(256, capacity=512)
    served.add(request([n % 61 for n in range(100)], tokens=1))
    served.run()
    assert [len(piece) for piece in served.runner.pieces] == [32, 32, 32, 4]


def test_a_known_prompt_costs_its_last_block_only():
    served, prompt = Served(), list(range(20))
    served.add(request(prompt))
    served.run()
    served.runner.pieces.clear()
    again = served.add(request(prompt))
    served.run()
    assert again.cached == 16 and served.runner.pieces == [(16, 17, 18, 19)]
    assert served.tokens[again] == answer_alone(again.request)
    assert served.scheduler.tally.prefix_hit_tokens == 16
    served.check_blocks()


def test_the_same_prompt_shares_while_the_first_still_answers():
    served, prompt = Served(), list(range(21))
    first = served.add(request(prompt, tokens=20))
    served.step()
    second = served.add(request(prompt, tokens=20))
    served.step()
    assert second.cached == 20 and first.cache.blocks[:5] == second.cache.blocks[:5]
    served.run()
    assert served.tokens[first] == served.tokens[second] == answer_alone(first.request)
    served.check_blocks()


def test_a_next_turn_knows_the_answer_before():
    served = Served()
    first = served.add(request(range(9), tokens=12))
    served.run()
    longer = [*range(9), *served.tokens[first], 1, 2, 3]
    second = served.add(request(longer))
    served.run()
    assert second.cached == 20  # of the 21 tokens before, all but the last were computed
    assert served.tokens[second] == answer_alone(second.request)


def test_without_reuse_nothing_is_kept():
    served = Served(config=ServingConfig(reuse_prefixes=False))
    for _ in range(2):
        answer = served.add(request(range(20)))
        served.run()
        assert answer.cached == 0 and served.pool.free == served.pool.blocks


def test_where_blocks_run_out_the_youngest_is_set_back_and_nobody_notices():
    served = Served(12, ServingConfig(reuse_prefixes=False))
    settings = SamplingSettings(temperature=1.0, top_k=5, seed=3, max_new_tokens=30)
    requests = [request([n, 1, 2, 3], settings=settings) for n in range(3)]
    answers = [served.add(one) for one in requests]
    while served.scheduler.busy:
        served.step()
        running = [answers.index(answer) for answer in served.scheduler.running]
        assert running == sorted(running)
    assert served.scheduler.tally.preempted > 0
    assert [served.tokens[answer] for answer in answers] == [answer_alone(one) for one in requests]
    served.check_blocks()


def test_what_is_set_back_is_found_again_as_a_prefix_where_its_blocks_are_not_wanted():
    served = Served(14)
    answers = [served.add(request([n, *range(11)], tokens=9)) for n in range(3)]
    served.run()
    assert served.scheduler.tally.preempted > 0
    assert sum(map(len, served.runner.pieces)) == 3 * 12  # no prompt was read twice
    assert [served.tokens[answer] for answer in answers] == [answer_alone(answer.request) for answer in answers]
    served.check_blocks()


def test_prefixes_make_room_before_anyone_waits():
    served = Served(12)
    served.add(request(range(30), tokens=1))
    served.run()
    assert served.scheduler.tree.blocks == 7
    answers = [served.add(request([50, n, *range(14)], tokens=4)) for n in range(2)]
    served.run()
    assert served.scheduler.tally.preempted == 0 and max(served.runner.steps) == 2
    assert [served.tokens[answer] for answer in answers] == [answer_alone(answer.request) for answer in answers]
    served.check_blocks()


def test_a_prompt_that_can_never_fit_is_refused():
    served = Served(4, capacity=64)
    with pytest.raises(ContextError, match="prompt of 16 tokens can never fit: sequences have 16 tokens, all together"):
        served.add(request([1] * 16))
    answer = served.add(request([1] * 12, tokens=50))
    served.run()
    assert served.ends[answer] == "context" and len(served.tokens[answer]) == 4
    served.check_blocks()


def test_too_many_that_wait_are_refused():
    served = Served(config=ServingConfig(max_waiting=2))
    for _ in range(2):
        served.add(request([1]))
    with pytest.raises(QueueFullError, match="2 requests wait already; try again in 1 s") as caught:
        served.add(request([1]))
    assert caught.value.retry_after >= 1


@pytest.mark.parametrize("rounds", range(6))
def test_who_is_given_up_gives_its_blocks_back_at_once(rounds):
    """Waiting, in the middle of its prompt, and running."""
    served = Served(24, ServingConfig(reuse_prefixes=False), chunk=4)
    other = served.add(request([9, 9], tokens=12))
    answer = served.add(request(range(17), tokens=12))
    for _ in range(rounds):
        served.step()
    served.scheduler.cancel(answer)
    served.scheduler.cancel(answer)
    held = len(other.cache.blocks)
    assert answer.cache.blocks == () and served.pool.free == served.pool.blocks - held
    assert served.scheduler.tally.cancelled == 1
    served.run()
    assert answer not in served.ends and served.tokens[other] == answer_alone(other.request)
    served.check_blocks()


def test_a_deadline_ends_an_answer_wherever_it_is():
    served = Served(10)
    running = served.add(request(range(8), tokens=30, deadline=0.1))
    waiting = served.add(request(range(30, 60), tokens=4, deadline=0.05))
    served.run()
    assert isinstance(served.ends[waiting], DeadlineError) and served.tokens[waiting] == []
    assert str(served.ends[running]) == "not finished within 0.1 s, its deadline"
    assert 0 < len(served.tokens[running]) < 30
    served.check_blocks()


def test_an_end_token_ends_an_answer():
    served = Served()
    tokens = answer_alone(request([3, 4, 5]))
    answer = served.add(request([3, 4, 5]), ends=frozenset(tokens[3:4]))
    served.run()
    assert served.tokens[answer] == tokens[: tokens.index(tokens[3]) + 1] and served.ends[answer] == "stop"


def test_a_prompt_is_scored_beside_answers():
    served, prompt = Served(chunk=8), [5, 3, 8, 1, 1, 2, 9, 30, 31, 32, 33]
    answer, scored = served.add(request(prompt)), served.add(request(prompt), top=2)
    served.run()
    assert served.ends[scored] is None and served.tokens[scored] == []
    assert [score.token for score in scored.scores] == prompt and scored.scores[0].logprob is None
    assert [score.logprob for score in scored.scores[1:]] == pytest.approx(scores_alone(prompt))
    assert [len(score.top) for score in scored.scores] == [0] + [2] * 10
    assert served.tokens[answer] == answer_alone(answer.request)
    served.check_blocks()


def test_counters_are_of_steps_only():
    served = Served()
    served.add(request(range(9), tokens=4))
    served.run()
    assert (served.scheduler.counters.neurons, served.scheduler.counters.computed) == (30, 12)
    assert (served.scheduler.tally.prompt_tokens, served.scheduler.tally.generated_tokens) == (9, 4)


@pytest.mark.parametrize("seed", range(4))
def test_anything_at_any_time(seed):
    """Arrivals, ends and cancellations in any order, in a pool that is too small for them."""
    rng = np.random.default_rng(seed)
    served = Served(14, capacity=48, most_rows=3, chunk=8)
    kept, gone = [], set()
    for _ in range(120):
        if rng.random() < 0.3:
            shared = list(range(int(rng.integers(0, 3)) * BLOCK))
            prompt = [*shared, *rng.integers(0, 61, rng.integers(1, 12)).tolist()]
            tokens = int(rng.integers(1, 20))
            settings = SamplingSettings(temperature=float(rng.integers(0, 2)), seed=4, max_new_tokens=tokens)
            kept.append(served.add(request(prompt, settings=settings)))
        if kept and rng.random() < 0.05:
            answer = kept[rng.integers(len(kept))]
            gone |= {answer} - set(served.ends)
            served.scheduler.cancel(answer)
        served.step()
    served.run()
    assert all(served.tokens[answer] == answer_alone(answer.request) for answer in kept if answer not in gone)
    assert served.scheduler.tally.preempted > 0 and served.scheduler.tally.prefix_hit_tokens > 0
    served.check_blocks()
