"""Models of Transformers: function, config, cache and files after a layer was inserted.

Everything is built from small random configs; nothing is downloaded.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import choose, nothing_left_behind, refused
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.integrations import transformers as cgt

transformers.utils.logging.disable_progress_bar()

TEXT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}
LABELS = {"num_labels": 3, "problem_type": "single_label_classification"}
IMAGE = {**LABELS, "image_size": 16}
SIZES = {"hidden_sizes": [4, 8], "depths": [2, 2]}

GPT2 = ("GPT2", {k: v for k, v in TEXT.items() if k != "intermediate_size"})
LLAMA = ("Llama", GROUPED)
QWEN2 = (
    "Qwen2",
    {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
)
DECODERS = [
    GPT2,
    LLAMA,
    ("Mistral", {**GROUPED, "sliding_window": 3}),
    QWEN2,
    ("Qwen3", {**GROUPED, "head_dim": 4}),
]
IMAGES = [
    ("ViT", {**{k: v for k, v in TEXT.items() if "token" not in k}, **IMAGE, "patch_size": 8}),
    ("ConvNext", {**SIZES, **IMAGE, "num_stages": 2, "layer_scale_init_value": 0.5}),
    ("ResNet", {**SIZES, **LABELS, "embedding_size": 4, "layer_type": "basic"}),
    ("ResNet", {**SIZES, **LABELS, "embedding_size": 4, "layer_type": "bottleneck"}),
]


def made(kind: str, options: dict[str, Any], attention: str | None = None) -> Any:
    """A model in eval mode whose parameters are not at the values they are initialised with."""
    config = getattr(transformers, f"{kind}Config")(**options)
    if attention is not None:
        config._attn_implementation = attention
    for cls in (f"{kind}LMHeadModel", f"{kind}ForCausalLM", f"{kind}ForImageClassification"):
        if hasattr(transformers, cls):
            model = getattr(transformers, cls)(config).double().eval()
            break
    else:
        model = getattr(transformers, f"{kind}ForMaskedLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def text(count: int = 2) -> dict[str, Tensor]:
    """Token ids, some masked, and left out of the loss.

    Not the first ones: in float64 the "eager" attention gives NaN where all is masked.
    """
    ids = torch.randint(3, 30, (count, 7))
    mask = torch.ones_like(ids)
    mask[0, 1:3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def image(count: int = 2) -> dict[str, Tensor]:
    side = torch.randn(count, 3, 16, 16)
    return {"pixel_values": side, "labels": torch.randint(3, (count,))}


def batch_for(model: Any) -> dict[str, Tensor]:
    return text() if model.main_input_name == "input_ids" else image()


def loss_of(output: Any, target: object) -> Tensor:
    return output.loss


def problem_of(model: Any, candidates: Any, batches: int = 1) -> cg.GrowthProblem:
    data = [(batch_for(model), None) for _ in range(batches)]
    return cg.GrowthProblem(model, loss_of, data, candidates)


def grown(model: Any, *names: str, **options: Any) -> cg.GrowthRecord:
    problem = problem_of(model, cgt.find_candidates(model))
    return cgt.insert(model, cg.solve(problem, choose(*names)), **options)


def randomize(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def label(value: Any) -> str:
    return str(value[0]) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS, ids=label)
def test_decoder(kind: Any, attention: str, tmp_path: Path) -> None:
    model = made(*kind, attention=attention)
    inputs = text()
    before, candidates = model(**inputs).logits, cgt.find_candidates(model)
    assert len(candidates) == 3
    first, last = candidates[0].name, candidates[2].name
    options = [entry for entry in vars(model.config) if entry == "layer_types"]
    kinds = list(getattr(model.config, "layer_types", None) or [])

    record = grown(model, first, last)

    assert torch.equal(model(**inputs).logits, before)
    assert [layer.placement for layer in record.insertions] == ["sibling", "sibling"]
    assert model.config.num_hidden_layers == len(layers(model)) == 5
    if options and kinds:
        assert model.config.layer_types == [kinds[i] for i in (0, 0, 1, 2, 2)]
    numbers = [m.layer_idx for m in layers(model).modules() if hasattr(m, "layer_idx")]
    assert numbers == [0, 1, 2, 3, 4]

    randomize(layers(model)[1])
    randomize(layers(model)[4])
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    generated = [
        model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(generated[0], generated[1])
    changed = model(**inputs).logits
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=attention
    )
    assert torch.equal(loaded.eval()(**inputs).logits, changed)


@pytest.mark.parametrize("kind", IMAGES, ids=lambda k: k[0] + str(k[1].get("layer_type", "")))
def test_image_model(kind: Any, tmp_path: Path) -> None:
    model = made(*kind)
    inputs = image()
    before = model(**inputs).logits
    candidates = cgt.find_candidates(model)
    depth = sum(model.config.depths) if hasattr(model.config, "depths") else 3
    assert len(candidates) == depth
    names = [candidates[0].name, candidates[-1].name]

    record = grown(model, *names)

    assert torch.equal(model(**inputs).logits, before)
    assert max(record.difference.values()) == 0
    config = model.config
    assert (sum(config.depths) if hasattr(config, "depths") else config.num_hidden_layers) == (
        depth + 2
    )
    for name, parameter in model.named_parameters():
        if not bool(parameter.any()):
            randomize(model.get_submodule(name.rpartition(".")[0]))
    changed = model(**inputs).logits
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.eval()(**inputs).logits, changed)


@pytest.mark.parametrize("kind", [*DECODERS, *IMAGES], ids=label)
def test_multipliers_are_those_of_an_inserted_layer(kind: Any) -> None:
    model = made(*kind)
    candidates = cgt.find_candidates(model)
    problem = problem_of(model, candidates, batches=2)
    with nothing_left_behind(model):
        solution = cg.solve(problem)
    for candidate in candidates:
        expected = really_inserted(model, candidate, problem.data)
        found = solution.multipliers[candidate.name]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def really_inserted(model: Any, candidate: cg.Candidate, data: Any) -> dict[str, Tensor]:
    """λ from a model with the copy put into the list by hand, without a cache."""
    model = copy.deepcopy(model)
    layer: Any = copy.deepcopy(candidate.block).module
    name, _, place = candidate.after.rpartition(".")
    stack = model.get_submodule(name)
    elements = list(stack.children())
    elements.insert(int(place) + 1, layer)
    stack._modules = {str(i): element for i, element in enumerate(elements)}
    if hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers += 1
        if getattr(model.config, "layer_types", None):
            model.config.layer_types.insert(int(place) + 1, model.config.layer_types[int(place)])
        model.config.use_cache = False
    names = list(candidate.block.pinned)  # type: ignore[arg-type]
    pins = {name: layer.get_parameter(name.removeprefix("module.")) for name in names}
    loss = torch.stack([model(**batch).loss for batch, _ in data]).mean()
    grads = torch.autograd.grad(loss, list(pins.values()))
    return {name: -grad for name, grad in zip(pins, grads, strict=True)}


def enable(on: bool, model: Any) -> None:
    """Switch activation checkpointing, under the name of the version that is installed."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options = ({"use_reentrant": False},) if on else ()
    getattr(model, f"{word}_checkpointing_{'enable' if on else 'disable'}")(*options)


