"""The shipped model: transformers' own tokens, answers that depend on nothing but weights and prompt, quality bars."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from few_threads import THREADS

from hybrid.console import progress
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.text import TextCodec
from hybrid.generation import SamplingSettings
from hybrid.model.loader import ModelFolder
from hybrid.offline.evaluate import evaluate
from hybrid.offline.project import ProfileRequest, Project
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.engine import Engine
from placement import Placement, PlacementSettings
from predictor.target import PredictorTarget
from profiler.common.hardware import HardwareProfile

CORPUS = EMBEDDED_MODEL.parent / "corpus"
GREEDY = SamplingSettings(temperature=0, max_new_tokens=64)
PROMPTS = [
    "Once upon a time there was a little dog",
    "The old man looked at the sea and",
    "<|bos|><|user|>Hello! How are you today?<|assistant|>",
    "<|bos|><|user|>Tell me a story about a boat.<|assistant|>",
    "<|bos|><|user|>What is the capital of France?<|assistant|>",
    "<|bos|><|user|>I had a bad day at work.<|assistant|>",
    "<|bos|><|system|>Be brief.<|user|>Why is the sky blue?<|assistant|>",
    "A cell is the smallest unit of",
    "In the beginning God made the heaven and the earth.",
    "She opened the door and saw",
    "One day, Tom and Lily went to the park.",
    "The king said to his daughter,",
    "<|bos|><|user|>Do you like music?<|assistant|>Yes, I do.<|user|>What kind?<|assistant|>",
    "There are 12 apples in a basket. If Tom takes 5,",
    "It was a dark and stormy night",
    "My favourite food is",
    "The teacher asked the children to",
    "<|bos|><|user|>Write a short poem about the moon.<|assistant|>",
    "Alice was beginning to get very tired",
    "Yes",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The embedded model, profiled and trained on a twelfth of what `prepare` takes."""
    made = Project(EMBEDDED_MODEL, tmp_path_factory.mktemp("bundle"), THREADS, progress)
    made.profile(ProfileRequest((CORPUS / "calibration.jsonl",), tokens=8192))
    made.train(made.load_profile(), PredictorTarget(), seed=0)
    return made


@pytest.fixture(scope="module")
def placements(project):
    found, bank, spec = project.load_profile(), project.load_predictors(), project.spec
    settings = PlacementSettings(48 << 20, spec.max_context, "learned", reserve=0)
    return {
        "solver's": project.place(found, bank, HardwareProfile.load(), settings).placement,
        "all hot": Placement.all_hot(spec),
        "all cold": Placement.all_cold(spec),
        "random": Placement.random(spec, 0.37, seed=5),
    }


def answers(engine, prompts, settings=GREEDY):
    """Tokens that follow each prompt, from a KV cache that starts empty, as the first answer's does."""
    found = []
    for prompt in prompts:
        engine.reset()
        found.append([step.token for step in engine.generate(engine.codec.encode(prompt, special=False), settings)])
    return found


