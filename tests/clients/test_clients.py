"""Run programs of third-party clients, as their users write them, against a real server.

Each program in `programs` is a test file that runs in an environment of its own
(`environments.py`). Its tests check forms: types, parsed objects, streams, errors. What the model
chooses is counted and listed at the end.
"""

import pytest

from tests.clients.conftest import CODER
from tests.clients.environments import PROGRAMS, run_program
from tests.serve import client_fields

pytestmark = pytest.mark.clients

KNOWN_FIELDS = {name for fields in client_fields.FIELDS.values() for name in fields.split()}


@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("client_*.*")), ids=lambda path: path.name)
def test_program_of_client_passes(program, coder_url, exchanges, choices):
    before = len(exchanges)
    done = run_program(
        program,
        {
            "CLIENT_BASE_URL": f"{coder_url}/v1",
            "CLIENT_MODEL": CODER,
            "CLIENT_CHOICES": str(choices),
        },
    )
    print(done.stdout)
    own = exchanges[before:]
    for exchange in own:
        print(exchange)
    assert done.returncode == 0

    # Nothing that a client sends is refused for its name, and the list of names is complete.
    assert own
    codes = {exchange.error_code for exchange in own}
    assert not codes & {"unknown_parameter", "unsupported_parameter"}
    assert {name for exchange in own for name in exchange.fields} <= KNOWN_FIELDS
