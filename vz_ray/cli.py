"""`vz-ray <command>`: reads arguments, calls one function, prints one-line errors.

Commands import what they need when they run, so that `vz-ray --help` is quick.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from vz_ray import __version__
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import StopRequested

C = TypeVar("C")

app = typer.Typer(
    help="Trains, evaluates and serves a zooming long-video agent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script: 2 for an error that the user can mend, 130 after a requested stop."""
    # Where a reward function of the user's own is looked for last; Ray's workers look there too.
    sys.path.append(os.getcwd())
    try:
        app(prog_name="vz-ray")
    except UserError as error:
        if os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except StopRequested as error:
        print(f"vz-ray: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Checks this machine and environment, and says what to do about each problem."""
    from vz_ray.doctor import examine
    from vz_ray.observe.checks import problems, table

    checks = examine(runs)
    if as_json:
        import json

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Console

        Console().print(table(checks))
    raise typer.Exit(1 if problems(checks) else 0)


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config file and overrides.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]


def settings(schema: type[C], arguments: list[str] | None, default: str | None, dry_run: bool) -> C:
    """The config that a command's arguments ask for; printed, and the command ended, on a dry run."""
    from vz_ray.config import load, to_yaml

    given = arguments or []
    files = [argument for argument in given if argument.endswith((".yaml", ".yml")) and "=" not in argument]
    if len(files) > 1:
        raise UserError(f"two config files were given, {files[0]} and {files[1]}: one may extend the other")
    overrides = [argument for argument in given if argument not in files]
    config = load(schema, files[0] if files else default, overrides)
    if dry_run:
        print(to_yaml(config), end="")
        raise typer.Exit
    return config


