"""Certificates as an offline step: made, planned for, and taken by `prepare` and `auto` where they are worth more."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from model_cases import make_model
from powerinfer_cases import prepared

from hybrid import EngineConfig, commands, reports
from hybrid.errors import ArtifactError
from hybrid.model.loader import ModelFolder
from hybrid.offline.certify import certify, is_worth_more
from hybrid.offline.project import Project
from hybrid.runtime.plan import plan_run
from placement.placement import PlacementSettings
from profiler.common.hardware import HardwareProfile
from profiler.common.progress import no_progress

pytest.importorskip("transformers")


def result(seconds):
    return SimpleNamespace(solution=SimpleNamespace(seconds=seconds))


def bank_with_loss(loss):
    report = None if loss == "no report" else SimpleNamespace(perplexity_increase=loss)
    return SimpleNamespace(report=report)


@pytest.mark.parametrize(
    ("certified", "loss", "worth"),
    [(1.0, 0.0, True), (1.06, 0.005, True), (1.07, 0.005, False), (0.9, None, False), (0.9, "no report", False)],
)
def test_a_loss_of_predictors_counts_as_time(certified, loss, worth):
    assert is_worth_more(result(certified), result(1.0), bank_with_loss(loss)) is worth


def test_without_predictors_it_is_held_against_exact():
    assert is_worth_more(result(0.9), result(1.0), None) and not is_worth_more(result(1.0), result(1.0), None)


def test_copies_say_how_many_silent_neurons_they_leave_in_doubt(tmp_path, capsys):
    project = prepared(tmp_path / "m")
    made = certify(project, no_progress)
    assert made.made_from["profile"] == project.load_profile().header.key
    assert 0 < made.made_from["uncertain"] < 0.1
    found = project.bundle.copies_header(project.spec)
    assert found.made_from == made.made_from
    settings = PlacementSettings(2**30, 40, "certified", solver="greedy")
    profile, hardware = project.load_profile(samples=False), HardwareProfile.load()
    placement = project.place(profile, None, hardware, settings).placement
    assert placement.made_from["strategy"] == "certified" and placement.made_from["predictors"] is None
    reports.inspect(tmp_path / "m", None)
    assert "silent neurons left in doubt: " in capsys.readouterr().out


def test_auto_follows_the_placement(tmp_path):
    project = prepared(tmp_path / "m")
    opened, config = ModelFolder.open(tmp_path / "m"), EngineConfig(vram_budget=0)
    certify(project, no_progress)
    assert plan_run(opened, config).strategy == "learned"
    placement = project.bundle.load_placement(project.spec)
    made = placement.made_from | {"strategy": "certified"}
    project.write_placement(replace(placement, made_from=made))
    plan = plan_run(opened, config)
    assert plan.strategy == "certified" and plan.bank is None
    project.bundle.copies.unlink()
    assert plan_run(opened, config).strategy == "learned"


def test_prepare_certifies_what_is_worth_it(tmp_path, monkeypatch, capsys):
    """By a file that came without a report nothing is decided; a choice that is made stays."""
    project = prepared(tmp_path / "m")
    profile, predictors = project.load_profile().header, project.load_predictors().header
    settings = PlacementSettings(2**30, 40, "learned", solver="greedy")
    monkeypatch.setattr(commands, "is_worth_more", lambda certified, learned, bank: True)
    for said in ("certify: it is as fast, and loses nothing", "place: present and current"):
        commands._place_anew(project, settings, HardwareProfile.load(), (profile, predictors))
        assert said in capsys.readouterr().err
    assert project.bundle.load_placement(project.spec).made_from["strategy"] == "certified"
    with project.bundle.open_copies(project.spec) as stored:
        assert stored.layer(2).slope is not None


def test_the_commands(tmp_path, capsys):
    project = prepared(tmp_path / "m")
    options = {"bundle": None, "threads": 1}
    place = {"vram_budget": "1GiB", "context": None, "solver": "greedy", "hardware": "default", "dry_run": False}
    with pytest.raises(ArtifactError, match="missing; make it with: hybrid certify"):
        commands.place(tmp_path / "m", options | place | {"sparsity": "certified"})
    commands.certify(tmp_path / "m", options)
    said = capsys.readouterr()
    assert "silent neurons that it leaves in doubt: " in said.out and f"wrote {project.bundle.copies}" in said.err
    commands.place(tmp_path / "m", options | place | {"sparsity": "certified"})
    assert "certificates" in capsys.readouterr().out


def test_without_a_profile_there_is_less_to_say(tmp_path):
    make_model("opt", tmp_path)
    assert certify(Project(tmp_path, None, 1, no_progress), no_progress).made_from == {"dtype": "f32"}
