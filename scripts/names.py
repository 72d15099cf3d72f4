#!/usr/bin/env python3
"""Prints how many exported types share their name with types of other files.

A type is exported if it is `pub` in any form. It shares its name if two or more
other files of src/ have a type of that name. Types in tests and in functions are
left out.

    scripts/names.py            prints the figures
    scripts/names.py --list     also prints the names, with their files
"""

import collections
import pathlib
import re
import sys

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "src"
TYPE = re.compile(r"^(pub(?:\([^)]*\))? )?(?:unsafe )?(?:struct|enum|trait|union|type) (\w+)", re.M)


def main() -> int:
    files = collections.defaultdict(set)
    types = []
    for path in sorted(SOURCE.rglob("*.rs")):
        if path.name == "tests.rs":
            continue
        text = path.read_text().split("#[cfg(test)]\nmod tests {")[0]
        for match in TYPE.finditer(text):
            name = str(path.relative_to(SOURCE))
            files[match.group(2)].add(name)
            types.append((match.group(2), name, bool(match.group(1))))
    exported = [one for one in types if one[2]]

    def shared(some):
        return [one for one in some if len(files[one[0]]) >= 3]

    for what, some in (("exported types", exported), ("all types", types)):
        n = len(shared(some))
        print(f"{what}: {n} of {len(some)} share their name ({100 * n / len(some):.1f} %)")
    if "--list" in sys.argv:
        for name in sorted({one[0] for one in shared(types)}):
            print(f"{name}: {', '.join(sorted(files[name]))}")
        twice = sorted(name for name in {o[0] for o in exported} if len(files[name]) == 2)
        print("in two files:")
        for name in twice:
            print(f"  {name}: {', '.join(sorted(files[name]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
