"""`vz-ray serve`: serve an agent."""

from __future__ import annotations

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Serving")
def serve(arguments: ConfigArguments = None, dry_run: DryRun = False) -> None:
    """Serve an agent that answers questions about videos: a web page and an OpenAI-compatible API.

    Example: vz-ray serve conf/serve/tiny.yaml model=runs/quickstart/models/rl

    Example: vz-ray serve conf/serve/7b.yaml model=checkpoints/agent host=0.0.0.0 access.keys_file=keys.json
    """
    from vz_ray.config.serve import ServeConfig
    from vz_ray.serve.launch import run_serve

    run_serve(resolve_config(ServeConfig, arguments, None, dry_run))
