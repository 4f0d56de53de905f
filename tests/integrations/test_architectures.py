"""Stock architectures of Transformers, by three roads: `insert`, `Grower` and the `Trainer`.

λ is minus the gradient of the layer that stands in the model, generating with a cache gives the
same as without, and `from_pretrained` gives the same model again; or a refusal says why not.
Everything is built from small random configs.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import nothing_left_behind, refused
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import constrained_growth as cg
from constrained_growth.integrations.trainer import GrowthCallback, own_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

transformers.utils.logging.disable_progress_bar()

TEXT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**TEXT, "intermediate_size": 12}
GROUPED = {**WIDE, "num_key_value_heads": 1}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
STATES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "state_size": 4,
    "residual_in_fp32": False,
}
TRANSLATION = {
    "vocab_size": 30,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 30,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
LABELS = {"num_labels": 3, "problem_type": "single_label_classification"}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    **LABELS,
}
STAGES = {"hidden_sizes": [4, 8], "depths": [2, 2], "image_size": 16, **LABELS}
PYRAMID = {
    **STAGES,
    "image_size": 32,
    "num_encoder_blocks": 2,
    "patch_sizes": [3, 3],
    "strides": [2, 2],
}
SPEECH = {
    **WIDE,
    **LABELS,
    "conv_dim": (8,),
    "conv_kernel": (10,),
    "conv_stride": (5,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
}

GPT2 = ("GPT2LMHeadModel", TEXT)
GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders
    "GPT2": GPT2,
    "GPTNeo": (
        "GPTNeoForCausalLM",
        {
            **TEXT,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", WIDE),
    "OPT": ("OPTForCausalLM", {**TEXT, "ffn_dim": 12, "word_embed_proj_dim": 8}),
    "Bloom": ("BloomForCausalLM", {**TEXT, "n_head": 2, "n_layer": 2}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "Gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 4, "sliding_window": 3}),
    "Phi": ("PhiForCausalLM", {**WIDE, "partial_rotary_factor": 0.5}),
    "Falcon": ("FalconForCausalLM", TEXT),
    "Cohere": ("CohereForCausalLM", GROUPED),
    # mixtures of experts
    "Mixtral": ("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 3}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 12, "head_dim": 4},
    ),
    "GptOss": (
        "GptOssForCausalLM",
        {**EXPERTS, "num_local_experts": 3, "head_dim": 4, "sliding_window": 4},
    ),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        {
            **EXPERTS,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 12,
            "q_lora_rank": 4,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    # state spaces
    "Mamba": ("MambaForCausalLM", {**STATES, "time_step_rank": 2}),
    "Mamba2": (
        "Mamba2ForCausalLM",
        {**STATES, "num_heads": 4, "head_dim": 4, "n_groups": 1, "expand": 2, "chunk_size": 4},
    ),
    # encoders
    "Bert": ("BertForMaskedLM", WIDE),
    "XLMRobertaXL": ("XLMRobertaXLForMaskedLM", WIDE),
    "ModernBert": (
        "ModernBertForMaskedLM",
        {
            **WIDE,
            "num_hidden_layers": 3,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
        },
    ),
    # encoder-decoders
    "T5": ("T5ForConditionalGeneration", T5),
    "MBart": ("MBartForConditionalGeneration", {**TRANSLATION, "max_position_embeddings": 32}),
    # vision
    "ViT": ("ViTForImageClassification", VISION),
    "Beit": ("BeitForImageClassification", {**VISION, "layer_scale_init_value": 0.1}),
    "Dinov2": ("Dinov2ForImageClassification", VISION),
    "ConvNext": (
        "ConvNextForImageClassification",
        {**STAGES, "num_stages": 2, "layer_scale_init_value": 0.5},
    ),
    "ResNet": (
        "ResNetForImageClassification",
        {**STAGES, "embedding_size": 4, "layer_type": "basic"},
    ),
    "Segformer": (
        "SegformerForImageClassification",
        {**PYRAMID, "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    ),
    # audio
    "Whisper": (
        "WhisperForConditionalGeneration",
        {
            **TRANSLATION,
            "num_mel_bins": 4,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "WavLM": ("WavLMForSequenceClassification", SPEECH),
    "AST": (
        "ASTForAudioClassification",
        {
            **{key: value for key, value in VISION.items() if key != "image_size"},
            "max_length": 32,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
    ),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT2": ("GPT2LMHeadModel", {**TEXT, "scale_attn_by_inverse_layer_idx": True}, "scaling"),
    "Esm": (
        "EsmForMaskedLM",
        {**WIDE, "position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": False},
        "contact_head",
    ),
    "Swin": (
        "SwinForImageClassification",
        {
            **LABELS,
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "shift_size",
    ),
    "SwitchTransformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_decoder_layers": 2,
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        "is_sparse",
    ),
}

SINGLE = {"Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "SwitchTransformers"}
"""Their kernels know no float64, or their routers are in float32 always."""
SKIPPED = {
    "T5": ("encoder.block.0", "decoder.block.0"),
    "WavLM": ("wavlm.encoder.layers.0",),
    "ModernBert": ("model.layers.0",),
}
"""The layers that only their place can have, and that cannot be followed by a copy of the next."""


def made(kind: str, name: str, options: dict[str, Any]) -> Any:
    """A model in eval mode without dropout, away from the values it is initialised with."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    for entry, value in vars(config).items():
        if "drop" in entry and isinstance(value, float):
            setattr(config, entry, 0.0)
    model = getattr(transformers, name)(config).eval()
    model = model.float() if kind in SINGLE else model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_for(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    name, dtype = model.main_input_name, model.dtype
    ids, label = torch.randint(3, 30, (2, 8)), torch.randint(3, (2,))
    if name == "input_ids":
        return {name: ids, "labels": ids}
    if name == "pixel_values":
        size = model.config.image_size
        return {name: torch.randn(2, 3, size, size, dtype=dtype), "labels": label}
    if name == "input_features":
        return {name: torch.randn(2, 4, 16, dtype=dtype), "labels": ids}
    shape = (2, 32, 16) if "AST" in type(model).__name__ else (2, 80)
    return {name: torch.randn(shape, dtype=dtype), "labels": label}


def solver(kept: list[cg.Solution]) -> Callable[..., cg.Solution]:
    """`cg.solve`, keeping what it found."""

    def solve(problem: cg.GrowthProblem, rule: Any) -> cg.Solution:
        kept.append(cg.solve(problem, rule, stationarity=False))
        return kept[-1]

    return solve


def inserted(model: Any, here: Any, name: str, folder: Path) -> cg.GrowthRecord:
    """By `insert`, looking at the layer at its pins."""
    problem = cg.GrowthProblem(model, own_loss, [(here.batch, None)], here.candidates)
    solution = cg.solve(problem, cg.Fixed(name), stationarity=False)
    values = [one.value for one in solution.sensitivities.values()]  # of the default decision
    assert all(0 <= value < math.inf for value in values)
    assert max(values) > 0
    old = set(model.parameters())
    record = cg.insert(model, solution)
    compare(model, here.batch, solution, name, old)
    return record


def grown_in_a_loop(model: Any, here: Any, name: str, folder: Path) -> cg.GrowthRecord:
    """By a `Grower`, which proposes for itself."""
    old, kept = set(model.parameters()), list[cg.Solution]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = cg.Grower(
        model,
        optimizer,
        own_loss,
        [(here.batch, None)],
        rule=cg.Fixed(name),
        solver=solver(kept),
        max_insertions=1,
        after_insertion=lambda grower, _: compare(model, here.batch, kept[-1], name, old),
    )
    grower.step(1.0)
    grower.maybe_grow()
    return grower.record


def grown_in_the_trainer(model: Any, here: Any, name: str, folder: Path) -> cg.GrowthRecord:
    """By the callback; one step before and one after the insertion."""
    old, kept = set(model.parameters()), list[cg.Solution]()
    growth = GrowthCallback(
        [(here.batch, None)],
        candidates=here.candidates,
        rule=cg.Fixed(name),
        solver=solver(kept),
        max_insertions=1,
        after_insertion=lambda grower, _: compare(model, here.batch, kept[-1], name, old),
    )
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    rows = [{key: value[i] for key, value in here.batch.items()} for i in range(2)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[growth])
    trainer.train()
    assert growth.grower is not None
    assert growth.grower.num_steps == 2
    return growth.grower.record


def compare(model: Any, batch: Any, solution: cg.Solution, name: str, old: set[Any]) -> None:
    """λ and the gradient of what stands in the model."""
    new = {n: p for n, p in model.named_parameters() if p not in old}
    model.zero_grad()
    model(**batch).loss.backward()
    for key, value in solution.multipliers[name].items():
        ending = "." + key.removeprefix("module.")
        found = new[min((n for n in new if n.endswith(ending)), key=len)].grad
        assert found is not None
        exact = value.dtype == torch.float64
        size = max(1e-6, float(found.abs().max()))
        assert float((value + found).abs().max()) <= (1e-8 if exact else 1e-3) * size, key
    model.zero_grad()


ROADS = {"insert": inserted, "Grower": grown_in_a_loop, "Trainer": grown_in_the_trainer}
PLACES = {"insert": 0, "Grower": -1, "Trainer": -1}


@pytest.mark.parametrize("kind", GROWN)
def test_grows_as_the_stock_class_would(kind: str, tmp_path: Path) -> None:
    model = made(kind, *GROWN[kind])
    batch = batch_for(model)
    with nothing_left_behind(model):
        candidates = cg.find_candidates(model, batch)
    assert candidates
    for name in SKIPPED.get(kind, ()):
        assert candidates.skipped[name]
    advised = {"does not load it: use cg.replay" in why for why in candidates.reasons.values()}
    assert advised == {kind == "Bert"}
    here = SimpleNamespace(model=model, batch=batch, candidates=candidates)
    for road in ROADS:
        grow_by(road, kind, here, tmp_path / road)


def grow_by(road: str, kind: str, here: Any, folder: Path) -> None:
    """A copy of the model, which is then compared with what the stock class makes of it."""
    name = here.candidates[PLACES[road]].name
    model = copy.deepcopy(here.model)
    config = model.config

    record = ROADS[road](model, here, name, folder)

    model.eval()
    same = (
        {"use_cache": getattr(config, "use_cache", None)} if road == "Trainer" else {}
    )  # the Trainer's own doing
    assert config.to_dict() == {**here.model.config.to_dict(), **same}  # others may have it too
    old = {id(p) for p in here.model.parameters()}
    assert record.insertions[0].name == name
    assert len(list(model.parameters())) > len(old)
    with torch.no_grad():  # the new layer does something
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(**here.batch).logits
        check_cache(model, here.batch)
        loaded = loaded_again(model, kind, record, folder / "saved")
        assert torch.equal(loaded.eval()(**here.batch).logits, logits)


def check_cache(model: Any, batch: dict[str, Tensor]) -> None:
    """Generating with a cache gives what it gives without."""
    prompt = batch[model.main_input_name]
    if hasattr(model, "generate") and "labels" in batch and batch["labels"].dim() == 2:
        prompt = prompt[:, :4] if not model.config.is_encoder_decoder else prompt
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        if type(model).can_generate():
            options |= {"return_dict_in_generate": True, "output_logits": True}
            on, off = (model.generate(prompt, use_cache=u, **options) for u in (True, False))
            assert torch.equal(on.sequences, off.sequences)
            torch.testing.assert_close(on.logits, off.logits, rtol=0, atol=1e-5)


def loaded_again(model: Any, kind: str, record: cg.GrowthRecord, folder: Path) -> Any:
    """By `from_pretrained`, or by `replay` where the config does not count the layer."""
    if record.insertions[0].placement == "wrapped":
        assert kind == "Bert"
        fresh = cg.replay(made(kind, *GROWN[kind]), cg.GrowthRecord.from_json(record.to_json()))
        fresh.load_state_dict(model.state_dict())
        return fresh
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded


@pytest.mark.parametrize("merged", [False, True], ids=["beside its adapters", "merged"])
def test_a_model_with_adapters_of_peft_grows(merged: bool, tmp_path: Path) -> None:
    def adapted(model: Any) -> Any:
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(model, settings)

    model = adapted(made("Llama", *GROWN["Llama"]))
    batch = batch_for(model)
    with nothing_left_behind(model):
        candidates = cg.find_candidates(model, batch)
    here = SimpleNamespace(model=model, batch=batch, candidates=candidates)
    assert all("layers." in candidate.name for candidate in candidates)
    record = inserted(model, here, candidates[0].name, tmp_path)
    check_cache(model.base_model.model, batch)
    with torch.no_grad():
        for _, parameter in record.new_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    logits = model(**batch).logits
    if merged:  # into a stock model, of its class
        model.merge_and_unload().save_pretrained(tmp_path)
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    else:
        loaded = cg.replay(adapted(made("Llama", *GROWN["Llama"])), record)
        loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded.eval()(**batch).logits, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_stock_class_could_not_load_is_refused(kind: str) -> None:
    name, options, word = REFUSED[kind]
    model = made(kind, name, options)
    batch = batch_for(model)
    with nothing_left_behind(model), refused(cg.CandidateError, "longer", word):
        cg.find_candidates(model, batch)


def test_a_hand_written_candidate_is_refused_before_the_model_runs() -> None:
    model = made("DeepseekV3", *GROWN["DeepseekV3"])
    dense = model.model.layers[0]
    pinned = ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    candidate = cg.Candidate("model.layers.0", cg.blocks.CopiedBlock(dense, pinned))
    data, around = [(batch_for(model), None)], replace(candidate, wrapped=True)
    problem = cg.GrowthProblem(model, own_loss, data, [around])
    solution = cg.solve(problem, cg.Fixed("model.layers.0"), stationarity=False)
    planned = {n: replace(p, wrapped=False) for n, p in solution.candidates.items()}
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    words = "model.layers.0", "num_hidden_layers", "MoE", "ResidualMLP"
    with refused(cg.CandidateError, *words):
        cg.GrowthProblem(model, own_loss, data, [candidate])
    with refused(cg.CandidateError, *words):
        cg.insert(model, replace(solution, candidates=planned))
    handle.remove()
    assert not calls


def test_any_block_that_goes_into_a_counted_list_is_refused_before_the_model_runs() -> None:
    class Residual(cg.blocks.ResidualMLP):
        def standalone(self) -> nn.Module:
            return self

    model = made("Llama", *GROWN["Llama"])
    data, one = [(batch_for(model), None)], Residual(8, 4, torch.tanh)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with nothing_left_behind(model), refused(cg.CandidateError, "num_hidden_layers", "Residual"):
        cg.GrowthProblem(model, own_loss, data, [cg.Candidate("model.layers.0", one)])
    handle.remove()
    around = cg.Candidate("model.layers.0", one, wrapped=True)
    cg.insert(model, cg.solve(cg.GrowthProblem(model, own_loss, data, [around]), cg.TopK(1)))


class Wrapped(nn.Module):
    """A user's model around a stock one, which keeps the config as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made("Llama", *GROWN["Llama"])
        self.teacher = copy.deepcopy(self.net)
        self.config = self.teacher.config = self.net.config

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.net(input_ids=input_ids, labels=labels)


def test_a_model_inside_a_users_module_and_one_that_shares_its_config() -> None:
    model = Wrapped()
    batch = batch_for(model.net)
    names = [candidate.name for candidate in cg.find_candidates(model, batch)]
    assert names == ["net.model.layers.0", "net.model.layers.1"]
    here = SimpleNamespace(batch=batch, candidates=cg.find_candidates(model, batch))
    inserted(model, here, names[0], Path())
    assert model.config is model.net.config is model.net.model.config
    assert model.config.num_hidden_layers == 3
    assert model.teacher.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.net.model.layers] == [0, 1, 2]


@pytest.mark.parametrize("error", [cg.BlockError, cg.CandidateError])
def test_the_losses_of_routers_are_named(error: type[cg.GrowthError]) -> None:
    """Also where the model has not run before, and has no hooks yet that collect the losses.

    A loss that has them in it, as a mean over the layers, is refused before it is measured.
    """
    name, options = GROWN["Mixtral"]
    model = made("Mixtral", name, {**options, "output_router_logits": True})
    batch = batch_for(model)
    if error is cg.CandidateError:
        model(**batch)
    with nothing_left_behind(model):
        found = cg.find_candidates(model, batch)
        with refused(cg.CandidateError, "a loss of", "routers"):
            cg.GrowthProblem(model, own_loss, [(batch, None)], found)

        def of_logits(output: Any, _: None) -> Tensor:
            return output.logits.square().mean()

        problem = cg.GrowthProblem(model, of_logits, [(batch, None)], found)
        solution = cg.solve(problem, cg.Fixed("model.layers.0"), stationarity=False)
    with nothing_left_behind(model), refused(error, '"aux_loss"', "routers"):
        cg.insert(model, solution)


class Adapted(nn.Module):
    """A frozen projection and a trained one of low rank."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_inside_the_layers() -> None:
    model = made("Llama", *GROWN["Llama"]).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    batch = batch_for(model)
    here = SimpleNamespace(batch=batch, candidates=cg.find_candidates(model, batch))
    assert len(here.candidates) == 2
    inserted(model, here, "model.layers.0", Path())
    assert model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    check_cache(model, batch)
