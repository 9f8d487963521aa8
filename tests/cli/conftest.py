"""Commands as a user types them."""

from collections.abc import Callable

import pytest

from laser_fast.cli import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, which must end with `status`: 0, or 2 for the error it tells."""

    def run(*arguments: object, status: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run
