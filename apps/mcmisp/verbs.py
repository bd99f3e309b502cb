"""The verbs but ``compare``: each prepares what it needs, shows progress, ends with a table and leaves a run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from actors.cluster.session import ray_session
from actors.cooccurrence import PairTable
from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.data.shards import PackedRows
from apps.mcmisp.evaluation.blimp import accuracy, blimp_scores, read_blimp
from apps.mcmisp.evaluation.finetune import finetune as finetune_on
from apps.mcmisp.evaluation.masked import masked_loss
from apps.mcmisp.evaluation.mechanism import mechanism
from apps.mcmisp.evaluation.tasks import read_rte, read_sst2
from apps.mcmisp.pictures import course_picture
from apps.mcmisp.store import Trained, load_trained
from apps.mcmisp.tables import table_of, table_path
from apps.mcmisp.training.fit import fit_here, fit_on_ray
from apps.mcmisp.training.loop import MODEL_FILE
from apps.program.errors import UserError
from apps.program.report import Report, print_table
from apps.program.run_folder import RunFolder, new_run_folder
from apps.training.worker import LocalWorker

console = Console(stderr=True)


def say(text: str) -> None:
    """Progress, on stderr."""
    console.print(text, highlight=False)


def pretrain(
    config: McmispConfig,
    resume: Annotated[
        str | None, typer.Option(help="The folder of a run that was interrupted; it goes on there.")
    ] = None,
) -> None:
    """Trains one encoder (the arm that ``arm`` names) and evaluates it."""
    config = config.for_arm(config.arm)
    folder = _folder(config, resume)
    if config.training.workers:
        with ray_session(config.ray):
            rows = prepare(config.data, on_ray=True, told=say)
            fit_on_ray(config, rows, folder.path, _told(config))
    else:
        rows = prepare(config.data, told=say)
        trained = fit_here(config, rows, folder.path / "checkpoints", _told(config))
        newest = sorted((folder.path / "checkpoints").glob("checkpoint-*"))[-1]
        folder.write_bytes(MODEL_FILE, (newest / MODEL_FILE).read_bytes())
        folder.write_text("history.json", json.dumps(trained.history))
    one = load_trained(folder.path)
    found = evaluation(one, config, rows)
    history = folder / "history.json"
    course = json.loads(history.read_text()) if history.exists() else []
    report_of = Report("McMisP pre-training", f"Arm {config.arm}, {config.training.steps} steps.")
    if course:
        report_of.add_figure("Loss", course_picture({config.arm: course}))
    report_of.add_table("Evaluation", ["figure", "value"], [[k, v] for k, v in found.items()])
    report_of.write(folder)
    folder.write_result({"arm": config.arm, "figures": found, "history": course})
    print_table(["figure", "value"], [[k, v] for k, v in found.items()], title=f"{config.arm}: {folder}")


def evaluate(
    config: McmispConfig,
    model: Annotated[str, typer.Option(help="A model.pt, or the folder of a run that holds one.")],
) -> None:
    """Masked loss and mechanism on the validation rows, and BLiMP where ``evaluation.blimp`` names it."""
    one = load_trained(model)
    rows = prepare(one.config.data.model_copy(update={"cache": config.data.cache}), told=say)
    found = evaluation(one, config, rows)
    folder = new_run_folder("mcmisp", config=config)
    folder.write_result({"model": model, "arm": one.config.arm, "figures": found})
    print_table(["figure", "value"], [[k, v] for k, v in found.items()], title=model)


def finetune(
    config: McmispConfig,
    model: Annotated[str, typer.Option(help="A model.pt, or the folder of a run that holds one.")],
) -> None:
    """Fine-tunes on SST-2 and RTE, where ``evaluation.sst2`` and ``evaluation.rte`` name them."""
    one = load_trained(model)
    readers = {"sst2": (config.evaluation.sst2, read_sst2), "rte": (config.evaluation.rte, read_rte)}
    results = []
    for name, (path, read) in readers.items():
        if path is None:
            say(f"{name}: left out; set evaluation.{name} to where it lies")
            continue
        task = read(path)
        say(f"{name}: {len(task.train):,} training and {len(task.test):,} test examples")
        results.append(
            finetune_on(one.model, one.tokenizer, task, config.evaluation, config.training.seed, _every(name, 50))
        )
    if not results:
        raise UserError("There is nothing to fine-tune on: set evaluation.sst2 or evaluation.rte.")
    folder = new_run_folder("mcmisp", config=config)
    folder.write_result({"model": model, "tasks": results})
    print_table(
        ["task", "accuracy", "always the same"], [[r.task, r.accuracy, r.majority] for r in results], title=model
    )


def report(run: Annotated[str, typer.Argument(help="The folder of a run.")] = "runs/mcmisp/latest") -> None:
    """Shows a run's result again, and writes its report anew."""
    folder = RunFolder(Path(run))
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run that has ended: there is no result.json in it that can be read.") from error
    figures = result.get("figures") or {}
    print_table(["figure", "value"], [[k, v] for k, v in figures.items()], title=str(run))
    made = Report("McMisP", f"Run {run}.")
    if result.get("history"):
        made.add_figure("Loss", course_picture({result["arm"]: result["history"]}))
    made.add_table("Figures", ["figure", "value"], [[k, v] for k, v in figures.items()])
    print(made.write(folder))


