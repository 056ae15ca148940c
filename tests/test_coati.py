"""ColossalChat's LoRA layers through the hook ``lora_layer``: as there, but for its faults.

What ColossalChat does is written down here from its code at 4f9953be3: :class:`Theirs`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import refusal, save, three_losses
from safetensors.torch import load_file
from stacks import IS_MODERN
from torch import nn
from torch.nn import functional

import llmload
from llmload.builtin.coati.layers import CoatiEmbedding, CoatiLayer, CoatiLinear
from llmload.testing import IDS, tiny_checkpoint, tiny_llama

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


class Theirs(nn.Module):
    """A linear or embedding layer as ColossalChat's, its faults put right.

    Faults: a linear layer's alpha is 32 and its dropout 0 whatever is asked for, and its bias is
    dropped where none is trained.
    """

    def __init__(
        self, base: nn.Linear | nn.Embedding, *, r: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        out, width = base.weight.shape
        inputs = width if isinstance(base, nn.Linear) else out
        outputs = out if isinstance(base, nn.Linear) else width
        self.scaling = alpha / r
        self.dropout = dropout
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        bias = getattr(base, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.lora_A = nn.Parameter(torch.zeros(r, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))
        self.embeds = isinstance(base, nn.Embedding)
        if self.embeds:
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embeds:
            low = functional.embedding(x, self.lora_A.t())
            return functional.embedding(x, self.weight) + low @ self.lora_B.t() * self.scaling
        low = functional.dropout(x, self.dropout, self.training) @ self.lora_A.t()
        return functional.linear(x, self.weight, self.bias) + low @ self.lora_B.t() * self.scaling


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("coati"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its linear layers have biases, all but the head."""
    return tiny_checkpoint(tmp_path_factory.mktemp("coati") / "opt", "opt")


def load(folder: Path, lora: dict[str, Any], **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "lora": lora, "coati": {}, **keys})


def layers(model: nn.Module) -> dict[str, CoatiLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CoatiLayer)}


# --- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_linear_layer_computes_and_learns_what_theirs_does(opt: Path, dropout: float) -> None:
    section = {**LORA, "lora_dropout": dropout, "target_modules": ["fc1"]}
    base = llmload.load({"model": str(opt)}).model
    ours = load(opt, section).model.train()
    layer = next(iter(layers(ours).values()))
    theirs = Theirs(base.model.decoder.layers[0].fc1, r=4, alpha=8, dropout=dropout).train()
    nn.init.normal_(theirs.lora_B)
    layer.load_state_dict(
        {"lora_A.default": theirs.lora_A, "lora_B.default": theirs.lora_B}, strict=False
    )
    x = torch.randn(3, 5, 16)
    torch.manual_seed(3)
    mine = layer(x)
    torch.manual_seed(3)
    other = theirs(x)
    assert torch.equal(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    assert torch.equal(layer.lora_A["default"].grad, theirs.lora_A.grad)
    assert torch.equal(layer.lora_B["default"].grad, theirs.lora_B.grad)


def test_an_embedding_computes_what_theirs_does_and_drops_nothing_out(llama: Path) -> None:
    section = {**LORA, "lora_dropout": 0.9, "target_modules": ["embed_tokens"]}
    base = llmload.load({"model": str(llama)}).model
    (layer,) = layers(load(llama, section).model.train()).values()
    theirs = Theirs(base.model.embed_tokens, r=4, alpha=8)
    assert isinstance(layer, CoatiEmbedding)
    assert not layer.lora_A["default"].any()
    assert layer.lora_A["default"].shape == (4, 128)
    assert layer.lora_B["default"].shape == (16, 4)
    assert 0.5 < layer.lora_B["default"].std() < 1.5
    nn.init.normal_(theirs.lora_A)
    layer.load_state_dict(
        {"lora_A.default": theirs.lora_A, "lora_B.default": theirs.lora_B}, strict=False
    )
    assert torch.equal(layer(IDS), theirs(IDS))


def test_the_row_of_the_pad_token_learns_nothing(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, pad_token_id=3)
    (layer,) = layers(load(folder, {**LORA, "target_modules": ["embed_tokens"]}).model).values()
    layer(torch.tensor([[3, 4]])).sum().backward()
    gradient = layer.lora_A["default"].grad
    assert not gradient[:, 3].any()
    assert gradient[:, 4].all()


def test_a_linear_layer_starts_as_theirs_does(llama: Path) -> None:
    torch.manual_seed(9)
    found = layers(load(llama, {**LORA, "target_modules": ["q_proj"]}).model)
    torch.manual_seed(9)
    base = llmload.load({"model": str(llama)}).model
    for name, layer in found.items():
        assert isinstance(layer, CoatiLinear)
        module = base.get_submodule(name.removeprefix("base_model.model."))
        theirs = Theirs(module, r=4, alpha=8)
        assert layer.scaling["default"] == theirs.scaling == 2.0
        assert torch.equal(layer.lora_A["default"], theirs.lora_A)
        assert not layer.lora_B["default"].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_are_float32_beside_a_base_that_is_not(llama: Path, dtype: str) -> None:
    """Theirs then computes under autocast only; here the output has the base's dtype."""
    model = load(llama, LORA, dtype=dtype).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if dtype == "bfloat16":
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_pissa_moves_the_largest_singular_parts_out_of_the_base(llama: Path) -> None:
    section = {**LORA, "init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj"]}
    base = llmload.load({"model": str(llama)}).model
    torch.manual_seed(4)
    result = load(llama, section)
    torch.manual_seed(4)
    for name, layer in layers(result.model).items():
        weight = base.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        u, s, v = torch.svd_lowrank(weight, 4, niter=4)
        s = s / 2.0
        b, a = u @ torch.diag(s.sqrt()), torch.diag(s.sqrt()) @ v.t()
        torch.testing.assert_close(layer.lora_A["default"].detach(), a)
        torch.testing.assert_close(layer.lora_B["default"].detach(), b)
        torch.testing.assert_close(
            layer.get_base_layer().weight.detach(), weight - 2.0 * b @ a, atol=1e-6, rtol=1e-5
        )
    assert len(result.report.facts["lora"]["changed_base"]) == 2
    out, expected = result.model(input_ids=IDS).logits, base(input_ids=IDS).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_pissa_leaves_embeddings_as_they_start(llama: Path) -> None:
    section = {**LORA, "init_lora_weights": "pissa_niter_4"}
    section["target_modules"] = ["q_proj", "embed_tokens"]
    result = load(llama, section)
    embedding = layers(result.model)["base_model.model.model.embed_tokens"]
    base = llmload.load({"model": str(llama)}).model
    assert not embedding.lora_A["default"].any()
    assert torch.equal(embedding.get_base_layer().weight, base.model.embed_tokens.weight)


