"""The command line: each command calls one function of `experiments` and shows what it returns.

A command imports what it runs itself: help has to come at once, without torch.
"""

from __future__ import annotations

import time
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from constrained_growth.experiments.command_line import (
    Folder,
    Json,
    Out,
    Quick,
    Seed,
    Tasks,
    carry_out,
    stem,
    terminal,
    typed,
    write_numbers,
    write_tables,
)

if TYPE_CHECKING:
    from constrained_growth.experiments.reproduction.protocols import Experiment

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
bench = typer.Typer(help="What things cost and gain, measured.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(installed("constrained-growth"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Would another layer help this network, where, and what would it buy?"""


@app.command()
def demo(
    change: Annotated[
        Literal["inverted", "rotated", "mirrored"],
        typer.Option(help="What the digits become.", case_sensitive=False),
    ] = "inverted",
    seed: Seed = 0,
    runs: Annotated[int, typer.Option(min=1, help="How many networks.")] = 10,
    out: Folder = Path(),
    json: Json = None,
) -> None:
    """Show a trained network other images; ask where a layer would help, insert it, and see."""
    from constrained_growth.experiments import demo_report
    from constrained_growth.experiments.demo import run_demo

    begin, console = time.perf_counter(), terminal(width=0)
    found = run_demo(change, seed, runs)
    console.print(demo_report.report(found))
    picture = out / f"constrained-growth-demo-{change}-{seed}.png"
    demo_report.picture(found).savefig(picture)
    if json is not None:
        write_numbers(json, found)
    took = time.perf_counter() - begin
    console.print(f"{took:.0f} s. The picture is {picture}", soft_wrap=True)


@bench.command("multipliers")
def bench_multipliers(
    family: Annotated[
        Literal["networks", "models"],
        typer.Option(
            help="Perceptrons, a ConvNet, a GPT and a ViT by size; stock models of real size."
        ),
    ] = "networks",
    quick: Quick = False,
    task: Tasks = None,
    seed: Seed = 0,
    out: Out = None,
    json: Json = None,
) -> None:
    """Time decisions against ordinary gradient passes, on one thread; --task is for models."""
    from constrained_growth.experiments.speed import models, multipliers

    if task and family != "models":
        raise typer.BadParameter("--task names a model: add --family models.")
    study = {"networks": multipliers, "models": models}[family]
    name = "multipliers" if family == "networks" else f"multipliers-{family}"
    carry_out(name, study, quick=quick, seed=seed, out=out, json=json, tasks=task)


@bench.command("device")
def bench_device(
    device: Annotated[str, typer.Option(help="Where: cuda, cuda:1, or cpu with --quick.")] = "cuda",
    quick: Quick = False,
    seed: Seed = 0,
    out: Out = None,
    json: Json = None,
) -> None:
    """Check and time decisions on a GPU: float32, bfloat16, AMP, torch.compile, the gpu tests."""
    import torch

    from constrained_growth.experiments.speed import device as study

    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu") or (kind == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(
            f"--device {device}: PyTorch {torch.__version__} sees no such device here. With a card "
            "this takes less than six minutes; --device cpu --quick tries small models."
        )
    if kind == "cpu" and not quick:
        raise typer.BadParameter("--device cpu takes hours with models of real size; add --quick.")
    carry_out("device", study, quick=quick, seed=seed, out=out, json=json, device=device)


@bench.command("monitoring")
def bench_monitoring(
    quick: Quick = False, seed: Seed = 0, out: Out = None, json: Json = None
) -> None:
    """Time training steps that are watched against steps that are not, on one thread."""
    from constrained_growth.experiments.speed import monitoring

    carry_out("monitoring", monitoring, quick=quick, seed=seed, out=out, json=json)


@bench.command("decisions")
def bench_decisions(
    family: Annotated[
        Literal["tasks", "shifts", "expansions", "whether"],
        typer.Option(
            help="Networks that train on; image classifiers whose images or labels change; GPTs "
            "that learn other texts; students that lack a layer, or do not.",
            case_sensitive=False,
        ),
    ] = "tasks",
    quick: Quick = False,
    task: Tasks = None,
    seed: Seed = 0,
    out: Out = None,
    json: Json = None,
) -> None:
    """Insert a layer everywhere, ask every rule where (or whether), and compare.

    With --out, the outcomes of each task's networks are kept there: an interrupted run resumes.
    """
    from constrained_growth.experiments.decisions import expansions, shifts, tasks, whether

    studies = {"tasks": tasks, "shifts": shifts, "expansions": expansions, "whether": whether}
    name = "decisions" if family == "tasks" else f"decisions-{family}"
    carry_out(name, studies[family], quick=quick, seed=seed, out=out, json=json, tasks=task)


@bench.command("growth")
def bench_growth(
    quick: Quick = False, task: Tasks = None, seed: Seed = 0, out: Out = None, json: Json = None
) -> None:
    """Multiply-adds and seconds to the loss of a big network: growing against training it whole.

    With --out, every run is kept there: an interrupted benchmark resumes.
    """
    from constrained_growth.experiments import figures
    from constrained_growth.experiments.growth import benchmark

    found = carry_out("growth", benchmark, quick=quick, seed=seed, out=out, json=json, tasks=task)
    if out is not None:
        picture = out / f"{stem('growth', quick, seed, task)}.png"
        figures.growth(found).savefig(picture)


