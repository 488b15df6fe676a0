"""Run programs of third-party clients, as their users write them, against a real server.

Each program in `programs` is a test file that runs in an environment of its own
(`environments.py`). Its tests check forms: types, parsed objects, streams, errors. They run twice:
with decided tokens (`decided.py`), which takes seconds, and with the coder model. What the model
chooses is counted and listed at the end.
"""

import os

import pytest

from tests.clients.conftest import CODER
from tests.clients.environments import PROGRAMS, run_program
from tests.serve import client_fields

pytestmark = pytest.mark.clients

KNOWN_FIELDS = {name for fields in client_fields.FIELDS.values() for name in fields.split()}


@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("client_*.*")), ids=lambda path: path.name)
def test_program_of_client_passes(program, server_url, exchanges, choices, request):
    before = len(exchanges)
    is_coder = "coder" in request.node.callspec.params["server_url"]
    done = run_program(
        program,
        {
            "CLIENT_BASE_URL": f"{server_url}/v1",
            "CLIENT_MODEL": CODER,
            "CLIENT_CHOICES": str(choices) if is_coder else os.devnull,
        },
    )
    own = exchanges[before:]
    print(done.stdout, *own, sep="\n")  # of a test that fails
    assert done.returncode == 0

    # Nothing that a client sends is refused for its name, and the list of names is complete.
    assert own
    codes = {exchange.error_code for exchange in own}
    assert not codes & {"unknown_parameter", "unsupported_parameter"}
    assert {name for exchange in own for name in exchange.fields} <= KNOWN_FIELDS
