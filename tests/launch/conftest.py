import pytest
from fakes import Fakes


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "bin")
