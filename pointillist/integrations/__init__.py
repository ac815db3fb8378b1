"""Plug-in points of other engines: one pattern at one density in their self-attention. Plans are for Diffusers."""
