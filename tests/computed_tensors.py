"""Model classes whose constructors compute what no checkpoint holds: ``computed_tensors:NAME``.

Each is a small model of its own with everything that a reference load needs: ``Class(config)`` on
the CPU, under the model's dtype, gives every tensor the value that a load must give it too.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llmload.model import reachable
from llmload.testing import tiny_model


class Frequencies(LlamaForCausalLM):
    """A buffer that is not saved, of a class that initialises nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(6) * number, persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)), False)
        waves = torch.zeros(8, 4)
        waves[:, 0::2] = torch.sin(torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1]))
        waves[:, 1::2] = math.pi
        self.register_buffer("waves", waves, persistent=False)


class OfManyModules(LlamaForCausalLM):
    """Buffers of several dtypes, of modules deep inside."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = nn.ModuleList(Layer(number) for number in range(3))
        self.register_buffer("table", torch.full((3,), 7, dtype=torch.int32), persistent=False)
        self.post_init()


class Excused(LlamaForCausalLM):
    """Parameters and a saved buffer that an older checkpoint lacks."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("window", torch.linspace(0.0, 1.0, 8))
        self.slopes = nn.ParameterList([nn.Parameter(torch.full((2,), 0.5)) for _ in range(2)])
        self.large = nn.Parameter(torch.arange(2.0**15))
        self.filled = nn.Parameter(torch.empty(2**15))
        nn.init.constant_(self.filled, 3.0)
        self.post_init()


class LetsBeMissing(Excused):
    """The same, of a class that lets its checkpoints lack them."""

    _keys_to_ignore_on_load_missing = ("gain", "window", "slopes", "large", "filled")


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Notes:
    def __init__(self) -> None:
        self.scale = torch.tensor([0.25, 4.0])


class PlainAttributes(LlamaForCausalLM):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.ramp = torch.arange(4.0)
        self.several = [torch.ones(2), {"deep": torch.full((2, 2), 2.0)}]
        self.pair = Pair(torch.zeros(1), torch.tensor([5]))
        self.notes = Notes()
        self.model.layers[0].offset = torch.tensor([9.0])
        self.post_init()


class Aliases(LlamaForCausalLM):
    """Other names of parameters and buffers, and a view of a buffer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embeddings = [self.model.embed_tokens.weight]
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)
        self.register_buffer("same_ramp", self.ramp, persistent=False)
        self.by_name = {"ramp": self.ramp, "half": self.ramp[:2]}
        self.post_init()


class Views(LlamaForCausalLM):
    """A view of a parameter."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.rows = [self.lm_head.weight[1:3]]
        self.post_init()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(8.0), persistent=False)
        self.register_buffer("scaled", torch.arange(8.0), persistent=False)
        self.register_buffer("copied", torch.zeros(8), persistent=False)
        self.register_buffer("own", torch.zeros(8), persistent=False)


class InitialisesInPart(LlamaForCausalLM):
    """``_init_weights`` writes a part, computes with what is there, and takes one from another."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.part = Part()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            with torch.no_grad():
                module.positions[0].fill_(-1.0)
                module.copied.copy_(module.positions)
                module.scaled.mul_(0.5)
                module.own.fill_(2.0)


class FromSmallParameters(LlamaForCausalLM):
    """Buffers that are computed from the first values of small parameters."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.base = nn.Parameter(torch.arange(1.0, 5.0))
        self.middle = nn.LayerNorm(4)
        self.register_buffer("inverse", 1 / self.base.detach(), persistent=False)
        self.register_buffer("level", self.middle.weight.detach() * 3, persistent=False)
        self.post_init()


@functools.lru_cache
def steps(number: int) -> torch.Tensor:
    return torch.arange(float(number))


tables: dict[int, torch.Tensor] = {}


class FromCaches(LlamaForCausalLM):
    """Buffers from a cache of the class's module, which its forward asks again, and expanded."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("steps", steps(5), persistent=False)
        self.register_buffer("table", tables.setdefault(3, torch.ones(3)), persistent=False)
        self.register_buffer("position_ids", torch.arange(3.0).expand(2, 3), persistent=False)
        self.post_init()

    def forward(self, *args: Any, **others: Any) -> Any:
        output = super().forward(*args, **others)
        output.logits = output.logits + (steps(5) + self.steps).sum() + tables[3].sum()
        return output


class InFunctions(LlamaForCausalLM):
    """Tensors in hooks, and in functions that take some of their arguments along."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        shift, scale = torch.arange(5.0), torch.full((2,), 3.0)
        self.lm_head.register_forward_pre_hook(lambda module, args: shift.sum() and None)
        self.added = functools.partial(torch.add, scale, other=torch.ones(2))
        self.default = lambda value, by=torch.full((3,), 4.0): value + by  # noqa: B008
        self.post_init()


class NoPostInit(PreTrainedModel):
    """A model that is none of transformers', and never calls ``post_init``."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
        self.shift = torch.ones(config.hidden_size)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0, 0.02)

    def forward(self, input_ids: torch.Tensor, **others: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids) * self.scale + self.shift
        return CausalLMOutput(logits=self.head(hidden))


class FromLargeWeights(LlamaForCausalLM):
    """A buffer that depends on the first, random values of weights which are then loaded."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.wide = nn.Linear(256, 256, bias=False)
        self.register_buffer("width", self.wide.weight.detach().norm(), persistent=False)
        self.post_init()


RIGHT = (
    Frequencies,
    OfManyModules,
    Excused,
    LetsBeMissing,
    PlainAttributes,
    Aliases,
    Views,
    InitialisesInPart,
    FromSmallParameters,
    FromCaches,
    InFunctions,
    NoPostInit,
)
"""Those that a load must get right in every way of loading."""
MISSING = dict.fromkeys(
    (Excused, LetsBeMissing), ("gain", "window", "slopes.0", "slopes.1", "large", "filled")
)
"""What the checkpoint of a class lacks though its model would save it."""


class Drawn(LlamaForCausalLM):
    """A buffer that the constructor draws at random."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("drawn", torch.randn(16), persistent=False)
        self.drawn_too = torch.rand(4)
        self.post_init()


def save(name: str, folder: Path) -> Path:
    """Write a checkpoint of a class with seeded weights, without what it may lack."""
    model_class = globals()[name]
    config = tiny_model("llama").config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = model_class(config).state_dict()
    lacks = MISSING.get(model_class, ())
    weights = {key: value.clone() for key, value in state.items() if key not in lacks}
    for key in ("base", "gain"):  # what is loaded is not what the constructor gives
        if key in weights:
            weights[key] += 1
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def spec(folder: Path | str, name: str) -> dict[str, Any]:
    """Make a spec that loads such a checkpoint."""
    found: dict[str, Any] = {"model": str(folder), "auto_class": f"computed_tensors:{name}"}
    if name == "Excused":
        found["strict"] = {"allow_missing": list(MISSING[Excused])}
    return found


def reference(folder: Path | str, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the model on the CPU under its dtype, and fill it as torch does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            model = globals()[name](LlamaConfig.from_pretrained(folder))
    finally:
        torch.set_default_dtype(before)
    model.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=False)
    return model


def differences(
    folder: Path | str,
    name: str,
    found: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """List the places in which tensors found in a model differ from the reference's."""
    right = dict(reachable.tensors(reference(folder, name, dtype)))
    return sorted(
        path
        for path in right.keys() | found.keys()
        if not path.startswith("drawn")
        and (path not in right or path not in found or not _same(right[path], found[path]))
    )


def _same(right: torch.Tensor, found: torch.Tensor) -> bool:
    return right.dtype == found.dtype and torch.equal(right, found)