@bench.command("expansion")
def bench_expansion(
    quick: Quick = False, seed: Seed = 0, out: Out = None, json: Json = None
) -> None:
    """Expand GPTs pretrained on English for program text: by rules, at random, and by LoRA.

    With --out, what networks learnt is kept there: an interrupted benchmark resumes.
    """
    from constrained_growth.experiments import expand_benchmark

    carry_out("expansion", expand_benchmark, quick=quick, seed=seed, out=out, json=json)


@app.command()
def expand(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model.")],
    old: Annotated[Path, typer.Argument(help="A text of the kind that it was trained on.")],
    new: Annotated[Path, typer.Argument(help="The text to learn.")],
    layers: Annotated[int, typer.Option(min=1, help="How many layers to add.")],
    out: Annotated[Path, typer.Option(help="A new folder for the grown model.", metavar="DIR")],
    where: Annotated[
        str,
        typer.Option(
            help="default (largest sensitivities), interleaved, upper, middle, first, last, "
            "least-important, random, or numbers of layers such as 1,3."
        ),
    ] = "default",
    steps: Annotated[int, typer.Option(min=0, help="Steps of Adam on the new text.")] = 300,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of Adam.")] = 0.001,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces of text in a step.")] = 16,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a piece; by default 128, or what the model takes."),
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Add layers to a pretrained language model, and train them alone on another text.

    Old weights stay as they are. The folder is one of model.save_pretrained, with the tokenizer or,
    for models on bytes, without; the stock class loads the grown model. All in single precision.
    """
    import constrained_growth as cg
    from constrained_growth.experiments import expand as study
    from constrained_growth.experiments.training import Training

    console = terminal(width=0)
    try:
        found = study.expand(
            model,
            old,
            new,
            layers,
            out,
            where=where.lower(),
            training=Training(steps, batch_size, learning_rate),
            context=context,
            seed=seed,
            on_solved=lambda solved: console.print(study.question(solved)),
        )
    except cg.GrowthError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(study.answer(found))
    if json is not None:
        write_numbers(json, found)


@app.command()
def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(help="A name from --list, all, or images.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="List the experiments and how long they take.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=2, help="How many runs of every arm.")] = 100,
    seed: Seed = 0,
    data: Annotated[
        Literal["digits", "mnist1d"], typer.Option(help="What images.", case_sensitive=False)
    ] = "digits",
    float32: Annotated[
        bool, typer.Option("--float32", help="In single precision, as the source's code.")
    ] = False,
    out: Out = None,
    json: Json = None,
) -> None:
    """Run an experiment of the source: its protocol beside others, compared with its figures.

    With --out DIR an interrupted run resumes; DIR then holds picture, tables, numbers. The names of
    the files say which seeds and which precision, where these are not the usual ones.
    """
    import torch

    from constrained_growth.experiments import figures
    from constrained_growth.experiments.reproduction import report
    from constrained_growth.experiments.reproduction.reproduce import forget
    from constrained_growth.experiments.reproduction.reproduce import reproduce as run

    console = terminal()
    if show or name is None:
        console.print(report.overview())
        return
    results = dict[str, dict[str, Any]]()
    experiments = _named(name, data)
    run_of = f"-{seeds}-seeds-from-{seed}" if (seeds, seed) != (100, 0) else ""
    run_of += "-float32" if float32 else ""
    each, dtype = range(seed, seed + seeds), torch.float32 if float32 else torch.float64
    for experiment in experiments:
        begin, described = time.perf_counter(), report.describe(experiment)
        console.print(described)
        found = run(experiment, each, cache=out, dtype=dtype)
        numbers = report.numbers(found) | {"command": typed()}
        results[experiment.name] = numbers
        console.print(report.tables(numbers))
        if out is not None:
            figures.reproduction(numbers).savefig(out / f"{experiment.name}{run_of}.png")
            write_numbers(out / f"{experiment.name}{run_of}.json", numbers)
            file = out / f"{experiment.name}{run_of}.txt"
            write_tables(file, described, report.tables(numbers))
        console.print(f"{time.perf_counter() - begin:.0f} s.")
    if name.lower() == "all":
        console.print(report.account(list(results.values())))
        if out is not None:
            write_tables(out / f"all{run_of}.txt", report.account(list(results.values())))
    if json is not None:
        write_numbers(json, results if len(results) > 1 else next(iter(results.values())))
    if out is not None:  # not earlier: an interrupted command resumes
        for experiment in experiments:
            forget(experiment, each, out, dtype)


def _named(name: str, data: str) -> list[Experiment]:
    """The experiments of a name, whatever its case."""
    from constrained_growth.experiments.data import digits, mnist1d
    from constrained_growth.experiments.reproduction.protocols import EXPERIMENTS, on_images

    split = digits if data == "digits" else mnist1d
    known = {key.lower(): [experiment] for key, experiment in EXPERIMENTS.items()}
    known |= {"all": list(EXPERIMENTS.values()), "images": list(on_images(data, split))}
    if name.lower() not in known:
        raise typer.BadParameter(f"{name} is none of {', '.join(EXPERIMENTS)}, all, images.")
    return known[name.lower()]