def cooccurrence(
    config: McmispConfig,
    build: Annotated[bool, typer.Option(help="Count again, even if there is a table.")] = False,
    show: Annotated[str | None, typer.Option(metavar="WORD", help="Words that go most and least with WORD.")] = None,
    workers: Annotated[int, typer.Option(help="Ray Data tasks at a time; 0 counts in this process.")] = 0,
) -> None:
    """Builds the table of the configured corpus, and shows what goes with a word."""
    rows = prepare(config.data, told=say)
    if build:
        table_path(rows, config.cooccurrence).unlink(missing_ok=True)
    if workers:
        with ray_session(config.ray):
            table = table_of(rows, config.cooccurrence, workers=workers, told=_counted)
    else:
        table = table_of(rows, config.cooccurrence, told=_counted)
    facts = {
        "words": table.vocab_size, "tokens counted": table.units, "pairs": table.pairs, "bytes": table.nbytes,
        "layout": "dense" if table.dense is not None else "csr", "version": table.version,
        "file": str(table_path(rows, config.cooccurrence)),
    }  # fmt: skip
    print_table(["table", ""], [[k, v] for k, v in facts.items()])
    if show is not None:
        _show(table, rows, show)


def evaluation(one: Trained, config: McmispConfig, rows: PackedRows) -> dict[str, float]:
    """Every figure that the configuration asks for."""
    count = config.training.evaluation_rows
    validation = PackedRows(rows.folder, "validation")
    if rows.manifest.tokenizer != one.tokenizer.version:
        raise UserError("The model was trained with another tokenizer than the corpus was prepared with.")
    found: dict[str, float] = masked_loss(one.model, validation, count, LocalWorker())
    table = table_of(rows, one.config.cooccurrence)
    seen = mechanism(one.model, validation, table, one.config.guidance, count)
    found |= {key: value for key, value in dataclasses.asdict(seen).items() if key != "loss"}
    if config.evaluation.blimp is not None:
        pairs = read_blimp(config.evaluation.blimp, config.evaluation.blimp_pairs)
        say(f"BLiMP: {len(pairs):,} pairs")
        found["blimp"] = accuracy(blimp_scores(one.model, one.tokenizer, pairs, torch.device("cpu")))
    return found


def _folder(config: McmispConfig, resume: str | None) -> RunFolder:
    if resume is None:
        return new_run_folder("mcmisp", config=config)
    if not Path(resume).is_dir():
        raise UserError(f"There is no run {resume} to go on with.")
    return RunFolder(Path(resume))


def _told(config: McmispConfig) -> Any:
    def told(entry: dict[str, Any]) -> None:
        words = [
            f"step {entry['step']:,}/{config.training.steps:,}",
            f"loss {entry['loss']:.3f}",
            f"errors {entry['error_rate']:.0%}",
        ]
        if "validation_loss" in entry:
            words.append(f"validation {entry['validation_loss']:.3f}")
        if entry.get("divergence"):
            words.append(f"divergence {entry['divergence']:.3f}")
        say("  ".join(words))

    return told


def _every(name: str, count: int) -> Any:
    def told(done: int, total: int) -> None:
        if done % count == 0 or done == total:
            say(f"{name}: step {done:,}/{total:,}")

    return told


def _counted(done: int, total: int) -> None:
    if done == total or done % 10 == 0:
        say(f"counted {done} of {total} parts")


def _show(table: PairTable, rows: PackedRows, word: str) -> None:
    tokenizer = rows.tokenizer()
    number = next((n for n in (tokenizer.number("Ġ" + word), tokenizer.number(word)) if n is not None), None)
    if number is None:
        raise UserError(f"{word!r} is no token of this vocabulary; a longer word may be split: try a part of it.")
    scores = torch.from_numpy(table.row(number))
    # Words that were counted often enough for their scores to mean something.
    usual = torch.from_numpy(table.marginals >= max(20, table.pairs / table.vocab_size / 20))
    best = scores.masked_fill(~usual, -1e9).topk(15).indices.tolist()
    least = scores.masked_fill(~usual, 1e9).topk(15, largest=False).indices.tolist()
    words = tokenizer.words
    lines = [
        [words[a].strip(), float(scores[a]), words[b].strip(), float(scores[b])]
        for a, b in zip(best, least, strict=True)
    ]
    print_table(["most", "score", "least", "score"], lines, title=f"{word} ({table.settings.normalisation})")


__all__ = ["cooccurrence", "evaluate", "evaluation", "finetune", "pretrain", "report"]
