"""Background sink: order, overflow, errors and close."""

from __future__ import annotations

import logging
import threading
import time

from vz_ray.monitoring.background_sink import BackgroundSink


def test_items_are_delivered_in_order():
    delivered = []
    sink = BackgroundSink("x", delivered.append, 100)
    for number in range(50):
        sink.put(number)
    sink.close(5)
    assert (delivered, sink.dropped) == (list(range(50)), 0)


def test_full_queue_drops_items_without_blocking(caplog):
    release = threading.Event()
    delivered = []

    def slow(item):
        release.wait(20)
        delivered.append(item)

    sink = BackgroundSink("slow sink", slow, 3)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            sink.put(number)
    assert time.monotonic() - start < 1
    release.set()
    sink.close(5)
    assert len(delivered) + sink.dropped == 100
    assert 3 <= len(delivered) <= 4
    assert [record.message for record in caplog.records] == [
        "Dropping items for slow sink (logged once, all are counted): the queue is full"
    ]


def test_failed_delivery_drops_one_item():
    delivered = []

    def deliver(item):
        if item == 1:
            raise OSError("no")
        delivered.append(item)

    sink = BackgroundSink("x", deliver, 10)
    for number in range(3):
        sink.put(number)
    sink.close(5)
    assert (delivered, sink.dropped) == ([0, 2], 1)


def test_close_respects_its_timeout():
    stuck = threading.Event()
    sink = BackgroundSink("x", lambda _: stuck.wait(60), 10)
    for number in range(5):
        sink.put(number)
    start = time.monotonic()
    sink.close(0.3)
    assert time.monotonic() - start < 2
    assert sink.dropped >= 4
    stuck.set()
