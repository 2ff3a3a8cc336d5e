"""Timer of a period without workers."""

from __future__ import annotations

from vz_ray.rollout.worker_pool import NoWorkerTimeout


def test_warnings_repeat_within_each_absence() -> None:
    timer, warned = NoWorkerTimeout(warn_after_s=10, warn_every_s=60), []
    for now in range(0, 200, 5):
        absent = now < 100 or now >= 150
        timer.elapsed_s(now, absent)
        if timer.should_warn(now):
            warned.append(now)
    assert warned == [10, 70, 160]


def test_elapsed_time_restarts_with_each_absence() -> None:
    timer = NoWorkerTimeout(warn_after_s=10, warn_every_s=60)
    assert [timer.elapsed_s(now, True) for now in (100, 101, 107)] == [0, 1, 7]
    assert timer.elapsed_s(108, False) == 0
    assert timer.elapsed_s(120, True) == 0
