"""The style sheet of the page: phone first, dark where the reader's system is, nothing said by colour alone."""

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --line: #c9c9c9; --soft: #f3f4f5; --link: #0a5878; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e9e9e9; --back: #15171a; --line: #4a4f55; --soft: #22262b; --link: #8accf0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; } h4 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
a { color: var(--link); } nav ul { padding-left: 1.2rem; columns: 16rem; }
nav a { display: inline-block; padding: 0.2rem 0; min-height: 24px; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
thead th { background: var(--soft); } thead th:first-child { background: var(--soft); }
figure { margin: 1rem 0; max-width: 40rem; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
@media (prefers-color-scheme: dark) { figure svg { filter: invert(0.91) hue-rotate(180deg); } }
figcaption { font-size: 0.875rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; padding: 0; }
.gallery > li { list-style: none; border: 1px solid var(--line); padding: 0.6rem; min-width: 0; }
.gallery > li > img { width: 100%; height: 11rem; object-fit: contain; background: #ffffff; }
.gallery p { margin: 0.4rem 0; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.5rem; padding: 0; }
.maps li { list-style: none; } .maps img { width: 100%; display: block; }
.maps p { font-size: 0.8125rem; line-height: 1.3; } .looked { font-size: 0.875rem; }
details caption { text-align: left; padding: 0.6rem 0 0.2rem; }
dl { display: grid; grid-template-columns: fit-content(60%) 1fr; gap: 0.15rem 0.8rem; margin: 0.4rem 0 0;
  font-size: 0.875rem; } dt, dd { margin: 0; min-width: 0; } dd { font-weight: 600; }
summary { cursor: pointer; min-height: 24px; }
@media print { nav { display: none; } .scroll { overflow: visible; } }
"""
