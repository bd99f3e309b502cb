"""The verbs of the balanced_sparsity app. Tensor code is imported when a verb runs, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.llumnix.engine.config import EMBEDDED_MODEL
from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.program.cli import program
from apps.program.config import load_config
from apps.program.errors import UserError
from apps.program.run_folder import RunFolder, new_run_folder
from kernels.balanced.spec import BalancedFormatError

if TYPE_CHECKING:
    from apps.balanced_sparsity.store import Trained
    from apps.balanced_sparsity.training.loop import Job

SYSTEM = "balanced_sparsity"
Start = Annotated[
    str | None, typer.Option(help="A trained model: a run folder of `train` or `prune`, or its model.pt.")
]
Resume = Annotated[
    Path | None, typer.Option(help="An interrupted run's folder: goes on with that run and its own configuration.")
]

app = program(
    SYSTEM, "Prune networks to k non-zeros in every block, as accurate as unstructured pruning.", [BalancedFormatError]
)


@app.verb
def train(config: BalancedSparsityConfig, resume: Resume = None) -> None:
    """Train the configured network, dense."""
    from apps.balanced_sparsity.training.loop import Job

    folder, config = _folder(config, resume)
    _fit(Job(config), folder, "Training")


@app.verb
def prune(config: BalancedSparsityConfig, start: Start = None, resume: Resume = None) -> None:
    """Prune a trained network gradually and retrain it (the published speaker encoder needs no --start)."""
    from apps.balanced_sparsity.training.loop import Job, pattern_of

    start = _resolved(start)
    if resume is None:
        pattern_of(config)
        config = _to_prune(config, start)
    folder, config = _folder(config, resume)
    start = _kept(folder, start, resume is not None)
    _fit(Job(config, prune=True, start=start), folder, "Pruning")


@app.verb
def evaluate(
    config: BalancedSparsityConfig,
    start: Start = None,
    packed: Annotated[Path | None, typer.Option(help="The same network's packed weights, from `export`.")] = None,
) -> None:
    """Score a model on what was held out, and count the non-zeros of its matrices."""
    import torch

    from apps.balanced_sparsity.maps import layer_counts
    from apps.balanced_sparsity.report import block_of, layer_rows
    from apps.balanced_sparsity.training import loop
    from apps.balanced_sparsity.training.tasks import make_task
    from apps.program.report import print_table
    from apps.training.worker import LocalWorker

    trained, config = _trained(config, start)
    worker = LocalWorker(device="cuda" if config.training.gpu and torch.cuda.is_available() else "cpu")
    model = worker.prepare(trained.model())
    counts = layer_counts(model, block_of(trained.pattern), trained.config.pruning.skip if trained.pattern else ())
    if packed is not None:
        from apps.balanced_sparsity.exported import load_exported

        model = load_exported(model, packed)
    figures = loop.evaluate(model, make_task(config, worker), worker)
    folder = new_run_folder(SYSTEM, config=config)
    folder.write_result({"start": start, "packed": packed, "figures": figures, "layers": counts})
    print_table(["figure", "value"], [[key, value] for key, value in figures.items()], title=str(packed or start))
    print_table(*layer_rows(counts), title="Weights that can be pruned")


@app.verb
def export(
    config: BalancedSparsityConfig,
    start: Start = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default in a new run folder.")] = None,
    value_type: Annotated[str, typer.Option(help="fp32, bf16, fp16 or int8.")] = "fp32",
) -> None:
    """Write a network that was pruned with a balanced pattern as packed weights (safetensors), and check what they compute."""
    from apps.balanced_sparsity.exported import export_packed
    from apps.program.report import print_table

    trained, config = _trained(config, start)
    folder = new_run_folder(SYSTEM, config=config)
    path = out or folder / "packed.safetensors"
    told = export_packed(trained, path, value_type, config)
    folder.write_result({"start": start, "file": path, **vars(told)})
    print_table(["", "value"], [[key, str(value)] for key, value in vars(told).items()], title=str(path))


@app.verb
def sweep(config: BalancedSparsityConfig, start: Start = None, resume: Resume = None) -> None:
    """Prune one trained network with every pattern, sparsity and block size of the grid (Ray Tune), and report."""
    from apps.balanced_sparsity.sweep import grid

    start = _resolved(start)
    if resume is None:
        grid(config.sweep)
        config = _to_prune(config, start)
    folder, config = _folder(config, resume)
    _sweep(config, folder, _kept(folder, start, resume is not None), resume is not None)


@app.verb
def sparsify(
    config: BalancedSparsityConfig,
    out: Annotated[Path, typer.Option(help="A new folder for the sparse model; the serving engine loads it.")],
    model: Annotated[
        str, typer.Option(help="A Llama: smollm2-135m-instruct, a GGUF file, a Hugging Face folder, owner/name.")
    ] = EMBEDDED_MODEL,
) -> None:
    """Prune a language model in one shot, recover it, write it packed, and compare bytes and perplexity with the dense one."""
    import torch

    from apps.balanced_sparsity.serving.language_model import check_pattern, make_sparse
    from apps.program.report import print_table

    pattern = check_pattern(config)
    torch.set_num_threads(config.sparsify.threads)
    out = out.expanduser()
    print(f"Sparsifying {model}: {pattern}, {100 * config.pruning.sparsity:g} % zeros ...", flush=True)
    told = make_sparse(config, model, out, lambda line: print(line, flush=True))
    folder = new_run_folder(SYSTEM, config=config)
    folder.write_result(told)
    print_table(["", "dense", f"sparse, {told.value_type}"], told.rows(), title=f"{model}: {told.pattern}, {out}")
    print(f"Serve it: python -m apps.llumnix serve engine.model={out}\nThe figures: {folder / 'result.json'}")


@app.verb
def serve(
    config: BalancedSparsityConfig,
    start: Start = None,
    packed: Annotated[Path | None, typer.Option(help="The same network's packed weights, from `export`.")] = None,
) -> None:
    """Serve a trained LSTM frame by frame over HTTP, many streams at batch 1 (Ray Serve); ends with Ctrl-C or SIGTERM."""
    import signal
    import threading

    from apps.balanced_sparsity.serving.service import running_service

    start = _resolved(start)
    if start is None:
        raise UserError("Name a trained LSTM with --start (a run folder of `train` or `prune`, or its model.pt).")
    ended = threading.Event()
    print(f"Starting {config.serving.shards} processes for streams ...", flush=True)
    with running_service(config, start, None if packed is None else str(packed.expanduser().resolve())) as url:
        # Only now: starting Ray installs a handler of its own, which would end this process in the middle.
        previous = signal.signal(signal.SIGTERM, lambda *_: ended.set())
        try:
            print(f"Serving {start} at {url}/streams (Ctrl-C ends).", flush=True)
            while not ended.wait(0.5):
                pass
        except KeyboardInterrupt:
            pass
        print("Ending ...", flush=True)
    signal.signal(signal.SIGTERM, previous)


@app.verb
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder of `sweep`; more of the same network follow.")],
    more: Annotated[list[Path] | None, typer.Argument()] = None,
) -> None:
    """Make the report of one sweep, or of several as one: score against sparsity, block sizes, weight maps."""
    from apps.balanced_sparsity.report import read_sweep, sweep_report, trial_rows
    from apps.program.report import print_table

    trials, maps, score, dense, about = read_sweep(folder)
    for other in more or []:
        more_trials, more_maps, other_score, _, _ = read_sweep(other)
        if other_score != score:
            raise UserError(f"{other} tells of {other_score}, {folder} of {score}: they make no common report.")
        trials, maps = [*trials, *more_trials], {**more_maps, **maps}
    target = new_run_folder(SYSTEM)
    target.write_result({"kind": "sweep", "about": about, "score": score, "dense": dense, "trials": trials})
    print_table(*trial_rows(trials, score), title=about)
    print(f"The report: {sweep_report(trials, maps, score, dense, about).write(target)}")


@app.verb
def demo(config: BalancedSparsityConfig) -> None:
    """Train a network, prune it with each pattern, pack the balanced one, and report: the whole way in minutes."""
    from apps.balanced_sparsity.exported import export_packed
    from apps.balanced_sparsity.training.loop import Job
    from apps.program.report import print_table

    folder = new_run_folder(SYSTEM, config=config)
    dense = _subfolder(folder, "dense")
    _fit(Job(config), dense, "Training")
    results = _sweep(config, folder, str(dense.path.resolve()), resume=False)
    balanced = [trained for trial, trained in results if trial.family == "balanced"]
    if balanced:
        told = export_packed(balanced[-1], folder / "packed.safetensors", "fp32", config)
        title = f"{balanced[-1].pattern}, {100 * balanced[-1].sparsity:.0f} %, packed: {folder / 'packed.safetensors'}"
        print_table(["", "value"], [[key, str(value)] for key, value in vars(told).items()], title=title)


START_FILE = "start.txt"
"""In a run folder: the trained model that the run began from."""


def _fit(job: Job, folder: RunFolder, doing: str) -> None:
    from apps.balanced_sparsity.data.load import check_named
    from apps.balanced_sparsity.report import write_training_report
    from apps.balanced_sparsity.training.fit import fit

    config = job.config
    check_named(config.data)
    where = "in this process" if config.training.workers == 0 else f"on {config.training.workers} workers of Ray Train"
    print(f"{doing}: {config.model.name} on {config.data.name}, {where} ...", flush=True)
    with _ray_for(config, config.training.workers > 0):
        trained = fit(job, folder.path, _told)
    path = write_training_report(folder, trained, f"Balanced sparsity: {doing.lower()}")
    print(f"The model: {folder / 'model.pt'}\nThe report: {path}")


def _sweep(config: BalancedSparsityConfig, folder: RunFolder, start: str | None, resume: bool) -> list[Any]:
    from apps.balanced_sparsity.report import write_sweep
    from apps.balanced_sparsity.store import load_trained
    from apps.balanced_sparsity.sweep import grid, run_sweep

    dense = None if start is None else load_trained(start)
    print(f"Sweep: {len(grid(config.sweep))} networks to prune ...", flush=True)
    with _ray_for(config, True):
        results = run_sweep(config, start, folder.path, resume)
    print(f"The report: {write_sweep(folder, results, dense, results[0][1].score)}")
    return results


@contextlib.contextmanager
def _ray_for(config: BalancedSparsityConfig, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from actors.cluster.session import ray_session

    with ray_session(config.ray):
        yield


def _told(entry: dict[str, Any]) -> None:
    words = [f"step {entry['step']:6d}"]
    words += [f"{key} {value:.4g}" for key, value in entry.items() if key not in ("step", "examples")]
    print("  ".join(words), flush=True)


def _folder(config: BalancedSparsityConfig, resume: Path | None) -> tuple[RunFolder, BalancedSparsityConfig]:
    """A new run folder, or that of the run to go on with and its own configuration."""
    if resume is None:
        return new_run_folder(SYSTEM, config=config), config
    resume = resume.expanduser()
    if not (resume / "config.yaml").is_file():
        raise UserError(f"{resume} holds no config.yaml: it is no run folder that can be resumed.")
    return RunFolder(resume), load_config(BalancedSparsityConfig, resume / "config.yaml")


def _resolved(start: str | None) -> str | None:
    """The folder itself, not `latest`, which points at another one as soon as this run has a folder."""
    return None if start is None else str(Path(start).expanduser().resolve())


def _kept(folder: RunFolder, start: str | None, resumed: bool) -> str | None:
    """``start``, remembered in the run folder; of a resumed run, what is remembered there."""
    path = folder / START_FILE
    if resumed:
        return path.read_text().strip() if path.is_file() else None
    if start is not None:
        folder.write_text(START_FILE, start + "\n")
    return start


def _trained(config: BalancedSparsityConfig, start: str | None) -> tuple[Trained, BalancedSparsityConfig]:
    from apps.balanced_sparsity.store import load_trained

    start = _resolved(start)
    if start is None:
        raise UserError("Name a trained model with --start (a run folder of `train` or `prune`, or its model.pt).")
    return load_trained(start), _configured_as(config, start)


def _to_prune(config: BalancedSparsityConfig, start: str | None) -> BalancedSparsityConfig:
    """``config`` for ``start``; found wanting here, before Ray is started for nothing."""
    if start is not None:
        return _configured_as(config, start)
    if config.model.name != "speaker_encoder":
        raise UserError("There is nothing to prune: name a trained model with --start (a run folder of `train`).")
    return config


def _configured_as(config: BalancedSparsityConfig, start: str) -> BalancedSparsityConfig:
    """``config`` with the model of ``start``, and with its data unless ``config`` names the same set (elsewhere, perhaps)."""
    from apps.balanced_sparsity.store import load_trained

    its = load_trained(start).config
    data = config.data if config.data.name == its.data.name else its.data
    return config.model_copy(update={"model": its.model, "data": data})


def _subfolder(folder: RunFolder, name: str) -> RunFolder:
    path = folder / name
    path.mkdir()
    return RunFolder(path)
