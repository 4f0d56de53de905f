"""Wrong arguments: validation, checkpoints, pictures, integrations."""

import tempfile

import torch
from lightning.pytorch import LightningModule
from table import GROWING, MORE, OPTIONAL, Counted, Row, Setting, of_solve
from torch import nn

import constrained_growth as cg
from constrained_growth import bookkeeping, checkpoint, plotting, testing, verification
from constrained_growth.integrations import lightning, trainer, transformers

OF_CALLBACK = {name: kind for name, kind in GROWING.items() if name != "model"}
MORE_OF_CALLBACK = {**MORE, "averaged": ([None],)}


def saved_by(s: Setting) -> checkpoint.Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.load(checkpoint.save(f"{folder}/run", s.model))


ROWS: dict[str, Row] = {
    "check_with_cvxpy": Row(
        verification.check_with_cvxpy,
        of_solve,
        {"problem": "problem", "cvxpy_loss": "function", "options": "mapping"},
        optional=("cvxpy_loss", "options"),
        more={"solver": ("NOSUCH", 5, None)},
    ),
    "check_with_scipy": Row(
        verification.check_with_scipy,
        of_solve,
        {"problem": "problem", "gtol": "positive", "maxiter": "count"},
    ),
    "kkt_residuals": Row(
        verification.kkt_residuals,
        lambda s: {"problem": s.problem, "solution": s.solution},
        {"problem": "problem", "solution": "solution"},
    ),
    "check_rule": Row(
        testing.check_rule,
        lambda s: {"rule": cg.TopK(1)},
        {"rule": "rule", "problem": "problem"},
        optional=("problem",),
    ),
    "check_block": Row(
        testing.check_block,
        lambda s: {"block": s.candidate.block, "x": torch.randn(5, 4)},
        {"block": "model", "x": "mapping"},
    ),
    "checkpoint.save": Row(
        checkpoint.save,
        lambda s: {"path": "x.safetensors", "model": s.model},
        {
            "path": "path",
            "model": "model",
            "optimizer": "optimizer",
            "record": "record",
            "step": "whole",
            "averaged": "module",
        },
        optional=("optimizer", "record", "averaged"),
        more={"extra": (lambda: 0, {1}, object())},
    ),
    "checkpoint.load": Row(checkpoint.load, lambda s: {"path": "x"}, {"path": "path"}),
    "checkpoint.previous": Row(checkpoint.previous, lambda s: {"path": "x"}, {"path": "path"}),
    "plot_sensitivities": Row(
        plotting.plot_sensitivities,
        lambda s: {"sensitivities": s.solution},
        {"sensitivities": "mapping", "ax": "name"},
        optional=("ax",),
        more={"sensitivities": ({},), "chosen": (5,)},
    ),
    "plot_training": Row(
        plotting.plot_training,
        lambda s: {"losses": [1.0, 0.5], "insertions": {1: "x"}},
        {"insertions": "mapping", "ax": "name"},
        optional=("ax",),
        more={"losses": (5, "x", None, [], ["a"]), "insertions": ({3: "x"},)},
    ),
    "plot_solution": Row(
        plotting.plot_solution, lambda s: {"solution": s.solution}, {"solution": "solution"}
    ),
    "plot_sensitivity_map": Row(
        plotting.plot_sensitivity_map,
        lambda s: {"rounds": {1: {"a": 1.0}}, "chosen": {1: ("a",)}},
        {"rounds": "mapping", "chosen": "mapping", "ax": "name"},
        optional=("ax",),
        more={"rounds": ({1: 5}, {1: {"a": "x"}}), "chosen": ({1: ("b",)},)},
    ),
    "plot_run": Row(
        plotting.plot_run,
        lambda s: {"losses": [1.0], "insertions": {}, "rounds": {1: {"a": 1.0}}, "chosen": {}},
        {"insertions": "mapping", "rounds": "mapping", "chosen": "mapping"},
        more={"losses": (5, "x", None, [], ["a"])},
    ),
    # integrations
    "transformers.find_candidates": Row(
        transformers.find_candidates, lambda s: {"model": s.model}, {"model": "model"}
    ),
    "trainer.own_loss": Row(
        trainer.own_loss,
        lambda s: {"output": {"loss": torch.ones(())}, "target": None},
        {},
        more={"output": (5, {}, (), torch.ones(()))},
    ),
    "trainer.GrowthCallback": Row(
        trainer.GrowthCallback, lambda s: {"data": s.data}, OF_CALLBACK, OPTIONAL, MORE_OF_CALLBACK
    ),
    "trainer.GrowthCallback.resume": Row(
        trainer.GrowthCallback.resume,
        lambda s: {"self": trainer.GrowthCallback([]), "model": s.model, "folder": "x"},
        {"model": "model", "folder": "path", "blocks": "mapping"},
        optional=("blocks",),
    ),
    "lightning.GrowthCallback": Row(
        lightning.GrowthCallback,
        lambda s: {"loss_fn": nn.CrossEntropyLoss(), "data": s.data},
        {**OF_CALLBACK, "model": "function", "blocks": "mapping"},
        (*OPTIONAL, "blocks"),
        {**MORE_OF_CALLBACK, "blocks": ({"x": 5},)},
    ),
    "lightning.load_from_checkpoint": Row(
        lightning.load_from_checkpoint,
        lambda s: {"module_class": LightningModule, "checkpoint_path": "x"},
        {
            **{"module_class": "module", "checkpoint_path": "path"},
            **{"model": "function", "blocks": "mapping"},
        },
        optional=("blocks",),
    ),
    "bookkeeping.register": Row(
        bookkeeping.register, lambda s: {"kind": Counted}, {"kind": "path"}
    ),
    "checkpoint.restore": Row(
        checkpoint.restore,
        lambda s: {"checkpoint": saved_by(s), "model": s.model},
        {"checkpoint": "path", "model": "model", "optimizer": "optimizer", "averaged": "module"},
        optional=("optimizer", "averaged"),
        more={"rule": (cg.TopK(1),)},
    ),
    "checkpoint.resume": Row(
        checkpoint.resume,
        lambda s: {
            **{"path": saved_by(s), "model": s.model},
            "optimizer_factory": lambda p: torch.optim.SGD(p, lr=0.1),
        },
        {
            **{"path": "path", "model": "model", "optimizer_factory": "factory"},
            **{"scheduler_factory": "factory", "averaged": "module", "blocks": "mapping"},
        },
        optional=("scheduler_factory", "averaged", "blocks"),
    ),
}
