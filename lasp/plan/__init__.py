"""What fits: memory and time of a training step, predicted, and the settings that make the best of the GPUs."""

from lasp.plan.gpus import GPUS, named, of_device
from lasp.plan.search import Plan, advice, best, plan, recomputation
from lasp.plan.setting import Job, Setting, job_of

__all__ = [
    "GPUS",
    "Job",
    "Plan",
    "Setting",
    "advice",
    "best",
    "job_of",
    "named",
    "of_device",
    "plan",
    "recomputation",
]
