"""What happens inside a running transformer: plans carried out in an unmodified Diffusers pipeline."""
