"""trivet report: write a self-contained HTML file about one run or several, which opens from
disk.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from trivet.errors import InputError
from trivet.report.compare import place_of, runs_in
from trivet.report.gather import gather

PARTS = Path(__file__).parent / "page"
# the files of the page's script, in the order in which page_script joins them
SCRIPTS = ("base", "charts", "overview", "curves", "samples", "tokens", "cost", "render")
HELP = """trivet report RUN [RUN ...] [--out FILE.html]

Write one page about one run, or several side by side: what was run, warnings, the comparison,
samples, curves, the token view and cost. It is a single file that works offline. RUN is a run
directory or a folder of run directories (runs/quickstart). Runs may be unfinished or stopped.

--out FILE.html   Output file. Default: RUN/report.html; for all runs of a folder,
                  FOLDER/report.html; for any other set of runs, a file with their names, such as
                  runs/report-grpo-ppo.html"""


def report(args: list[str]) -> None:
    """Write the page and print its path and size."""
    if not args or {"-h", "--help"} & set(args):
        print(HELP)
        return
    from trivet.arguments import read_flags

    flags = next((i for i, arg in enumerate(args) if arg.startswith("--")), len(args))
    if not flags:
        raise InputError(
            "name a run directory first: trivet report RUN [RUN ...] [--out FILE.html]"
        )
    options = read_flags(type("Options", (), {"__annotations__": {"out": str}}), args[flags:])
    runs = list(dict.fromkeys(run for arg in args[:flags] for run in runs_in(Path(arg))))
    out = write_page(runs, Path(options.get("out", f"{place_of(runs, 'report')}.html")))
    print(f"{out}  ·  {out.stat().st_size / 1e6:.1f} MB")


def write_page(runs: list[Path], out: Path) -> Path:
    """Write the page about these runs to a file and return its path."""
    page = build_page(gather(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def build_page(payload: dict[str, Any], *, live: bool = False) -> str:
    """Build one HTML page from gather's payload. live: the page polls data.json next to it for a
    new payload every two seconds.

    The page's policy allows only the scripts it was built with, identified by their hashes: no
    network (but data.json, if live), no inline handlers.
    """
    scripts = {
        name: (PARTS / name).read_text("utf-8")
        for name in ("vendor/d3.min.js", "vendor/plot.umd.min.js")
    }
    scripts["script"] = page_script()
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in scripts.values()
    ]
    policy = "default-src 'none'; script-src " + " ".join(f"'sha256-{digest}'" for digest in hashes)
    policy += "; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    names = ", ".join(run["name"] for run in payload["runs"])
    slots = {
        "policy": policy + ("; connect-src 'self'" if live else ""),
        "title": names.translate({ord(c): f"&#{ord(c)};" for c in "<>&\"'"}),
        "live": "live" if live else "",
        "css": (PARTS / "page.css").read_text("utf-8"),
        "data": as_json(payload),
        "licenses": "\n".join(
            (PARTS / f"vendor/{name}.LICENSE").read_text("utf-8") for name in ("d3", "plot")
        ),
        **scripts,
    }
    return re.sub(
        r"\{\{(\S+?)\}\}", lambda slot: slots[slot[1]], (PARTS / "page.html").read_text("utf-8")
    )


def page_script() -> str:
    """Join the page's script files into one script, in the scope of one function; the only global
    they leave is window.trivet.
    """
    files = "\n".join((PARTS / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{files}}})();\n'


def as_json(payload: dict[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII, without the characters that could end
    it.
    """
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
