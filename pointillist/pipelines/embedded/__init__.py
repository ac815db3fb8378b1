"""The text-to-video model that ships with Pointillist: its weights and the words it knows."""

from pathlib import Path

EMBEDDED_FOLDER = Path(__file__).parent / "model"
