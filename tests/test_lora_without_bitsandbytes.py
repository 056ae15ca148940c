"""LoRA on plain weights does without bitsandbytes, and whoever wants it later finds it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
from peft.tuners.lora import model as peft_lora
from stacks import needs_bitsandbytes

from llmload import load
from llmload.builtin.lora.without_bitsandbytes import asked_once_imported
from llmload.testing import tiny_llama

LORA = {"r": 2, "target_modules": "all-linear"}


def run(code: str) -> str:
    """Run ``code`` in a process of its own, in which nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_load_of_lora_on_plain_weights_imports_no_bitsandbytes(tmp_path: Path) -> None:
    folder = str(tiny_llama(tmp_path))
    code = f"""
import sys, llmload
llmload.load({{"model": {folder!r}, "lora": {LORA!r}}})
print("peft" in sys.modules, "bitsandbytes" in sys.modules)
"""
    assert run(code).splitlines()[-1] == "True False"


@needs_bitsandbytes
def test_after_it_quantised_layers_are_made_and_adapted_as_ever(tmp_path: Path) -> None:
    folder = str(tiny_llama(tmp_path))
    code = f"""
import sys, llmload
llmload.load({{"model": {folder!r}, "lora": {LORA!r}}})
model = llmload.load({{"model": {folder!r}, "lora": {LORA!r}, "kbit": {{}}}}).model
import bitsandbytes, peft
from peft.tuners.lora.bnb import Linear4bit
print(sum(isinstance(module, Linear4bit) for module in model.modules()))
helper = getattr(peft.helpers, "bnb", bitsandbytes)
print(helper.functional is bitsandbytes.functional, sys.modules["bitsandbytes"] is bitsandbytes)
"""
    layers = load({"model": folder, "lora": LORA}).report.facts["lora"]["targets"]
    assert run(code).splitlines()[-2:] == [str(len(layers)), "True True"]


@needs_bitsandbytes
def test_another_thread_may_import_it_in_the_meantime() -> None:
    code = """
import importlib, importlib.util, sys, threading
from llmload.builtin.lora import without_bitsandbytes as ours
found = []
def elsewhere():
    found.append(importlib.util.find_spec("bitsandbytes").name)
    import bitsandbytes
    stand_in = type(bitsandbytes).__name__
    from bitsandbytes.nn import Linear4bit
    import bitsandbytes.functional
    found.append((stand_in, bitsandbytes.nn.Linear4bit is Linear4bit))
def importing(name):
    if name == "peft":
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    return importlib.import_module(name)
ours.import_module = importing
ours.import_peft()
import bitsandbytes
print(found, type(bitsandbytes).__name__, bitsandbytes.nn.Linear4bit.__name__)
"""
    assert run(code).splitlines()[-1] == ("['bitsandbytes', ('_OnUse', True)] module Linear4bit")


def test_what_peft_asks_is_put_back() -> None:
    asking = peft_lora.is_bnb_available
    assert peft_lora.is_bnb_available is peft.import_utils.is_bnb_available
    with asked_once_imported():
        assert peft_lora.is_bnb_available is not asking
    assert peft_lora.is_bnb_available is asking
