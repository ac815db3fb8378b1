"""What happens inside a running transformer: plans carried out in an unmodified Diffusers pipeline."""

from pointillist.accel.accelerate import Acceleration, accelerate
from pointillist.accel.conflicts import AccelerateError
from pointillist.accel.plan import Plan, PlanError
from pointillist.accel.report import Report

__all__ = ["AccelerateError", "Acceleration", "Plan", "PlanError", "Report", "accelerate"]
