"""What a budget promises, in words for whoever has to answer for the records."""
import math

from scipy.special import ndtr

from fedcore.privacy.accounting import mu_of
from fedcore.privacy.mechanism import CENTRAL, REPLACE_ONE

RELATIONS = {
    REPLACE_ONE: "one record of one client is replaced by any other (replace-one)",
    "add-remove": "one record of one client is there or is left out, the number of records counting as public "
                  "(add-remove)",
}
ADVERSARIES = {
    "local": "everybody, the server included: each client adds its noise before anything leaves it",
    CENTRAL: "everybody but the server, which sees every client's vector without noise and adds the noise itself",
}
NOT_PROTECTED = (
    "How many records each client has, the features' scaling and the settings count as public. All records of one "
    "person are protected together only as far as they are one record: with k records of a person the guarantee for "
    "the person is weaker. Trying settings out on the same records spends more than is shown here."
)


def guess_rate(epsilon: float, delta: float, sampled: bool) -> float:
    """Return how often the best attacker is right who has to tell two equally likely versions of a record apart.

    Args:
        sampled: whether releases were about samples: the bound is then that of any mechanism with this epsilon.

    Source: Dong, Roth and Su, 2022, arXiv:1905.02383, section 2.2; Kairouz, Oh and Viswanath, 2015, arXiv:1311.0776.
    """
    if sampled:
        # Errors of both kinds add up to at least 2 (1 - delta)/(1 + e^epsilon).
        return 1 - (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))
    return float(ndtr(mu_of(epsilon, delta) / 2)) if epsilon > 0 else (1 + delta) / 2


def meaning(epsilon: float, delta: float, sampled: bool = False) -> str:
    """Return what epsilon and delta allow an attacker."""
    return (f"Suppose somebody knows everything that was published and every other record, and has to tell which of "
            f"two equally likely versions of one record was used. Without looking they are right 50 % of the time; "
            f"with everything that this run releases at most {100 * guess_rate(epsilon, delta, sampled):.1f} %.")
