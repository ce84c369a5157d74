"""Time and memory by stage: what the system and the device count, and what a benchmark says of a model."""

import numpy
import pytest
import torch

from sparsekit.system import Meter, bars, track
from sparsekit.system import meter as module

MEGABYTE = 2**20


def test_a_peak_is_seen_however_short_it_was():
    with Meter() as meter:
        if not meter._counted:
            pytest.skip("this system has no counter of a process's peak that can be set back")
        with meter.stage("large"):
            numpy.ones(200 * MEGABYTE, dtype=numpy.uint8)  # gone at once
        with meter.stage("small"):
            pass
    peaks = {stage["name"]: stage["peak_memory_bytes"] for stage in meter.stages()}
    assert peaks["large"] - peaks["small"] > 150 * MEGABYTE


def test_where_the_system_does_not_count_memory_is_looked_at(monkeypatch):
    monkeypatch.setattr(module, "_set_back_process", lambda: False)
    with Meter() as meter, meter.stage("held"):
        held = numpy.ones(200 * MEGABYTE, dtype=numpy.uint8)
    assert meter.peak["held"] > 200 * MEGABYTE and len(held)


def test_a_device_that_counts_is_asked(monkeypatch):
    """What is on the device is told beside the process's memory, and begins anew with each stage."""
    held: list[int] = [0]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: held[0], raising=False)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: held.__setitem__(0, 7), raising=False)
    with Meter() as meter:
        with meter.stage("outer"):
            held[0] = 50
            with meter.stage("inner"):
                held[0] = 900
    told = {stage["name"]: stage["peak_device_bytes"] for stage in meter.stages()}
    assert told == {"outer": 50, "inner": 900}


def test_without_a_device_nothing_is_said_of_one():
    with Meter() as meter, meter.stage("alone"):
        pass
    if not torch.accelerator.is_available():
        assert "peak_device_bytes" not in meter.stages()[0]


def test_a_bar_says_how_far_work_is(capsys, monkeypatch):
    """On a terminal's standard error, gone when it is done; elsewhere, and inside of other work, nothing."""
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3] and capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with bars(True):
        for _ in track(range(2), "counting"):
            assert list(track("ab", "letters")) == ["a", "b"]
    said = capsys.readouterr().err
    assert "counting" in said and "2/2" in said and "letters" not in said
