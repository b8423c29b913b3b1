import pytest

import problems


@pytest.fixture(autouse=True)
def double_precision():
    with problems.enable_x64(), problems.relaxed_promotion():
        yield
