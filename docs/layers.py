"""A picture of the layers of gptjax, made from the imports of its modules."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "gptjax"
BASE = "base"  # the modules at the top level that import no package
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 52, 24, 44, 10


def layers() -> list[list[str]]:
    """The packages from the lowest layer to the highest; each imports only from lower layers."""
    graph = package_graph()
    result: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(graph):
        ready = sorted(name for name, needs in graph.items() if name not in done and needs <= done)
        if not ready:
            raise ValueError(f"the imports have a cycle among {sorted(graph.keys() - done)}")
        result.append(ready)
        done |= set(ready)
    return result


@functools.cache
def package_graph() -> dict[str, set[str]]:
    """Package -> the packages that it imports. `base` stands for the modules that import no package."""
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name not in ("__init__", "__main__"):
            graph.setdefault(name, set()).update(_imports(path) - {name})
    is_package = {name: (PACKAGE / name).is_dir() for name in graph}
    base = {name for name in graph if not is_package[name]}
    while higher := {name for name in base if graph[name] - base}:
        base -= higher
    renamed = {name: BASE if name in base else name for name in graph}
    merged: dict[str, set[str]] = {}
    for name, needs in graph.items():
        merged.setdefault(renamed[name], set()).update(renamed[n] for n in needs if n in renamed)
    return {name: needs - {name} for name, needs in merged.items()}


def base_modules() -> list[str]:
    """The modules that `base` stands for."""
    named = set(package_graph())
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return sorted(files - named)


def svg() -> str:
    """The picture: the highest layer at the top; an arrow is an import that no other arrow implies."""
    graph, rows = package_graph(), layers()
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (BOX_WIDTH + GAP_X) + GAP_X) / 2
        y = height - MARGIN - BOX_HEIGHT - number * (BOX_HEIGHT + GAP_Y)
        for column, name in enumerate(row):
            place[name] = (left + column * (BOX_WIDTH + GAP_X), y)
    parts = [_arrow(place[name], place[below]) for name in graph for below in sorted(_direct(graph, name))]
    parts += [_box(name, *place[name]) for name in place]
    head = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>'
    )
    return (
        f'<svg class="layers" role="img" aria-label="The layers of gptjax" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {width} {height}">{head}{"".join(parts)}</svg>'
    )


def _imports(path: Path) -> set[str]:
    """The first name below gptjax of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("gptjax.")}


def _direct(graph: dict[str, set[str]], name: str) -> set[str]:
    """The imports of a package that do not follow from its other imports."""
    implied: set[str] = set()
    for below in graph[name]:
        implied |= _reachable(graph, below)
    return graph[name] - implied


def _reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    found: set[str] = set()
    for below in graph[name]:
        found |= {below} | _reachable(graph, below)
    return found


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT, end[0] + BOX_WIDTH / 2, end[1]
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-opacity=".55" '
        'marker-end="url(#arrow)"/>'
    )


def _box(name: str, x: float, y: float) -> str:
    if name == BASE:
        caption = f"{len(base_modules())} modules"
    elif (PACKAGE / name).is_dir():
        files = [path for path in (PACKAGE / name).rglob("*.py") if (path.parent / "__init__.py").exists()]
        caption = f"{len(files)} modules"
    else:
        caption = "1 module"
    middle = x + BOX_WIDTH / 2
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#5c6bc0" fill-opacity=".16" '
        f'stroke="#5c6bc0"/><text x="{middle}" y="{y + 23}" text-anchor="middle" font-size="15" font-weight="600" '
        f'fill="currentColor">{name}</text><text x="{middle}" y="{y + 41}" text-anchor="middle" font-size="12" '
        f'fill="currentColor" fill-opacity=".75">{caption}</text>'
    )
