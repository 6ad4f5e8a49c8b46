"""The read-bandwidth probe: it reads every byte once, on every worker, whatever the sizes."""

import numpy as np
import pytest

from cpu_kernels import bandwidth
from cpu_kernels.bandwidth import BandwidthProbe, read_bandwidth
from cpu_kernels.worker_pool import WorkerPool


@pytest.mark.parametrize("reader", [bandwidth._one_stream, bandwidth._four_streams])
@pytest.mark.parametrize("blocks", [1, 3, 17, 4095])
def test_every_word_is_read_once(reader, blocks):
    words = np.random.default_rng(blocks).integers(-(2**40), 2**40, blocks * 32)
    for workers in (1, 2, 3):
        sums = np.zeros(workers, np.int64)
        for worker in range(workers):
            reader(worker, workers, words.ctypes.data, blocks, sums)
        assert sums.sum() == words.sum()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_in_bytes_per_second(threads):
    pool = WorkerPool(threads)
    # Any machine reads between 10 MB/s and 100 TB/s: this catches a wrong unit, not a slow machine.
    assert 1e7 < read_bandwidth(pool, 2**20 + 100, seconds=0.0) < 1e14
    probe = BandwidthProbe(pool, 2**24)
    assert 1e7 < probe.measure(0.05) < 1e14 and 0 < probe.cores < threads + 1
    pool.close()


def test_the_faster_reader_counts(monkeypatch):
    probe = BandwidthProbe(WorkerPool(1), 2**16)
    times = {bandwidth._one_stream: 2.0, bandwidth._four_streams: 0.5}
    monkeypatch.setattr(probe, "_pass", times.__getitem__)
    assert probe.measure(0.0) == 2**16 / 0.5


def test_a_reader_that_skips_memory_is_noticed(monkeypatch):
    monkeypatch.setattr(bandwidth, "_four_streams", lambda worker, workers, address, blocks, sums: None)
    monkeypatch.setattr(bandwidth, "_one_stream", lambda worker, workers, address, blocks, sums: None)
    with pytest.raises(RuntimeError, match="read 0 of 8192"):
        BandwidthProbe(WorkerPool(1), 2**16)


def test_buffer_smaller_than_its_readers_is_refused():
    with pytest.raises(ValueError, match="at least 512 bytes, got 511"):
        BandwidthProbe(WorkerPool(2), 511)
