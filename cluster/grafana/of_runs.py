"""Panels about training runs: learning, and the fleet with its clips."""

from __future__ import annotations

from cluster.grafana.panel import Panel, gauge, one, quantile, rate

TRAINING = (
    Panel(
        "Iteration",
        "short",
        "Iterations done, of those that the run is to have.",
        (("done", one("ray_vz_iteration")), ("of", one("ray_vz_iterations"))),
        "stat",
    ),
    Panel(
        "Doing",
        "short",
        "What the run is doing: the part that is 1.",
        (("{{phase}}", one("ray_vz_phase", "phase") + " == 1"),),
        "stat",
    ),
    Panel(
        "Since the last iteration",
        "s",
        "How long no iteration has ended. Compare with the parts of one below.",
        (("{{run}}", "time() - " + one("ray_vz_progress_timestamp_seconds")),),
        "stat",
    ),
    Panel(
        "Reward",
        "short",
        "Mean of each part, unweighted, and of the total, over an iteration's valid episodes.",
        (("{{run}} {{part}}", one("ray_vz_reward", "run, part")),),
    ),
    Panel(
        "Zooms",
        "percentunit",
        "Episodes that tried a zoom, and zooms carried out of those tried.",
        (
            ("{{run}} tried", one("ray_vz_zoom_call_ratio")),
            ("{{run}} carried out", one("ray_vz_zoom_valid_ratio")),
        ),
    ),
    gauge("Zooms per episode", "short", "ray_vz_zooms_per_episode", "Zooms carried out."),
    Panel(
        "Mismatch",
        "short",
        "KL of engine and learner per token, nats, and the limit at which training stops itself.",
        (("{{run}}", one("ray_vz_mismatch_kl_nats")), ("limit", one("ray_vz_mismatch_kl_limit_nats"))),
    ),
    Panel(
        "Staleness",
        "short",
        "Age of the tokens that were learned from, in updates of the weights.",
        (
            ("{{run}} mean", one("ray_vz_staleness_mean_updates")),
            ("{{run}} most", one("ray_vz_staleness_max_updates")),
        ),
    ),
    gauge(
        "Entropy",
        "short",
        "ray_vz_learner_entropy_nats",
        "Of the policy, per token, nats: a collapse shows here first.",
    ),
    gauge("Loss", "short", "ray_vz_learner_loss", "Of the learner's step."),
    gauge("Gradient norm", "short", "ray_vz_learner_grad_norm", "Before clipping."),
    gauge(
        "Updates skipped",
        "short",
        "ray_vz_learner_skipped_updates",
        "In the last iteration, for a loss or gradient that is no finite number.",
    ),
    gauge("Frames per episode", "short", "ray_vz_frames_per_episode", "Frames shown, overview included."),
    Panel(
        "Parts of an iteration",
        "s",
        "Playing, learning and publishing.",
        (("{{run}} {{phase}}", one("ray_vz_phase_seconds", "run, phase")),),
    ),
    gauge("Publish", "s", "ray_vz_sync_seconds", "From pausing to resuming generation."),
    Panel(
        "Checkpoints",
        "s",
        "What the last one took, and how old it is.",
        (
            ("{{run}} took", one("ray_vz_checkpoint_seconds")),
            ("{{run}} age", "time() - " + one("ray_vz_checkpoint_timestamp_seconds")),
        ),
    ),
    Panel(
        "Learner",
        "short",
        "Tokens a second that the learner reads.",
        (("{{run}}", one("ray_vz_learner_tokens_per_second")),),
    ),
    Panel(
        "Groups",
        "short",
        "Groups a second, learned from and dropped: those of equal rewards teach nothing.",
        (("{{run}} {{outcome}}", rate("ray_vz_groups_total", "run, outcome")),),
    ),
    Panel(
        "Not judged, not finite",
        "short",
        "Share of episodes without a verdict, and figures that were no numbers.",
        (
            ("{{run}} invalid", one("ray_vz_invalid_ratio")),
            ("{{run}} not finite", rate("ray_vz_nonfinite_values_total")),
        ),
    ),
)

