"""One file per model family: where its self-attention is, its token grid, its presets."""
