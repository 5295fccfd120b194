import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir():
    """The folder of shared data sets; a test that needs it is skipped, with the reason, where it is absent."""
    path = Path(os.environ.get("OPENEMBED_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.exists():
        pytest.skip(f"{path} is absent: set OPENEMBED_SHARED to the folder of shared data sets")
    return path