# --- names, and what is trained ---------------------------------------------------------------


def test_factors_are_saved_under_the_names_that_they_have_there(
    llama: Path, tmp_path: Path
) -> None:
    model = load(llama, LORA).model
    folder = save(model, tmp_path / "adapter")
    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B"}
    assert saved[f"{PREFIX}.lora_A"].shape == (4, 16)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["llmload_plugins"] == {"coati": f"llmload {llmload.__version__}"}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_kept_and_trained_as_asked(opt: Path, bias: str) -> None:
    section = {**LORA, "bias": bias, "target_modules": ["fc1", "lm_head"], "tied_weights": "untie"}
    result = load(opt, section)
    model, base = result.model, llmload.load({"model": str(opt)}).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(result.plan.trainable_parameters or ()) == trained
    factors = {name for name in trained if "lora_" in name}
    assert len(factors) == 6
    held = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    fc1 = held["model.decoder.layers.0.fc1.base_layer.bias"]
    assert torch.equal(fc1, base.model.decoder.layers[0].fc1.bias)
    biases = {name.removeprefix("base_model.model.") for name in trained - factors}
    adapted = {f"model.decoder.layers.{n}.fc1.base_layer.bias" for n in (0, 1)}
    created = "lm_head.base_layer.bias"
    if bias == "none":
        assert biases == set()
        assert created not in held
    else:
        # The head has none: one of zeros is made for it.
        assert not held[created].any()
        expected = {n for n in held if n.endswith("bias")} if bias == "all" else adapted | {created}
        assert biases == expected


