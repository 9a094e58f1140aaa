"""What every implementation of the port must do: one suite for the embedded cluster and the real API server.

A test module runs it with `from tests.contract.cluster_contract import *` and two fixtures:
`cluster`, a `scheduler.kube.port.Cluster`, and `compact`, an async call after which old page tokens and
resourceVersions have aged (it may skip the test where that cannot be brought about).
"""

from tests.contract.cases_binding import *  # noqa: F403
from tests.contract.cases_notices import *  # noqa: F403
from tests.contract.cases_objects import *  # noqa: F403
from tests.contract.cases_queues import *  # noqa: F403
from tests.contract.cases_reading import *  # noqa: F403
