"""`expand` and `bench expansion`: small models through the command, and plain loops beside it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.experiments import expand_benchmark
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.decisions.adaptation import Training, learn
from constrained_growth.experiments.expand import Pretrained, pieces
from constrained_growth.experiments.tables import to_json

OLD = "The old text is plain English, of which the model has read a lot. " * 20
NEW = "for i in range(10):\n    total += values[i] * weights[i]\n" * 25


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The old text, the new one, and other arguments that make a run short."""
    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / name).write_text(text)
    short = ["--batch-size", "8", "--context", "12"]
    return [str(tmp_path / "old"), str(tmp_path / "new"), *short, "--out", str(tmp_path / "out")]


def gpt2(vocabulary: int = 256) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=16,
            n_embd=8,
            n_layer=3,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["expand", *map(str, arguments)])


def test_a_model_that_learns_nothing_is_the_old_one_with_more_layers(
    tmp_path: Path, files: list[str]
) -> None:
    old = gpt2()
    old.save_pretrained(tmp_path / "model")
    written = tmp_path / "numbers.json"
    ran = invoke(tmp_path / "model", *files, "--layers", 2, "--steps", 0, "--json", written)
    assert ran.exit_code == 0, ran.output
    grown = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert grown.config.n_layer == len(grown.transformer.h) == 5
    ids = torch.randint(256, (3, 16))
    assert torch.equal(grown(input_ids=ids).logits, old(input_ids=ids).logits)
    found = json.loads(written.read_text())
    for before, after in found["losses"].values():
        assert before == after == pytest.approx(np.log(256), rel=0.02)
    sizes = [row["sensitivity"] for row in found["places"]]
    best = sorted(range(3), key=lambda place: -sizes[place])[:2]
    assert {row["after"] for row in found["places"] if row["chosen"]} == {
        f"transformer.h.{place}" for place in best
    }
    assert all(row["standard_error"] > 0 for row in found["places"])
    assert found["new_parameters"] == 2 * sum(p.numel() for p in old.transformer.h[0].parameters())
    for words in ("Decision: 2 more", "How sure:", "Held-out loss", "from_pretrained("):
        assert words in ran.output
    read = "Read: 1,320 bytes (there is no tokenizer) of the old text,"
    assert read in " ".join(ran.output.split())
    assert "…" not in ran.output  # 80 columns fold the cells


def test_new_layers_alone_learn_where_they_were_asked_for(tmp_path: Path, files: list[str]) -> None:
    """And a tokenizer in the folder is used, and saved with the model."""
    words = sorted({*OLD.split(), *NEW.split(), "?"})
    plain: Any = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    tokenizer.save_pretrained(tmp_path / "model")
    old = llama(len(words))
    old.save_pretrained(tmp_path / "model")
    written = tmp_path / "numbers.json"
    options = ["--layers", 1, "--where", "0", "--steps", 6, "--learning-rate", 0.03, "--context", 4]
    ran = invoke(tmp_path / "model", *files, *options, "--json", written)
    assert ran.exit_code == 0, ran.output
    before, after = json.loads(written.read_text())["losses"]["new"]
    assert after < before - 0.01
    read = Pretrained.read(tmp_path / "out")
    assert isinstance(read.model, LlamaForCausalLM)
    assert read.model.config.num_hidden_layers == 3
    new: Any = read.model.model.layers.pop(1)
    assert new.self_attn.o_proj.weight.any()
    assert new.mlp.down_proj.weight.any()
    found = read.model.state_dict()
    assert found.keys() == old.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in old.state_dict().items())
    expected = tokenizer(NEW, add_special_tokens=False)["input_ids"]
    assert read.tokens(Path(files[1])).tolist() == expected
    word = tmp_path / "word"
    word.write_text(words[-1])
    with pytest.raises(cg.DataError, match="that of another model"):
        Pretrained(tmp_path, gpt2(len(words) - 1), tokenizer).tokens(word)
    word.write_bytes(b"\xff")
    with pytest.raises(cg.DataError, match="not in UTF-8"):
        read.tokens(word)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", 4], "4 layers are too many: there are 3 places"),
        (["--layers", 2, "--where", "1"], "names 1 places for 2 layers"),
        (["--layers", 1, "--where", "top"], "none of default, least-important, random, first"),
        (["--layers", 1, "--where", "3"], "places are numbered from 0 to 2"),
        (["--layers", 1, "--context", 17], "the model takes 16 tokens"),
        (["--layers", 1, "--batch-size", 500], "is too short: it has 1,320 tokens"),
    ],
)
def test_what_cannot_be_done_is_said_early(
    tmp_path: Path, files: list[str], arguments: list[object], words: str
) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    ran = invoke(tmp_path / "model", *files, *arguments)
    assert ran.exit_code == 2
    assert words in " ".join(ran.output.split())
    assert "Places in" not in ran.output
    assert not (tmp_path / "out").exists()


def test_folders_and_files_that_are_not_what_they_should_be(
    tmp_path: Path, files: list[str]
) -> None:
    def refusal(*arguments: object) -> str:
        ran = invoke(tmp_path / "model", *arguments, "--layers", 1)
        assert ran.exit_code == 2, ran.output
        return " ".join(ran.output.split())

    assert "is no folder of a model" in refusal(*files)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "abacus"}')
    assert "cannot be read as a causal language model" in refusal(*files)
    for size in (255, 257):
        gpt2(size).save_pretrained(tmp_path / "model")
        assert f"the model knows {size} tokens, not 256" in refusal(*files)
    config = BertConfig(
        vocab_size=256,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "model")
    assert "has no layers whose copies can start as the identity" in refusal(*files)
    gpt2().save_pretrained(tmp_path / "model")
    assert "cannot be read: No such file" in refusal(tmp_path / "none", *files[1:])
    inside = [*files[:-1], str(tmp_path / "old" / "out")]
    assert "cannot be made: Not a directory" in refusal(*inside)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    assert "is there and not empty" in refusal(*files)


