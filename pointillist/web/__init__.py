"""The web UI: one file for each tab, drawn into one page by `app.py`. What is computed is the engine's to say."""
