"""A fleet without workers: for how long, and when it is worth a word."""

from __future__ import annotations

from vz_ray.rollout.worker_pool import NoWorkerTimeout


def test_it_is_told_after_a_while_then_now_and_then_and_anew_the_next_time() -> None:
    absence, told = NoWorkerTimeout(warn_after_s=10, warn_every_s=60), []
    for now in range(0, 200, 5):
        absent = now < 100 or now >= 150
        absence.elapsed_s(now, absent)
        if absence.should_warn(now):
            told.append(now)
    assert told == [10, 70, 160]


def test_its_length_counts_from_its_own_beginning() -> None:
    absence = NoWorkerTimeout(warn_after_s=10, warn_every_s=60)
    assert [absence.elapsed_s(now, True) for now in (100, 101, 107)] == [0, 1, 7]
    assert absence.elapsed_s(108, False) == 0
    assert absence.elapsed_s(120, True) == 0
