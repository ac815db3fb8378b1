"""Shipped plans: one JSON file each, the same object that a plan file carries in its metadata."""
