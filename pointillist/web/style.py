"""How the page looks beyond its theme. Colours are the theme's variables, so light and dark both work."""

CSS = """
.job-line { display: flex; justify-content: space-between; gap: 1rem; font-variant-numeric: tabular-nums; }
.job-time { color: var(--body-text-color-subdued); }
.job-bar { height: 6px; border-radius: 3px; overflow: hidden; margin: .4rem 0; background: var(--block-border-color); }
.job-bar i { display: block; height: 100%; background: var(--primary-500); transition: width .3s; }
.job-bar i.unknown { width: 30%; animation: job-slide 1.2s infinite alternate ease-in-out; }
@keyframes job-slide { to { transform: translateX(233%); } }
.job-preview { width: 100%; max-height: 480px; object-fit: contain; image-rendering: auto; border-radius: 6px; }
.job-failed { padding: .6rem .8rem; border-radius: 6px; border: 1px solid var(--error-border-color);
  background: var(--error-background-fill); color: var(--error-text-color); }
"""
