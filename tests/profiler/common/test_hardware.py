"""Hardware profiles: the shipped default, the file format, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from placement_cases import NO_GPU, ROUND_HARDWARE

from profiler.common.errors import InputError
from profiler.common.hardware import FORMAT_VERSION, HardwareProfile


def test_default_profile_has_a_gpu_and_says_that_it_is_a_default():
    profile = HardwareProfile.load()
    assert profile.source == "default" and profile.has_gpu
    assert profile.gpu_read_bandwidth > profile.cpu_read_bandwidth > profile.pcie_bandwidth


TABLES = replace(
    ROUND_HARDWARE,
    cpu_threads=8,
    cpu_read_bandwidth=8e9,
    cpu_scattered_bandwidth=6e9,
    cpu_bandwidths=((1, 2e9, 1e9), (4, 6e9, 4e9), (8, 8e9, 6e9)),
    gpu_kernels={"gemv": ((1e6, 3e-6), (3e6, 5e-6)), "attention": ((1e3, 4e-6),)},
)


@pytest.mark.parametrize("profile", [ROUND_HARDWARE, NO_GPU, TABLES])
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
        ("pcie_host_bandwidth", -1),
        ("cpu_scattered_bandwidth", "fast"),
        ("token_seconds", -1e-6),
        ("cpu_gemm_flops", 0),
        ("gpu_gemm_flops", 0),
        ("cpu_fast_gemm_flops", -1),
        ("gpu_tensor_flops", "many"),
        ("cpu_bandwidths", 3),
        ("cpu_bandwidths", [[1, 2e9]]),
        ("cpu_bandwidths", [[0, 2e9, 1e9]]),
        ("cpu_bandwidths", [[1, 2e9, 0]]),
        ("cpu_bandwidths", [[4, 2e9, 1e9], [2, 1e9, 1e9]]),
        ("gpu_kernels", []),
        ("gpu_kernels", {"conv": [[1, 1e-6]]}),
        ("gpu_kernels", {"gemv": []}),
        ("gpu_kernels", {"gemv": [[1, float("nan")]]}),
        ("gpu_kernels", {"gemv": [[-1, 1e-6]]}),
        ("gpu_kernels", {"gemv": [[2, 1e-6], [2, 2e-6]]}),
    ],
)
def test_senseless_field_is_named(tmp_path, field, value):
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps(ROUND_HARDWARE.to_json() | {field: value}))
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
    fields = ROUND_HARDWARE.to_json()
    path.write_text(json.dumps(fields | {"colour": 1}))
    with pytest.raises(InputError, match="unknown colour"):
        HardwareProfile.load(path)
    del fields["pcie_bandwidth"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="lacks pcie_bandwidth"):
        HardwareProfile.load(path)


@pytest.mark.parametrize("version", [None, 2, 4, "3"])
def test_another_format_is_refused_in_one_line(tmp_path, version):
    path = tmp_path / "hardware.json"
    fields = ROUND_HARDWARE.to_json() | {"version": version}
    if version is None:
        del fields["version"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"version.* reads {FORMAT_VERSION}; .*hybrid hardware") as caught:
        HardwareProfile.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_hand_written_file_leaves_out(tmp_path):
    fields = ROUND_HARDWARE.to_json()
    optional = ("pcie_host_bandwidth", "cpu_scattered_bandwidth", "token_seconds", "cpu_gemm_flops", "gpu_gemm_flops")
    for name in (
        *optional,
        "cpu_fast_gemm_flops",
        "gpu_tensor_flops",
        "cpu_panel_tokens",
        "cpu_bandwidths",
        "gpu_kernels",
    ):
        del fields[name]
    (tmp_path / "h.json").write_text(json.dumps(fields))
    profile = HardwareProfile.load(tmp_path / "h.json")
    assert profile.scattered_bandwidth == profile.cpu_read_bandwidth
    assert profile.host_bandwidth == profile.pcie_bandwidth
    assert profile.kernel_seconds("attention", np.array([1e7])) == pytest.approx([3e-5 + 1.0])


def test_kernel_seconds_between_below_and_beyond_what_was_measured():
    sizes = np.array([[0.0, 1e6], [2e6, 3e6 + 1e7]])
    expected = [[3e-6, 3e-6], [4e-6, 5e-6 + 1.0]]
    np.testing.assert_allclose(TABLES.kernel_seconds("gemv", sizes), expected)


@pytest.mark.parametrize(
    ("threads", "read", "scattered"),
    [(1, 2e9, 1e9), (2, 2e9 + 4e9 / 3, 2e9), (6, 7e9, 5e9), (8, 8e9, 6e9), (64, 8e9, 6e9)],
)
def test_other_numbers_of_threads(threads, read, scattered):
    found = TABLES.with_threads(threads)
    assert found.cpu_threads == threads
    assert found.cpu_read_bandwidth == pytest.approx(read) and found.scattered_bandwidth == pytest.approx(scattered)


def test_threads_without_a_table():
    eight = replace(ROUND_HARDWARE, cpu_threads=8)
    assert eight.with_threads(2).cpu_read_bandwidth == pytest.approx(eight.cpu_read_bandwidth / 4)
    assert eight.with_threads(9).cpu_read_bandwidth == eight.cpu_read_bandwidth
    with pytest.raises(InputError, match="cpu_threads"):
        eight.with_threads(0)


def test_products_by_fewer_threads():
    eight = replace(ROUND_HARDWARE, cpu_threads=8, cpu_gemm_flops=8e9, cpu_fast_gemm_flops=1.6e10)
    found = eight.with_threads(2)
    assert (found.cpu_gemm_flops, found.cpu_fast_gemm_flops) == (pytest.approx(2e9), pytest.approx(4e9))
    assert eight.with_threads(9) == replace(eight, cpu_threads=9, cpu_scattered_bandwidth=1e6)
