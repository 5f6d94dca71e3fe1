"""Differential privacy: what a release costs, how much noise a budget asks for, and the ledger of what was spent."""
