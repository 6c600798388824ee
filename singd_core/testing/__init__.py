"""The laws of a structure, to test a new one: see docs/new_structure.md.

`check_structure(S)` checks all laws and returns a report. `@laws(S)` makes a pytest case of each.
`python -m singd_core.testing package.module:Name` prints a table; a structure with parameters is
`package.module:factory:2,3`. With SINGD_LAWS=nightly in the environment they try 25 times as many
examples, and more and larger sizes. They draw examples with hypothesis, which
pip install '.[testing]' in a checkout brings.
"""

# The table shows the laws in this order.
import singd_core.testing.laws_space  # isort: skip
import singd_core.testing.laws_products  # isort: skip
import singd_core.testing.laws_arrays  # isort: skip
import singd_core.testing.laws_storage  # isort: skip
import singd_core.testing.laws_update  # isort: skip
import singd_core.testing.laws_optimizer  # isort: skip
import singd_core.testing.laws_gradients  # isort: skip
import singd_core.testing.laws_jax  # isort: skip
import singd_core.testing.laws_torch  # isort: skip # noqa: F401

from singd_core.testing.backends import Backend, backends
from singd_core.testing.cases import laws
from singd_core.testing.host_sync import no_host_sync
from singd_core.testing.law import LAWS, Law, LawError
from singd_core.testing.report import Report, check_structure

__all__ = [
    "LAWS",
    "Backend",
    "Law",
    "LawError",
    "Report",
    "backends",
    "check_structure",
    "laws",
    "no_host_sync",
]
