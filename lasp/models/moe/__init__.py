"""Mixture-of-experts layers."""

from lasp.models.moe.balance import ExpertBalance
from lasp.models.moe.layer import Experts, MixtureOfExperts, mix
from lasp.models.moe.router import Router, Routing

__all__ = ["ExpertBalance", "Experts", "MixtureOfExperts", "Router", "Routing", "mix"]
