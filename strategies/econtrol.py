"""EControl: compressed differences to a gradient estimate, with what was not sent fed back at a controlled strength.

Source: Gao, Islamov and Stich, 2024, "EControl: Fast Distributed Optimization with Compression and Error Control",
ICLR, arXiv:2311.05645, algorithm 3. A client with gradient g sends D = C(eta e + g - h), then

    e <- e + g - h - D    (the old h, and no eta),    h <- h + D,

and the server steps along the mean of the clients' h. For any eta and C, v = x - gamma mean e moves as plain SGD does:
v <- v - gamma mean g. eta = 0 is EF21. The clients' rule is `fedcore.strategies.feedback_rule.respond`.
"""
from dataclasses import replace

from fedcore.compression.base import Codec
from fedcore.strategies.error_feedback import ErrorFeedback, Spec
from fedcore.strategies.feedback_rule import Rule
from fedcore.strategies.settings import check_number


class EControl(ErrorFeedback):
    """Compressed gradients that converge on uneven data and with small batches.

    The paper's theory has eta = contraction / 400, which is timid: eta = contraction is the default here, and
    with much larger values runs may diverge.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        feedback: eta, in [0, 1]; None takes the compressor's contraction; 0 is EF21.
        init: h_0 of a client: `full` its first gradient, sent uncompressed once; `compressed` the same, compressed;
            `zero`.
        server_momentum: in [0, 1); the paper has none.
        schedule: of the step size, by round: a registered schedule, such as `{name: cosine, total_steps: 500}`; e is in
            units of the gradient, so it needs no rescaling. None: the step size is constant.
        downlink: what clients are sent: `full` the model; `sparse` its change, compressed as their answers are; or the
            settings of a compressor for that. The paper has `full`.
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: Spec = "top_k", feedback: float | None = None, init: str = "full",
        server_momentum: float = 0.0, schedule: Spec | None = None, downlink: Spec = "full",
    ):
        if feedback is not None:
            advice = "The compressor's contraction is a good start: for top_k its fraction."
            check_number("feedback", feedback, at_least=0, at_most=1, advice=advice)
        rule = Rule(feedback=feedback, estimates=True)
        super().__init__(rule, server_lr, compressor, init, server_momentum, schedule, downlink)

    def rule_for(self, codec: Codec) -> Rule:
        return self.rule if self.rule.feedback is not None else replace(self.rule, feedback=codec.contraction)
