"""`make bench`, or `python -m bench [PART …]`: run the parts and print what they found."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import hostile, small_get, startup

PARTS = {"startup": startup.run, "small-get": small_get.run, "hostile": hostile.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="only show that the harness works")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    results = {}
    for part in arguments.parts or PARTS:
        print(f"== {part}", flush=True)
        found = PARTS[part](short=arguments.short)
        results[part] = found
        for key, value in found.items():
            print(f"{key:<58} {value}")
    out = Path("bench/results/latest.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
