"""``nox`` installs the package in an environment of its own and runs its tests."""

import nox


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, against the built package."""
    session.install(".", *nox.project.dependency_groups(nox.project.load_toml(), "test"))
    session.run("pytest", *session.posargs)