def test_greedy_tokens_are_those_of_transformers():
    """Greedy decoding is right exactly if each token is the likeliest after those before it: one call an answer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    spec = ModelFolder.open(EMBEDDED_MODEL).spec
    codec = TextCodec(EMBEDDED_MODEL, spec.vocab_size)
    found = {}
    for sparsity, every in (("dense", 1), ("exact", 4)):
        engine = Engine.load(config=EngineConfig(sparsity, threads=THREADS), placement=Placement.random(spec, 0.3, 1))
        found[sparsity] = answers(engine, PROMPTS[::every])
        engine.close()
    assert found["dense"][::4] == found["exact"]
    ends = model.generation_config.eos_token_id
    for prompt, answer in zip(PROMPTS, found["dense"], strict=True):
        ids = codec.encode(prompt, special=False)
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
        assert answer == logits.argmax(-1).tolist()
        stops = [token in ([ends] if isinstance(ends, int) else ends) for token in answer]
        assert not any(stops[:-1]) and (stops[-1] or len(answer) == 64)
    assert len(PROMPTS) == 20 and sum(map(len, found["dense"])) > 900


@pytest.mark.parametrize("sparsity", ["dense", "exact", "learned"])
def test_answers_depend_neither_on_placement_nor_on_threads(sparsity, project, placements):
    bank = project.load_predictors()
    found, settings = {}, replace(GREEDY, max_new_tokens=40)
    # Three threads have fewer cores, and each token costs ten times as much.
    for name, threads in (("solver's", 1), ("solver's", 2), ("all hot", 1), ("all cold", 1), ("random", 3)):
        engine = Engine.load(config=EngineConfig(sparsity, threads=threads), placement=placements[name], bank=bank)
        found[name, threads] = answers(engine, PROMPTS[::7], settings)
        engine.close()
    first = found["solver's", 1]
    assert all(tokens == first for tokens in found.values()), sparsity
    assert sum(map(len, first)) > 100


def test_learned_answers_the_same_from_a_warm_cache(project, placements):
    engine = Engine.load(
        config=EngineConfig("learned", threads=THREADS),
        placement=placements["solver's"],
        bank=project.load_predictors(),
    )
    for prompt in PROMPTS[::3]:
        cold, warm = ([step.token for step in engine.generate(prompt, GREEDY)] for _ in range(2))
        assert cold == warm
    engine.close()


def test_the_solvers_placement_serves_more_than_its_share(project, placements):
    placement, frequency = placements["solver's"], project.load_profile().frequency()
    share = placement.hot.sum() / frequency.size
    assert 0.1 < share < 0.9 and placement.hot_firing_share(frequency) > 1.3 * share


def test_exact_loses_nothing_and_learned_meets_its_bars(project):
    bank = project.load_predictors()
    project.use_predictors(bank)
    heldout = project.windows(ProfileRequest((CORPUS / "heldout.jsonl",), tokens=4096))
    dense, exact, learned = evaluate(
        project.model, project.runtime, ["dense", "exact", "learned"], heldout, lambda count: None
    )
    assert exact.perplexity == pytest.approx(dense.perplexity, rel=1e-6)
    assert learned.perplexity < 1.01 * dense.perplexity
    assert learned.computed_share < 2 * exact.fired_share
    assert sum(bank.bytes_per_layer) < 0.1 * project.spec.model_bytes
    assert dense.kl == 0 and exact.kl < 1e-6 and exact.top1_agreement > 0.999
    assert 0 < learned.kl < 0.02 and learned.fired_share < learned.computed_share


def test_counts_of_the_profile_are_plausible(project):
    found = project.load_profile()
    assert found.tokens == 8192 and (found.counts <= found.tokens).all()
    # The model's card: 7.6% of neurons fire on held-out text.
    assert 0.06 < found.share_firing().mean() < 0.1
    assert found.coverage(0.2) > 0.35
    assert np.isfinite(found.inputs).all()


def test_keys_and_values_in_int8_cost_next_to_nothing(project):
    heldout = project.windows(ProfileRequest((CORPUS / "heldout.jsonl",), tokens=4096))
    given = project.model, project.runtime, ["dense"], heldout, lambda count: None
    plain, dense = evaluate(*given, kv="int8")
    assert (plain.strategy, plain.kv, dense.strategy, dense.kv) == ("dense", None, "dense", "int8")
    assert plain == evaluate(*given)[0]
    assert 0 < dense.kl < 1e-3 and dense.top1_agreement > 0.99
    assert dense.perplexity == pytest.approx(plain.perplexity, rel=1e-3)


def test_prompts_read_fast_cost_next_to_nothing(project):
    heldout = project.windows(ProfileRequest((CORPUS / "heldout.jsonl",), tokens=4096))
    given = project.model, project.runtime, ["dense"], heldout, lambda count: None
    plain, fast = evaluate(*given, prefill="fast")
    assert (plain.prefill, fast.prefill, fast.strategy) == ("precise", "fast", "dense")
    assert 0 < fast.kl < 1e-5 and fast.top1_agreement > 0.995
    assert fast.perplexity == pytest.approx(plain.perplexity, rel=5e-4)
    assert evaluate(*given) == [plain]