@app.command()
def synth(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """Makes the needle world: videos, task files, and a manifest with the truth.

    Example: vz-ray synth directory=data/needle train=96 test=52 seed=0
    """
    from vz_ray.config.data import SynthConfig
    from vz_ray.data.needle.synth import synthesize
    from vz_ray.observe.progress import Progress

    config = settings(SynthConfig, arguments, None, dry_run)
    with Progress() as progress, progress.stage("synth", sum(config.videos.values())) as stage:
        files = synthesize(config, stage.advance)
    for split, path in files.items():
        print(f"{split}: {path}")


@app.command()
def clip(
    video: Annotated[str, typer.Argument(help="A video file or URL.")],
    segment: Annotated[
        tuple[float, float] | None, typer.Option(help="Start and end of a zoom, seconds.", show_default=False)
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second; 2 for a zoom, 0.5 for an overview.")] = 0.0,
    overview: Annotated[bool, typer.Option("--overview", help="Look at the whole video.")] = False,
    max_frames: Annotated[int, typer.Option(help="Most frames of an overview.")] = 64,
    max_pixels: Annotated[int, typer.Option(help="Largest area of a frame.")] = 100_352,
    out: Annotated[Path | None, typer.Option(help="Directory for the images.", show_default=False)] = None,
    cache: Annotated[bool, typer.Option(help="Use the frames on disk, and leave these there.")] = True,
    decoder: Annotated[Literal["pyav", "torchcodec"], typer.Option(help="What decodes.")] = "pyav",
) -> None:
    """Shows what the model would see: the frames of a zoom or an overview, as images, with their times.

    Example: vz-ray clip talk.mp4 --segment 12.5 20 --fps 2 --out frames/

    Example: vz-ray clip talk.mp4 --overview
    """
    from vz_ray.clips.opening import open_reader
    from vz_ray.clips.show import print_clip, show_clip
    from vz_ray.config.clips import ClipsConfig
    from vz_ray.video.frame import FrameSize, Overview, Zoom

    if (segment is None) != overview:
        raise UserError("give either --segment START END or --overview")
    request = Overview(fps or 0.5, max_frames) if segment is None else Zoom(*segment, fps or 2.0)
    size = FrameSize(min_pixels=min(FrameSize().min_pixels, max_pixels), max_pixels=max_pixels)
    config = ClipsConfig(decoder=decoder)
    if not cache:
        config.disk_gb = 0
    print_clip(show_clip(video, request, size, out, open_reader(config)))


@app.command()
def base(
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 0,
    seed: Annotated[int, typer.Option(help="Makes weights and lessons.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Makes the tiny model's base again, from nothing: it can name and answer, and has never seen a zoom.

    Example: vz-ray base --out assets/tiny-base
    """
    from vz_ray.coldstart.base import BaseTraining, make_base

    training = BaseTraining(seed=seed, **({"steps": steps} if steps else {}))
    make_base(out, training, threads=threads)


@app.command()
def train(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """Trains a policy with GRPO on zooming episodes.

    Example: vz-ray train conf/tiny.yaml model=runs/quickstart/models/cold_start name=longer
    """
    from vz_ray.config.run import RunConfig
    from vz_ray.quickstart import run_training

    run_training(settings(RunConfig, arguments, None, dry_run))


@app.command()
def sft(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """Teaches a checkpoint by trajectories: the cold start.

    Example: vz-ray sft conf/videozoomer-7b-sft.yaml model=... data=dataset/sft.json
    """
    from vz_ray.config.sft import SftRunConfig
    from vz_ray.supervised import run_sft

    run_sft(settings(SftRunConfig, arguments, None, dry_run))


@app.command()
def quickstart(
    arguments: Settings = None,
    name: Annotated[str, typer.Option(help="Directory of the run under runs/.")] = "quickstart",
    dry_run: DryRun = False,
) -> None:
    """Everything on a laptop: videos, cold start, reinforcement learning, baselines, report.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray quickstart --name seed1 seed=1
    """
    from vz_ray.config.quickstart import QuickstartConfig
    from vz_ray.quickstart import run_quickstart

    given = [*(arguments or []), f"name={name}"]
    run_quickstart(settings(QuickstartConfig, given, "conf/quickstart.yaml", dry_run))


@app.command()
def baseline(run: Annotated[Path, typer.Argument(help="A finished quickstart run.")]) -> None:
    """Trains the uniform baseline on as many samples as a run's agent saw, and evaluates it.

    Example: vz-ray baseline runs/quickstart
    """
    from vz_ray.quickstart import run_baseline

    run_baseline(run)


@app.command()
def ablate(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """Trains the loop without one of its parts at a time, several seeds; writes the paper's ablation table.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray ablate conf/ablate.yaml

    Example: vz-ray ablate conf/ablate.yaml name=one 'seeds=[0]'
    """
    from vz_ray.ablate import run_ablation
    from vz_ray.config.ablate import AblateConfig

    run_ablation(settings(AblateConfig, arguments, "conf/ablate.yaml", dry_run))


@app.command("eval")
def evaluate(
    arguments: Settings = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Play uniform frames and the agent at several settings.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Plays public benchmarks and shows their official figures beside the paper's.

    Stop it with Ctrl-C and run it again: it goes on where it was.

    Example: vz-ray eval conf/eval/mlvu.yaml model=checkpoints/agent data=datasets/mlvu

    Example: vz-ray eval conf/eval/needle.yaml model=runs/quickstart/models/rl name=curve --curve
    """
    from vz_ray.benchmarking import run_benchmarks
    from vz_ray.config.benchmarks import BenchmarksConfig

    given = list(arguments or [])
    config = settings(BenchmarksConfig, given, None, dry_run and not curve)
    if curve:
        modes = f"modes=[{','.join(config.curve.modes)}]"
        config = settings(BenchmarksConfig, [*given, modes], None, dry_run)
    run_benchmarks(config)


@app.command()
def serve(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """Answers questions about videos: a page for people, an OpenAI-compatible endpoint for programs.

    Example: vz-ray serve conf/serve/tiny.yaml model=runs/quickstart/models/rl

    Example: vz-ray serve conf/serve/7b.yaml model=checkpoints/agent host=0.0.0.0 guard.keys=keys.json
    """
    from vz_ray.config.serve import ServeConfig
    from vz_ray.serving import run_serve

    run_serve(settings(ServeConfig, arguments, None, dry_run))


@app.command()
def roll(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint directory of the new weights.", show_default=False)
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Go back to the weights before.")] = False,
    at: Annotated[Path, typer.Option(help="Logs of the running server.")] = Path("runs/serve"),
) -> None:
    """Gives a running server other weights without dropping a request, or those that it had before.

    Example: vz-ray roll runs/quickstart/models/rl

    Example: vz-ray roll --back
    """
    from vz_ray.serving import run_roll

    if (model is None) != back:
        raise UserError("give either the checkpoint of the new weights or --back")
    run_roll(model, at)


@app.command()
def ask(
    given: Annotated[
        list[str],
        typer.Argument(metavar="[VIDEO]... QUESTION", help="Files or URLs, then the question."),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A config file or KEY=VALUE, for an engine started here."),
    ] = None,
    server: Annotated[str, typer.Option(help="Address of a server that runs.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "",
) -> None:
    """Asks one question in the terminal, and shows every zoom as it happens.

    Example: vz-ray ask talk.mp4 "What is on the second slide?" --server http://127.0.0.1:8000

    Example: vz-ray ask talk.mp4 "Who speaks?" -s conf/serve/tiny.yaml -s model=runs/quickstart/models/rl
    """
    from vz_ray.asking import run_ask
    from vz_ray.config.serve import ServeConfig

    resolved = settings(ServeConfig, config, None, False)
    *videos, question = given
    run_ask(resolved, videos, question, server=server, key_env=key_env)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Writes report.html and summary.json of a run from what its stages left behind.

    Example: vz-ray report runs/quickstart
    """
    import yaml

    from vz_ray.evaluate.summary import write_summary
    from vz_ray.evaluate.tables import print_summary
    from vz_ray.observe.run_dir import RunDir
    from vz_ray.report import write_report

    opened = RunDir.open(run)
    print_summary(write_summary(opened.path))
    clips = (yaml.safe_load(opened.config.read_text()) or {}).get("clips", {})
    print(write_report(opened.path, decoder=clips.get("decoder", "pyav")))


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="A run directory, of a run that is over or goes on.")],
    host: Annotated[
        str, typer.Option(help="Address to bind to; on loopback no key is needed.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="0 takes any free one; without it, 8765 or any free one.",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = False,
) -> None:
    """Shows a run's episodes in the browser, new ones as they are played; Ctrl-C ends it.

    Example: vz-ray view runs/quickstart

    Example: vz-ray view runs/quickstart --port 0 --open
    """
    from vz_ray.report.browser import serve

    serve(run, host=host, port=port, open_page=open_page)


Address = Annotated[str, typer.Option(help="Of the job API, http://HEAD:8265; else RAY_API_SERVER_ADDRESS.")]


@app.command()
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="What is run; `train` if it is left out.",
            show_default=False,
        ),
    ] = None,
    address: Address = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether it would fit on the cluster, and say why not.")
    ] = False,
    attach: Annotated[str, typer.Option(help="Follow a job, by its id or its run's name.")] = "",
    stop: Annotated[str, typer.Option(help="Stop a job; its checkpoint is written first.")] = "",
    jobs: Annotated[bool, typer.Option("--jobs", help="List the cluster's jobs.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show what it prints.")] = True,
    working_dir: Annotated[Path, typer.Option(help="What is sent: the files that git knows.")] = Path("."),
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Files or directories that stay: docs, '*.mp4'.", show_default=False),
    ] = None,
    limit_mib: Annotated[float, typer.Option(help="Most that is sent, MiB.", min=0)] = 100.0,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the job; shown in the dashboard, so no secrets.", show_default=False
        ),
    ] = None,
    grace_s: Annotated[
        int, typer.Option(help="Seconds that it has for its checkpoint when it is stopped.", min=1)
    ] = 600,
    any_ray: Annotated[bool, typer.Option("--any-ray", help="Put up with another version of Ray.")] = False,
) -> None:
    """Runs a command as a job on a Ray cluster, follows it, finds it again, stops it.

    Ctrl-C leaves it running. Submitted again under the same name=, it goes on from its last checkpoint.

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml name=long runs=/runs --address http://127.0.0.1:8265

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml runs=/runs --check

    Example: vz-ray submit --stop long
    """
    from rich.console import Console

    from vz_ray import submitting
    from vz_ray.jobs.client import JobClient, address_of
    from vz_ray.jobs.submission import find

    if sum((bool(arguments), bool(attach), bool(stop), jobs)) != 1:
        raise UserError("give one of: a config to run, --attach NAME, --stop NAME, --jobs")
    variables = dict(pair.split("=", 1) for pair in env or [] if "=" in pair)
    if len(variables) < len(env or []):
        raise UserError(f"--env wants NAME=VALUE, and got {', '.join(env or [])}")
    how = submitting.Sending(
        address, working_dir, tuple(exclude or ()), limit_mib, variables, grace_s, any_ray, follow
    )
    if jobs:
        submitting.run_jobs(how)
    elif stop:
        submitting.run_stop(stop, how)
    elif attach:
        client = JobClient(address_of(address), any_ray=True)
        raise typer.Exit(submitting.run_attach(client, find(client, attach).id, Console(highlight=False)))
    else:
        wanted = submitting.Wanted.read(arguments or [])
        raise typer.Exit(submitting.run_submit(wanted, how, check_only=check))


@app.command()
def preflight(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="What would be run; `train` if it is left out.",
        ),
    ],
) -> None:
    """Looks, on a cluster, whether a run would find room, versions, volumes and keys; in seconds.

    Every run that joins a cluster does this first. From elsewhere: `vz-ray submit --check`.

    Example: vz-ray preflight conf/videozoomer-7b-rl.yaml model=/models/cold-start runs=/runs
    """
    from vz_ray.submitting import Wanted, run_preflight

    raise typer.Exit(run_preflight(Wanted.read(arguments).config))


@app.command()
def drain(
    seconds: Annotated[float, typer.Option(help="Until this node is gone.", min=0)] = 110.0,
    reason: Annotated[str, typer.Option(help="Shown by Ray.")] = "the machine is being reclaimed",
    address: Annotated[str, typer.Option(help="Of the cluster, HEAD:6379; else that of this machine.")] = "",
    node: Annotated[str, typer.Option(help="Ray's id of the node; else the one on this machine.")] = "",
) -> None:
    """Tells Ray that this node will be gone soon, so that it gets no new work: for a pod's preStop hook.

    Example: vz-ray drain --seconds 110
    """
    from vz_ray.jobs.drain import drain as drain_node

    drain_node(seconds, reason, address, node)


distill = typer.Typer(
    help="Makes trajectories to learn from, with an expert behind an OpenAI-compatible endpoint."
)
app.add_typer(distill, name="distill", no_args_is_help=True)


@distill.command()
def exemplar(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """An expert plays tasks; its right episodes become a data set.

    Stop it at any time and run it again: what is played or paid for is not played or paid for again.

    Example: vz-ray distill exemplar conf/distill/exemplar.yaml tasks=data/train.json expert.limit_usd=50
    """
    from vz_ray.config.distill import ExemplarConfig
    from vz_ray.distill import run_exemplar

    run_exemplar(settings(ExemplarConfig, arguments, None, dry_run))


@distill.command()
def reflect(arguments: Settings = None, dry_run: DryRun = False) -> None:
    """An expert corrects the policy's own wrong episodes that zoomed; those made right become a data set.

    Example: vz-ray distill reflect conf/distill/reflect.yaml episodes=[runs/rl/episodes]
    """
    from vz_ray.config.distill import ReflectConfig
    from vz_ray.distill import run_reflect

    run_reflect(settings(ReflectConfig, arguments, None, dry_run))


keys = typer.Typer(help="Keys that open a served agent; the server keeps their hashes alone.")
app.add_typer(keys, name="keys", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Option(help="Where hashes of keys are kept, for guard.keys.")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    file: KeysFile = Path("keys.json"),
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; none never does.", min=0, show_default=False)
    ] = None,
) -> None:
    """Makes a key and prints it, this once.

    Example: vz-ray keys create alice --days 90
    """
    from vz_ray.serve.keys import add_key, new_key

    try:
        secret, key = new_key(name, days)
    except ValueError as error:
        raise UserError(str(error)) from error
    add_key(file, key)
    print(secret)
    print(f"its hash is in {file}; the key itself is shown only now", file=sys.stderr)


@keys.command("list")
def list_keys(
    file: KeysFile = Path("keys.json"),
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Print them as the environment variable takes them.")
    ] = False,
) -> None:
    """Prints names of keys and when they were made and expire; never a key.

    Example: vz-ray keys list --hashes
    """
    from vz_ray.serve.keys import as_line, as_variable, read_keys

    for key in read_keys(file):
        print(as_variable(key) if hashes else as_line(key))


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="As `vz-ray keys list` prints it.")],
    file: KeysFile = Path("keys.json"),
) -> None:
    """Takes a key away; running servers notice with the next request, and its browser sessions end.

    Example: vz-ray keys revoke alice
    """
    from vz_ray.serve.keys import revoke_key

    revoke_key(file, name)
    print(f"{name} is revoked")


@app.command("check-reward")
def check_reward(
    function: Annotated[str, typer.Argument(help="package.module:name")],
    episodes: Annotated[
        Path | None,
        typer.Option(help="Episodes of a run to try it on too (.jsonl).", show_default=False),
    ] = None,
) -> None:
    """Tries a reward function of your own on episodes of every kind.

    Example: vz-ray check-reward my_rewards:brevity --episodes runs/quickstart/episodes/000003.jsonl
    """
    from vz_ray.evaluate.results import read_results
    from vz_ray.reward.contract import print_trials, try_function

    try:
        records = [] if episodes is None else read_results(episodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{episodes} is no log of episodes: {error!r}") from error
    trials = try_function(function, [(record.trajectory, record.task) for record in records])
    raise typer.Exit(0 if print_trials(function, trials) else 1)


@app.command("calibrate-gate")
def calibrate_gate(
    log: Annotated[Path, typer.Argument(help="Evaluation log, played with episode.gate.mode=measure.")],
    out: Annotated[Path, typer.Option(help="Thresholds, for episode.gate.file.")] = Path("gate.json"),
    price: Annotated[
        float | None,
        typer.Option(
            help="Accuracy that a further frame must bring; none takes the most accuracy per frame.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Finds how uncertain an answer must be for zooming to be worth it.

    Example: vz-ray calibrate-gate runs/eval/eval/needle.jsonl --out gate.json
    """
    from vz_ray.evaluate.gate import calibrate_file

    for kind, found in calibrate_file(log, out, price=price).items():
        print(f"{kind}: zoom above {found.best.threshold:.4f}, {found.questions} questions")
        for name, one in (("gated", found.best), ("always", found.always), ("never", found.never)):
            figures = f"accuracy {one.accuracy:.4f}, frames {one.frames:.1f}, zooming {one.zooming:.1%}"
            print(f"  {name}: {figures}")
    print(out)


@app.command()
def top(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Shows what a training run is doing: progress, curves, workers, decoders, warnings.

    Reads the run directory alone, so it works from any machine that sees it.

    Example: vz-ray top runs/agent
    """
    from vz_ray.watch.looking import look

    view = look(run)
    if as_json:
        import json

        print(json.dumps(view.to_dict()))
        return
    from rich.console import Console

    from vz_ray.watch.screen import top as show

    console = Console(highlight=False)
    try:
        show(view, console.is_terminal and not once, console)
    except KeyboardInterrupt:
        return


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Prints the figures of several runs side by side, with their medians.

    Example: vz-ray compare runs/seed0 runs/seed1 runs/seed2
    """
    from rich.console import Console

    from vz_ray.evaluate.summary import write_summary
    from vz_ray.evaluate.tables import LOG_WIDTH, runs_table
    from vz_ray.observe.run_dir import RunDir

    summaries = {path.name: write_summary(RunDir.open(path).path) for path in runs}
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    console.print(runs_table(summaries))


if __name__ == "__main__":
    main()