def test_pieces_are_of_the_text_and_do_not_overlap() -> None:
    train, held_out = pieces(torch.arange(100), 4, 1_000, seed=1)
    for (x, y), first, last in ((train, 0, 90), (held_out, 90, 100)):
        assert torch.equal(y, x + 1)
        assert sorted(x.flatten().tolist()) == list(range(first, first + x.numel()))
        assert last - 5 <= int(y.max()) < last
    few, _ = pieces(torch.arange(100), 4, 3, seed=1)
    assert torch.equal(few[0], train[0][:3])


# --- bench expansion ------------------------------------------------------------------------

PLAN = replace(
    expand_benchmark.QUICK,
    networks=2,
    added=(1,),
    rates=(0.01, 0.03),
    depth=2,
    width=8,
    context=12,
    first=Training(3, 32, 0.01),
    then=Training(3, 32, 0.0),
    workers=1,
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(name: str) -> torch.Tensor:
        return torch.tensor(list((OLD if name == "english" else NEW).encode())) % 96

    monkeypatch.setattr(expand_benchmark, "text", text)


@pytest.mark.usefixtures("short")
def test_the_benchmark_reports_what_plain_training_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float64)  # Adam's first steps magnify what rounding leaves
    once = functools.cache(expand_benchmark.pretrained)
    monkeypatch.setattr(expand_benchmark, "pretrained", once)
    found = expand_benchmark.run(PLAN, 3, cache=tmp_path)
    one = found["added"][1]
    subject = expand_benchmark.pretrained(PLAN, 7, tmp_path)  # the second of seed 3
    network = copy.deepcopy(subject.network)
    problem = cg.GrowthProblem(
        network, torch.nn.CrossEntropyLoss(), [subject.texts.new], subject.problem.candidates
    )
    record = cg.insert(network, cg.solve(problem, cg.Fixed(1)))
    new = [parameter for _, parameter in record.new_parameters(network)]
    adam = torch.optim.Adam(new, found["rates"]["layers"]["chosen"])
    order = torch.randperm(len(subject.texts.new[0]), generator=torch.Generator().manual_seed(7))
    for rows in order.split(32)[:3]:
        adam.zero_grad()
        x, y = (part[rows] for part in subject.texts.new)
        F.cross_entropy(network.model(input_ids=x).logits.flatten(0, 1), y.flatten()).backward()
        adam.step()
    with torch.no_grad():
        held_out = (subject.texts.new_held_out, subject.texts.old_held_out)
        expected = [float(F.cross_entropy(network(x), y)) for x, y in held_out]
    assert one["sets"]["1"][1] == pytest.approx(expected, rel=1e-8)
    arms = one["arms"]
    for i, measure in enumerate(("new", "old")):
        sets = np.array([[losses[i] for losses in one["sets"][places]] for places in "01"])
        chosen = [sets[place, n] for n, (place,) in enumerate(one["chosen"]["default"])]
        assert arms["default"][measure] == chosen
        assert arms["random"][measure] == pytest.approx(sets.mean(0))
        assert arms["random"][f"{measure}_difference"]["mean"] == pytest.approx(
            np.mean(chosen - sets.mean(0))
        )
    assert one["chosen"]["interleaved"] == one["chosen"]["upper"] == [(1,), (1,)]
    for tuned in found["rates"].values():
        assert tuned["chosen"] == PLAN.rates[int(np.argmin(tuned["losses"]))]
    sizes = one["parameters"]
    assert sizes["LoRA"] == pytest.approx(sizes["layers"], rel=0.15)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(expand_benchmark, "QUICK", PLAN)
    files = set(tmp_path.iterdir())
    options = ["--quick", "--seed", "3", "--out", str(tmp_path), "--json", str(tmp_path / "n")]
    ran = CliRunner().invoke(app, ["bench", "expansion", *options])
    assert ran.exit_code == 0, ran.output
    assert "No LoRA: peft is not installed." in ran.output
    again = json.loads((tmp_path / "n").read_text())["added"]["1"]["arms"]
    del arms["LoRA"]
    assert again == json.loads(to_json(arms))
    new_files = {file.name for file in set(tmp_path.iterdir()) - files}
    assert new_files == {"n", "constrained-growth-bench-expansion-quick-3.txt"}


@pytest.mark.usefixtures("short")
def test_adapters_start_as_the_network_and_leave_its_weights_alone() -> None:
    subject = expand_benchmark.pretrained(PLAN, 0, None)
    adapted: Any = expand_benchmark.with_lora(subject.network, 1, seed=0)
    x = subject.texts.new[0]
    before = subject.network(x)
    assert torch.equal(adapted(x), before)
    learn(adapted, subject.texts.new, Training(3, 32, 0.01), seed=0)
    assert not torch.allclose(adapted(x), before, atol=1e-3)
    assert torch.equal(subject.network(x), before)
    with adapted.model.disable_adapter():
        assert torch.equal(adapted(x), before)
