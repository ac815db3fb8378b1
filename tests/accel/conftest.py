"""The families' tiny pipelines."""

import pytest

from families import PIPELINES, Family


@pytest.fixture(params=PIPELINES)
def family(request):
    return Family(request.param)
