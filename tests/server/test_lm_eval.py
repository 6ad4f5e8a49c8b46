"""`lm-eval`, unmodified, scores a small task through `/v1/completions` as our Python API does."""

import asyncio
import json
import os
from itertools import islice

import pytest
from server_cases import running, service_of

from hybrid import AsyncEngine, EngineConfig
from hybrid.formats.bundle import EMBEDDED_CORPUS, EMBEDDED_MODEL

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e .[clients]")
datasets = pytest.importorskip("datasets")
tasks = pytest.importorskip("lm_eval.tasks")

QUESTIONS, CHOICES = 8, 3


def documents():
    """Questions of shipped text that the model has not seen; the right answer and those of other questions."""
    with (EMBEDDED_CORPUS / "heldout.jsonl").open(encoding="utf-8") as lines:
        conversations = (json.loads(line).get("messages") for line in lines)
        talks = list(islice((messages[:2] for messages in conversations if messages), QUESTIONS))
    answers = [answer["content"] for _, answer in talks]
    for at, (question, _) in enumerate(talks):
        choices = [answers[(at + other) % QUESTIONS] for other in range(CHOICES)]
        right = at % CHOICES
        choices[0], choices[right] = choices[right], choices[0]
        yield {"question": question["content"], "choices": choices, "right": right}


@pytest.fixture(scope="module")
def task():
    return {
        "task": "shipped_replies",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(list(documents()))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "<|user|>{{question}}<|assistant|>",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def test_the_score_is_that_of_our_own_api(task, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    manager = tasks.TaskManager(include_defaults=False)
    engine = AsyncEngine.load(config=EngineConfig(threads=1))
    with running(service_of(engine)) as url:
        arguments = {
            "model": "any",
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(EMBEDDED_MODEL),
            "num_concurrent": 4,
            "max_length": 1024,
            "max_retries": 1,
        }
        found = lm_eval.simple_evaluate(
            "local-completions",
            model_args=arguments,
            tasks=[task],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        ours = [likelihoods(engine, document) for document in documents()]
    asyncio.run(engine.close())
    theirs = [[float(each[0][0]) for each in sample["resps"]] for sample in found["samples"]["shipped_replies"]]
    assert theirs == [pytest.approx(values, abs=1e-4) for values in ours]
    right = [values.index(max(values)) == each["right"] for values, each in zip(ours, documents(), strict=True)]
    accuracy = found["results"]["shipped_replies"]["acc,none"]
    assert accuracy == sum(right) / QUESTIONS > 1 / CHOICES


def likelihoods(engine, document):
    """The log-likelihood of each answer after the question."""
    start, sums = f"<|user|>{document['question']}<|assistant|>", []
    for choice in document["choices"]:
        found = asyncio.run(engine.score(engine.codec.encode(start + choice)))
        sums.append(sum(each.logprob for each in found[len(engine.codec.encode(start)) :]))
    return sums