FLEET = (
    Panel(
        "Workers",
        "short",
        "Rollout workers by state; dead ones are replaced under new names.",
        (("{{run}} {{state}}", one("ray_vz_workers", "run, state")),),
    ),
    Panel(
        "Episodes",
        "short",
        "With a worker, and waiting for one with room.",
        (
            ("{{run}} playing", one("ray_vz_episodes_playing")),
            ("{{run}} waiting", one("ray_vz_episodes_waiting")),
        ),
    ),
    Panel(
        "Lost workers",
        "short",
        "Workers that died, in the last hour.",
        (("{{run}}", 'sum by (run) (increase(ray_vz_lost_workers_total{run=~"$run"}[1h]))'),),
        "stat",
    ),
    gauge("Tokens a second", "short", "ray_vz_tokens_per_second", "Sampled by all engines, while they play."),
    gauge("Episodes a second", "short", "ray_vz_episodes_per_second", "Accepted."),
    Panel(
        "How episodes end",
        "short",
        "Episodes a second, by status. Failed ones could not be played.",
        (("{{run}} {{status}}", rate("ray_vz_episodes_total", "run, status")),),
    ),
    Panel(
        "Length of episodes",
        "s",
        "Without the time until they have a place, and without their reward.",
        (
            ("median", quantile(0.5, "ray_vz_episode_seconds")),
            ("p95", quantile(0.95, "ray_vz_episode_seconds")),
        ),
    ),
    Panel(
        "Sampling a turn",
        "s",
        "In the engine, waiting there included.",
        (
            ("median", quantile(0.5, "ray_vz_generate_seconds")),
            ("p95", quantile(0.95, "ray_vz_generate_seconds")),
        ),
    ),
    Panel(
        "Caches of the engines",
        "percentunit",
        "Prompt tokens and frames known before, and the fullest key/value cache.",
        (
            ("{{run}} prefix", one("ray_vz_prefix_cache_hit_ratio")),
            ("{{run}} frames", one("ray_vz_frame_cache_hit_ratio")),
            ("{{run}} key/value used", one("ray_vz_kv_used_ratio")),
        ),
    ),
    Panel(
        "Zooms",
        "short",
        "Zooms a second that episodes asked for, by outcome.",
        (("{{run}} {{outcome}}", rate("ray_vz_tool_calls_total", "run, outcome")),),
    ),
    Panel(
        "Waiting for clips",
        "s",
        "What episodes wait: 95th percentile, by what they wait for.",
        (("{{kind}}", quantile(0.95, "ray_vz_clip_wait_seconds", "kind")),),
    ),
    Panel(
        "Decoding",
        "s",
        "What decoders take for a request: 95th percentile, by kind.",
        (("{{kind}}", quantile(0.95, "ray_vz_clip_seconds", "kind")),),
    ),
    Panel(
        "Requests for frames",
        "short",
        "With a decoder, and waiting at the gate on bytes in flight.",
        (("{{run}} {{state}}", one("ray_vz_clip_requests", "run, state")),),
    ),
    Panel(
        "Where frames are found",
        "short",
        "Frames a second: from memory, from disk, or decoded.",
        (("{{run}} {{source}}", rate("ray_vz_clip_frames_total", "run, source")),),
    ),
    Panel(
        "Decoders",
        "short",
        "Those that answer, those that do not, and attempts that failed, a second.",
        (
            ("{{run}} {{state}}", one("ray_vz_decoders", "run, state")),
            ("{{run}} {{kind}}", rate("ray_vz_clip_failures_total", "run, kind")),
        ),
    ),
    Panel(
        "Memory",
        "bytes",
        "Resident: the driver, the largest worker, the largest engine.",
        (
            ("{{run}} driver", one("ray_vz_driver_memory_bytes")),
            ("{{run}} worker", one("ray_vz_worker_memory_bytes")),
            ("{{run}} engine", one("ray_vz_engine_memory_bytes")),
        ),
    ),
    Panel(
        "Sampled tokens",
        "short",
        "In the turns of accepted episodes, a second.",
        (("{{run}}", rate("ray_vz_sampled_tokens_total")),),
    ),
    Panel(
        "Given up by observers",
        "short",
        "Traces and tracker rows that were dropped, a second, by whom.",
        (("{{sink}}", rate("ray_vz_dropped_records_total", "sink")),),
    ),
)
