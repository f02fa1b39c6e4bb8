"""Page: the frame and the looks of every HTML page, in one file that needs no network.

Light and dark follow the reader's system. The series' colours are those of Okabe and Ito, which
people with any kind of colour blindness tell apart, lightened for the dark scheme.
"""

from __future__ import annotations

import time

from server.markup import Markup, element, join

_STYLE = Markup(
    """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#596270;
--line:#dfe3e8;--quiet:#9aa3af;--ok:#00694b;--warn:#a34700;
--c0:#0072b2;--c1:#c75300;--c2:#00875f;--c3:#a8508a;--c4:#9a6b00;--c5:#2b8fc4;--c6:#5b3f99;
--c7:#3c4650}
@media (prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#181c22;--text:#e6e9ed;
--soft:#a3adba;--line:#2d343d;--quiet:#68727f;--ok:#4cd3a5;--warn:#ff9f5c;
--c0:#56b4e9;--c1:#ff8a3d;--c2:#34d1a0;--c3:#e29bc9;--c4:#eac04a;--c5:#9ad7ff;--c6:#b9a2f5;
--c7:#cdd4dc}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);line-height:1.5;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:36px 0 4px}
p{margin:4px 0 10px;max-width:75ch;overflow-wrap:anywhere}
.soft{color:var(--soft)}
.status{display:inline-block;padding:1px 10px;margin-right:8px;border:1px solid;
border-radius:99px;font-weight:600;font-size:.9rem}
.finished,.running{color:var(--ok)}.failed,.stopped,.cut{color:var(--warn)}
.tiles{display:grid;gap:10px;margin:18px 0 0;padding:0;
grid-template-columns:repeat(auto-fill,minmax(158px,1fr))}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:10px 14px}
.tiles dt{color:var(--soft);font-size:.82rem;line-height:1.3}
.tiles dd{margin:2px 0 0;font-size:1.08rem;font-weight:600;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.charts{display:grid;gap:14px;margin:10px 0;
grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
figure{margin:0;padding:12px 14px;background:var(--card);border:1px solid var(--line);
border-radius:10px;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:6px;overflow-wrap:anywhere}
figure>svg{display:block;width:100%;height:auto}
svg text{fill:var(--text);font-size:13px}svg .tick,svg .axis{fill:var(--soft)}
.tick{font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.mark{fill:var(--c);stroke:var(--card);stroke-width:1}.bar{fill:var(--c)}
.quiet .line{stroke:var(--quiet);stroke-width:1;opacity:.65}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:8px 0 0;padding:0;
font-size:.85rem}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.legend svg{width:22px;height:14px;flex:none}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);
border-radius:10px;margin:10px 0}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:7px 12px;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600;min-width:9em}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
td{min-width:3.5em}.best{color:var(--ok);font-weight:700}
.heat{margin:-3px -8px;padding:3px 8px;border-radius:4px;
background:color-mix(in srgb,var(--c0) calc(var(--share)*60%),transparent)}
details{margin:10px 0}summary{cursor:pointer;padding:4px 0}
"""
    + "".join(f".s{n}{{--c:var(--c{n})}}" for n in range(8))
)


def render_page(
    title: str, body: Markup, *, refresh_seconds: int | None = None, now: float | None = None
) -> str:
    """One self-contained page.

    Args:
        title: its name in a browser's tab.
        body: what it shows.
        refresh_seconds: it loads itself anew so often; None where nothing will change any more.
        now: when it is written, in seconds since 1970; None is now.
    """
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
    again = f" It loads itself anew every {refresh_seconds} s." if refresh_seconds else ""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing may be loaded or run, even if a text ever got through as markup.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'",
        ),
        *([element("meta", http_equiv="refresh", content=refresh_seconds)] if again else []),
        element("title", title),
        element("style", _STYLE),
    )
    foot = element("p", f"Written {written} UTC.{again}", class_="soft")
    main = element("main", body, element("footer", foot))
    return "<!doctype html>\n" + element("html", head, element("body", main), lang="en") + "\n"


def section(heading: str, *parts: Markup | str) -> Markup:
    """A heading and what is under it; a plain text is a paragraph. Nothing if nothing is."""
    kept = [part if isinstance(part, Markup) else element("p", part) for part in parts if part]
    if not kept:
        return Markup("")
    return element("section", element("h2", heading), *kept)


def charts(*pictures: Markup | None) -> Markup:
    """Pictures beside each other, as many as there is room for."""
    kept = [picture for picture in pictures if picture]
    return element("div", *kept, class_="charts") if kept else Markup("")


def tiles(facts: dict[str, str]) -> Markup:
    """The figures that one looks for first."""
    pairs = (
        element("div", element("dt", name), element("dd", value)) for name, value in facts.items()
    )
    return element("dl", join(pairs), class_="tiles")
