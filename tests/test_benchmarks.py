"""The benchmark measures the real loop: it must not fall behind it."""

import importlib.util
from pathlib import Path

import pytest

import main


@pytest.mark.parametrize("prioritized", [False, True])
def test_the_throughput_benchmark_times_the_real_loop_and_restores_its_constants(monkeypatch, prioritized):
    path = Path(main.__file__).parent / "benchmarks" / "throughput.py"
    spec = importlib.util.spec_from_file_location("throughput", path)
    throughput = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(throughput)
    monkeypatch.setattr(throughput, "WINDOW", 0.2)
    for name, value in {"BATCH_SIZE": 4, "POLICY_UPDATE": 32, "DEVICE": "cpu", "THREADS": 1}.items():
        monkeypatch.setattr(main, name, value)
    before = dict(vars(main))
    assert throughput.loop(prioritized) > 0
    assert dict(vars(main)) == before