def test_an_adapter_trains_is_saved_and_resumed(llama: Path, tmp_path: Path) -> None:
    section = {**LORA, "lora_dropout": 0.1, "target_modules": ["q_proj", "embed_tokens"]}
    model = load(llama, section).model
    losses = three_losses(model)
    assert losses[-1] < losses[0]
    folder = save(model, tmp_path / "adapter")
    resumed = load(llama, {"adapter": str(folder)}).model
    assert layers(resumed).keys() == layers(model).keys()
    model.eval()
    assert torch.equal(resumed(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert refusal(llama, {"adapter": str(folder)}).splitlines()[0] == (
        f"lora.adapter: the adapter in {str(folder)!r} has layers made by the plugin 'coati' of"
        " llmload 0.1.0, which takes no part in this load. llmload 0.1.0 is installed: select it"
        " with `-p coati`; if it has a section, add `coati: {}` to the spec."
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved_and_resumed_or_their_loss_is_foretold(
    opt: Path, tmp_path: Path, bias: str
) -> None:
    section = {**LORA, "bias": bias, "target_modules": ["fc1"]}
    result = load(opt, section)
    model = result.model
    warned = [text for text in result.report.warnings if text.startswith("lora.bias: ")]
    three_losses(model)
    model.eval()
    resumed = load(opt, {"adapter": str(save(model, tmp_path / "adapter"))}).model
    same = torch.equal(resumed(input_ids=IDS).logits, model(input_ids=IDS).logits)
    if IS_MODERN or bias == "all":
        assert (same, warned) == (True, [])
        return
    assert not same
    assert warned == [
        "lora.bias: peft 0.13.2 leaves the biases of adapted layers out of a saved adapter. Use"
        " `bias: all`, or a newer peft."
    ]


def test_an_adapter_is_merged_into_its_base(llama: Path, tmp_path: Path) -> None:
    section = {**LORA, "target_modules": ["q_proj", "embed_tokens"]}
    model = load(llama, section).model
    three_losses(model)
    folder = save(model, tmp_path / "adapter")
    merged = load(llama, {"adapter": str(folder), "merge": True}).model
    assert layers(merged) == {}
    out, expected = merged(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_evaluation_merges_nothing_and_training_goes_on_after_it(llama: Path) -> None:
    """Theirs merges and deletes its factors in ``eval()``, and cannot train any more."""
    model = load(llama, LORA).model
    three_losses(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model.eval()(input_ids=IDS).logits
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    three_losses(model)
    with model.disable_adapter():
        plain = model.eval()(input_ids=IDS).logits
    assert not torch.equal(plain, expected)
    for layer in layers(model).values():
        layer.merge(safe_merge=True)
        layer.unmerge()
        assert not layer.merged


# --- faults, and what is refused ------------------------------------------------------------------


def test_faults_are_reproduced_where_they_are_asked_for(opt: Path) -> None:
    section = {**LORA, "lora_dropout": 0.5, "target_modules": ["fc1", "embed_positions"]}
    result = load(opt, section, coati={"faults": True})
    for layer in layers(result.model).values():
        assert layer.scaling["default"] == 32 / 4
        assert layer.lora_dropout["default"].p == 0.0
        assert layer.get_base_layer().bias is None
    trains_bias = load(opt, {**section, "bias": "lora_only"}, coati={"faults": True})
    assert all(m.get_base_layer().bias is not None for m in layers(trains_bias.model).values())


def notes(folder: Path, **keys: Any) -> list[str]:
    plan = llmload.plan({"model": str(folder), "lora": LORA, **keys})
    return next(step.notes for step in plan.steps if step.plugin == "coati")


def test_the_plan_says_what_the_layers_are_like(llama: Path) -> None:
    plain = "ColossalChat's layers: float32 factors lora_A and lora_B in every layer"
    assert notes(llama, coati={}) == [plain]
    assert notes(llama, coati={"faults": True}) == [
        plain,
        "with ColossalChat's faults: linear layers have alpha 32 and dropout 0.0, and pretrained"
        " biases are dropped",
    ]


def test_a_file_of_colossalchats_is_carried_out_in_its_own_layout(
    llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora_config.json"
    file.write_text(json.dumps({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}))
    found = layers(load(llama, {"lora_config": str(file)}).model)
    assert len(found) == 2
    assert {layer.scaling["default"] for layer in found.values()} == {3.0}
    assert {layer.lora_dropout["default"].p for layer in found.values()} == {0.1}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"use_dora": True},
            "lora.use_dora: ColossalChat's layers have nothing of the kind. Remove `use_dora`, or"
            " the section `coati`.",
        ),
        (
            {"use_rslora": True},
            "lora.use_rslora: ColossalChat's layers have nothing of the kind. Remove `use_rslora`,"
            " or the section `coati`.",
        ),
        (
            {"init_lora_weights": "gaussian"},
            "lora.init_lora_weights: ColossalChat's layers start by kaiming_uniform or PiSSA, and"
            " 'gaussian' was asked for. Write true or pissa_niter_4, or remove the section"
            " `coati`.",
        ),
    ],
)
def test_what_these_layers_do_not_have_is_refused(
    llama: Path, lora: dict[str, Any], message: str
) -> None:
    assert refusal(llama, {**LORA, **lora}, coati={}) == message


def test_the_section_alone_makes_no_adapter(llama: Path) -> None:
    plan = llmload.plan({"model": str(llama), "coati": {}})
    assert [str(problem) for problem in plan.errors] == [
        "coati: the spec has no section `lora`, which says what adapter to make. Add it, or remove"
        " `coati`."
    ]


def test_quantised_weights_are_refused(llama: Path) -> None:
    plan = llmload.plan({"model": str(llama), "lora": LORA, "coati": {}, "kbit": {}})
    assert (
        "coati: 'coati' cannot be combined with 'kbit': ColossalChat's layers adapt weights that"
        " are not quantised. Remove `coati`, or load the weights unquantised."
        in [str(p) for p in plan.errors]
    )
