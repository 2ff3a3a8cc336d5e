"""Runs teacher episodes against a local endpoint."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from vz_ray.config.distill import TeacherConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.teacher_client import TeacherClient
from vz_ray.distill.teacher_runner import DistillationLog, TeacherJob, TeacherRunner
from vz_ray.video.local_source import LocalFrameSource

CONFIG = TeacherConfig(
    model="oracle",
    base_url="http://127.0.0.1:9/v1",
    max_attempts=4,
    backoff_s=0.02,
    request_timeout_s=30,
    turn_timeout_s=90,
    episode_timeout_s=120,
    input_usd_per_mtok=10.0,
    output_usd_per_mtok=100.0,
)
REWARD = RewardConfig(max_zoom_frames=8)


def run_teacher_jobs(
    url: str,
    jobs,
    chat_format,
    episode_config,
    folder: Path,
    *,
    check=lambda: None,
    config=CONFIG,
    max_concurrent=4,
):
    """Run jobs to the end; return the log, the ledger and the raised exception."""

    async def run():
        ledger = CostLedger(folder / "replies.jsonl", config.max_cost_usd)
        log = DistillationLog(folder / "exemplar.jsonl", {"teacher": config.model})
        teacher = TeacherClient(replace(config, base_url=url), ledger, check)
        raised = None
        with LocalFrameSource() as frames:
            prompt = TeacherPrompt("guide")
            runner = TeacherRunner(teacher, chat_format, frames, episode_config, REWARD, prompt, "exemplar")
            try:
                await runner.run_jobs(jobs, log, max_concurrent=max_concurrent)
            except Exception as error:
                raised = error
            finally:
                await teacher.close()
        return log, ledger, raised

    return asyncio.run(run())


def make_jobs(tasks, attempts=1):
    return [TeacherJob(task, sample) for task in tasks for sample in range(attempts)]
