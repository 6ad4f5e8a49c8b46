"""Hardware profiles: the shipped default, the file format, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
from placement_cases import NO_GPU, ROUND_HARDWARE

from profiler import hardware
from profiler.errors import InputError
from profiler.hardware import HardwareProfile, measure_cpu, measure_gpu


def test_default_profile_has_a_gpu_and_says_that_it_is_a_default():
    profile = HardwareProfile.load()
    assert profile.source == "default" and profile.has_gpu
    assert profile.gpu_read_bandwidth > profile.cpu_read_bandwidth > profile.pcie_bandwidth


@pytest.mark.parametrize("profile", [ROUND_HARDWARE, NO_GPU])
def test_round_trip(tmp_path, profile):
    profile.save(tmp_path / "hardware.json")
    assert HardwareProfile.load(tmp_path / "hardware.json") == profile


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("source", "guessed"),
        ("source", ["measured"]),
        ("cpu_threads", 0),
        ("cpu_threads", 1.5),
        ("cpu_threads", True),
        ("cpu_read_bandwidth", 0),
        ("cpu_read_bandwidth", float("nan")),
        ("gpu_read_bandwidth", -1.0),
        ("gpu_read_bandwidth", 0),  # leaves VRAM without a GPU
        ("pcie_bandwidth", 0),
        ("handoff_seconds", float("inf")),
        ("gpu_launch_seconds", "2e-6"),
        ("cpu_layer_seconds", None),
        ("vram_bytes", -1),
        ("vram_bytes", 0),
    ],
)
def test_senseless_field_is_named(tmp_path, field, value):
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps(asdict(ROUND_HARDWARE) | {field: value}))
    with pytest.raises(InputError, match=field) as caught:
        HardwareProfile.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"null"])
def test_file_that_is_not_an_object_is_refused(tmp_path, content):
    path = tmp_path / "hardware.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"hardware\.json") as caught:
        HardwareProfile.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_missing_field_and_unknown_field_are_named(tmp_path):
    path = tmp_path / "hardware.json"
    with pytest.raises(InputError, match="No such file"):
        HardwareProfile.load(path)
    fields = asdict(ROUND_HARDWARE)
    path.write_text(json.dumps(fields | {"colour": 1}))
    with pytest.raises(InputError, match="unknown colour"):
        HardwareProfile.load(path)
    del fields["pcie_bandwidth"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="lacks pcie_bandwidth"):
        HardwareProfile.load(path)


def test_measured_profile_of_the_cpu_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_PROBE_BYTES", 2**20)
    monkeypatch.setattr(hardware, "_PROBE_SECONDS", 0.0)
    profile = measure_cpu()
    assert profile.source == "measured" and not profile.has_gpu
    # Any machine reads between 10 MB/s and 100 TB/s: this catches a wrong unit, not a slow machine.
    assert 1e7 < profile.cpu_read_bandwidth < 1e14
    profile.save(tmp_path / "hardware.json")
    assert HardwareProfile.load(tmp_path / "hardware.json") == profile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA GPU")
def test_measuring_this_machines_gpu_gives_a_plausible_profile(tmp_path):
    found = measure_gpu()
    assert found.source == "measured" and found.has_gpu
    assert 50e9 < found.gpu_read_bandwidth < 50e12 and 1e9 < found.pcie_bandwidth < 1e12
    assert 0 < found.gpu_launch_seconds < found.handoff_seconds < 1e-3
    found.save(tmp_path / "h.json")
    assert HardwareProfile.load(tmp_path / "h.json") == found
