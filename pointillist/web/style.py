"""How the page looks beyond its theme. Colours are the theme's variables, so light and dark both work."""

CSS = """
.hide-container > .html-container:not(.in-group *) { padding-left: 0; padding-right: 0; }
.job-line { display: flex; justify-content: space-between; gap: 1rem; font-variant-numeric: tabular-nums; }
.job-time { color: var(--body-text-color-subdued); }
.job-bar { height: 6px; border-radius: 3px; overflow: hidden; margin: .4rem 0; background: var(--block-border-color); }
.job-bar i { display: block; height: 100%; background: var(--primary-500); transition: width .3s; }
.job-bar i.unknown { width: 30%; animation: job-slide 1.2s infinite alternate ease-in-out; }
@keyframes job-slide { to { transform: translateX(233%); } }
.job-preview { width: 100%; max-height: 480px; object-fit: contain; image-rendering: auto; border-radius: 6px; }
.job-failed { padding: .6rem .8rem; border-radius: 6px; border: 1px solid var(--error-border-color);
  background: var(--error-background-fill); color: var(--error-text-color); }
.job-more, .note { color: var(--body-text-color-subdued); font-size: .85rem; }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; margin: .2rem 0 .5rem; }
.chips span { padding: .1rem .55rem; border-radius: 999px; font-size: .82rem;
  background: var(--background-fill-secondary); border: 1px solid var(--block-border-color);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.chips b { font-weight: 500; color: var(--body-text-color-subdued); }
.steps { display: flex; gap: 2px; height: 12px; margin: .45rem 0 .25rem; }
.steps i { flex: 1; border-radius: 2px; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .9rem; font-size: .8rem; color: var(--body-text-color-subdued); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: .3rem; }
.k-dense { background: #64748b; } .k-sparse { background: #f97316; }
.k-cached { background: #cbd5e1; } .k-region { background: #14b8a6; }
.dark .k-dense { background: #94a3b8; } .dark .k-cached { background: #334155; }
.unfit { font-size: .82rem; color: var(--body-text-color-subdued); padding: 0 .8rem .4rem; }
.banner { display: flex; align-items: baseline; gap: .7rem; flex-wrap: wrap; padding: .2rem 0 .1rem; }
.banner b { font-size: 1.25rem; letter-spacing: -.01em; } .banner span { color: var(--body-text-color-subdued); }
"""