PER_LAYER: dict[str, Any] = {
    "mean of hidden states": lambda output: torch.stack(output.hidden_states).square().mean(),
    "one behind": lambda output: output.hidden_states[3].square().mean(),
    "attentions": lambda output: output.loss + torch.stack(output.attentions).square().mean(),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("loss", PER_LAYER)
def test_a_loss_that_reads_the_entry_of_a_new_layer_is_refused(loss: str, train: bool) -> None:
    options = {**GROUPED, "attention_dropout": 0.3}
    model = made("Llama", options, "eager").train(train)
    inputs = {**text(), "output_hidden_states": True, "output_attentions": True}
    candidates = cg.find_candidates(model, inputs)
    data = [(inputs, None)]
    with nothing_left_behind(model), refused(cg.CandidateError, "model.layers.0", "each layer"):
        cg.GrowthProblem(model, lambda output, _: PER_LAYER[loss](output), data, candidates)
    # Transformers collects the output of each layer that is there when a model runs first
    wrapped = [replace(candidate, wrapped=True) for candidate in candidates]
    with nothing_left_behind(model), refused(cg.CandidateError, "model.layers.0", "really put in"):
        cg.GrowthProblem(model, lambda output, _: PER_LAYER[loss](output), data, wrapped)
    model(**inputs)
    cg.GrowthProblem(model, lambda output, _: PER_LAYER[loss](output), data, wrapped)


def test_a_loss_of_routers_is_refused_before_the_pass() -> None:
    experts = {"num_experts_per_tok": 2, "num_local_experts": 3, "output_router_logits": True}
    model = made("Mixtral", {**GROUPED, **experts}).float()
    inputs = text()
    candidates = cg.find_candidates(model, inputs)
    with nothing_left_behind(model), refused(cg.CandidateError, "routers", "wrapped=True"):
        cg.GrowthProblem(model, loss_of, [(inputs, None)], candidates)
    cg.GrowthProblem(model, lambda o, _: o.logits.square().mean(), [(inputs, None)], candidates)


@pytest.mark.parametrize("entry", [-1, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hidden_states_that_stay_where_they_are_may_be_read(entry: int, dropout: float) -> None:
    """Without a word, also where random numbers are drawn."""
    model = made("Llama", {**GROUPED, "attention_dropout": dropout}).train(dropout > 0)
    inputs = {**text(), "output_hidden_states": True}

    def loss(output: Any, _: object) -> Tensor:
        return output.loss + output.hidden_states[entry].square().mean()

    problem = cg.GrowthProblem(model, loss, [(inputs, None)], cg.find_candidates(model, inputs))
    solution = cg.solve(problem, choose("model.layers.1"))
    old = set(model.parameters())
    cg.insert(model, solution)
    assert len(model(**inputs).hidden_states) == 5
    if dropout == 0:
        loss(model(**inputs), None).backward()
        new = {name: p for name, p in model.named_parameters() if p not in old}
        for name, value in solution.multipliers["model.layers.1"].items():
            grad = new[name.replace("module", "model.layers.2")].grad
            torch.testing.assert_close(value, -grad, rtol=0, atol=1e-9)  # type: ignore


def test_hidden_states_and_checkpointing_follow() -> None:
    model = made(*LLAMA).train()
    enable(True, model)
    inputs = text()
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4
    plain = copy.deepcopy(model)
    enable(False, plain)
    candidates = cgt.find_candidates(model)
    found, expected = (
        cg.solve(
            cg.GrowthProblem(m, loss_of, [(inputs, None)], candidates), choose(candidates[1].name)
        )
        for m in (model, plain)
    )
    for name, value in expected.multipliers[candidates[1].name].items():
        torch.testing.assert_close(found.multipliers[candidates[1].name][name], value)
    cgt.insert(model, found)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5
    assert layers(model)[2].gradient_checkpointing
    randomize(layers(model)[2])
    model(**inputs).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    enable(False, model)
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_training_goes_on_with_tied_weights_and_an_optimizer() -> None:
    model = made(*GPT2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs = text()
    model(**inputs).loss.backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state[model.transformer.wte.weight])
    average = torch.optim.swa_utils.AveragedModel(model)
    grown(model, "transformer.h.1", optimizer=optimizer, averaged=average)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(optimizer.state[model.transformer.wte.weight]["exp_avg"], state["exp_avg"])
    assert average.module.config.n_layer == model.config.n_layer == 4  # type: ignore[union-attr]
    before = [p.detach().clone() for p in layers(model)[2].parameters()]
    model(**inputs).loss.backward()
    optimizer.step()
    moved = [
        not torch.equal(p, b) for p, b in zip(layers(model)[2].parameters(), before, strict=True)
    ]
    assert any(moved)
    assert model(**inputs).loss < 10


def test_dropout_of_the_copies_leaves_the_model_its_random_numbers() -> None:
    model = made("GPT2", {**GPT2[1], "resid_pdrop": 0.5, "attn_pdrop": 0.5}).train()
    candidates = cgt.find_candidates(model)
    data = [(text(), None) for _ in range(3)]
    losses = []
    for some in (candidates[:1], candidates):
        torch.manual_seed(3)
        problem = cg.GrowthProblem(model, loss_of, data, some)
        torch.manual_seed(4)
        losses.append(cg.solve(problem).loss)
    assert losses[0] == losses[1]


def test_post_norm_is_served_by_another_block(tmp_path: Path) -> None:
    options = {**TEXT, "num_hidden_layers": 2}
    model = made("Bert", options)
    candidates = cgt.find_candidates(model)
    assert {type(c.block).__name__ for c in candidates} == {"ResidualMLP"}
    assert "post-norm" in str(candidates) or "LayerNorm" in str(candidates)
    with refused(cg.BlockError, "post-norm", "ResidualMLP", "output.LayerNorm.weight"):
        cg.blocks.CopiedBlock(model.bert.encoder.layer[0])
    inputs = text()
    before = model(**inputs).logits
    record = grown(model, candidates[0].name)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config.num_hidden_layers == 2
    fresh = cgt.replay(made("Bert", options), cg.GrowthRecord.from_json(record.to_json()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**inputs).logits, before)


@pytest.mark.parametrize("kind", [LLAMA, QWEN2, IMAGES[1]], ids=label)
def test_replay(kind: Any) -> None:
    model, fresh = made(*kind), made(*kind)
    names = [candidate.name for candidate in cgt.find_candidates(model)]
    inputs = batch_for(model)
    record = grown(model, names[0], names[-1]) + grown(model, names[1])
    assert cgt.replay(fresh, cg.GrowthRecord.from_json(record.to_json())) is fresh
    assert fresh.config.to_dict() == model.config.to_dict()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


def test_layers_that_depend_on_their_number_are_refused() -> None:
    model = made("GPT2", {**GPT2[1], "scale_attn_by_inverse_layer_idx": True}, attention="eager")
    with refused(cg.CandidateError, "transformer.h.0", "longer", "attn", "number"):
        cgt.find_candidates(model)
    layer, config = layers(model)[0], model.config
    ends = [f"{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")]
    block = cg.blocks.CopiedBlock(layer, ends)
    with refused(cg.CandidateError, "transformer.h.0", "n_layer"):
        problem_of(model, [cg.Candidate("transformer.h.0", block)])
    around = cg.Candidate("transformer.h.0", block, wrapped=True)
    solution = cg.solve(problem_of(model, [around]), choose())
    solution = replace(
        solution,
        decision=cg.Decision(("transformer.h.0",)),
        candidates={n: replace(p, wrapped=False) for n, p in solution.candidates.items()},
    )
    with nothing_left_behind(model), refused(cg.CandidateError, "transformer.h.0", "n_layer"):
        cg.insert(model, solution)
    assert model.config is config
    assert config.n_layer == 3


def test_a_failure_puts_the_config_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(*QWEN2)
    problem = problem_of(model, cgt.find_candidates(model))
    solution = cg.solve(problem, choose("model.layers.1"))
    with torch.no_grad():  # no longer the identity
        solution.candidates["model.layers.1"].block.module.mlp.down_proj.weight.fill_(1.0)  # type: ignore[union-attr]
    config = copy.deepcopy(model.config.to_dict())
    with nothing_left_behind(model), refused(cg.BlockError, "moves"):
        cgt.insert(model, solution)
    assert model.config.to_dict() == config


def test_refusals() -> None:
    with refused(cg.CandidateError, "PreTrainedModel"):
        cgt.find_candidates(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = made(*GPT2)
    candidates = cgt.find_candidates(model)
    with refused(cg.CandidateError, "cg.solve"):
        cgt.insert(model, candidates)  # type: ignore[arg-type]
    wrapped = copy.deepcopy(model)
    wrapped.transformer.h[1] = _Wrapped(wrapped.transformer.h[1], candidates[1].block)
    prompt = {"input_ids": torch.randint(3, 30, (1, 4)), "attention_mask": torch.ones(1, 4)}
    with refused(cg.BlockError, "use_cache=False"):
        wrapped.generate(**prompt, max_new_tokens=3)


class _Wrapped(nn.Module):
    """A copy wrapped around its neighbour, for which the cache has no place."""

    def __init__(self, base: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.base, self.block = base, block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.base(x, *args, **kwargs)
        if isinstance(output, Tensor):
            return self.block(output, *args, **kwargs)
        return (self.block(output[0], *args, **kwargs), *output[1:])
