from __future__ import annotations

import logging
import threading
import time

from vz_ray.monitoring.background_sink import BackgroundSink


def test_items_are_delivered_in_their_order():
    got = []
    behind = BackgroundSink("x", got.append, 100)
    for number in range(50):
        behind.put(number)
    behind.close(5)
    assert (got, behind.dropped) == (list(range(50)), 0)


def test_what_finds_no_room_is_dropped_and_counted_and_nobody_waits(caplog):
    go = threading.Event()
    got = []

    def slow(item):
        go.wait(20)
        got.append(item)

    behind = BackgroundSink("a slow one", slow, 3)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            behind.put(number)
    assert time.monotonic() - began < 1
    go.set()
    behind.close(5)
    assert len(got) + behind.dropped == 100
    assert 3 <= len(got) <= 4
    assert [record.message for record in caplog.records] == [
        "a slow one does not take what it is sent, which is dropped and counted: it is too slow"
    ]


def test_an_error_loses_its_item_alone():
    got = []

    def picky(item):
        if item == 1:
            raise OSError("no")
        got.append(item)

    behind = BackgroundSink("x", picky, 10)
    for number in range(3):
        behind.put(number)
    behind.close(5)
    assert (got, behind.dropped) == ([0, 2], 1)


def test_the_end_waits_no_longer_than_it_may():
    stuck = threading.Event()
    behind = BackgroundSink("x", lambda _: stuck.wait(60), 10)
    for number in range(5):
        behind.put(number)
    began = time.monotonic()
    behind.close(0.3)
    assert time.monotonic() - began < 2
    assert behind.dropped >= 4
    stuck.set()
