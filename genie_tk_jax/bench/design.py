"""The longest design that fits: gradients through a whole trunk, by XLA's analysis of its memory.

Nothing runs. Each program is compiled, without autotuning, for the sizes that a guess asks for: of
a trunk that needs a n^2 + b n^3 bytes, which the two sizes nearest to the limit tell.

Rows, one for each contestant: contestant, blocks, msa, dtype, limit_bytes, status, reason; n and
peak_bytes of the longest that fits; next_n and next_bytes of the shortest seen that does not.
Status is "ok" if these are one step apart; "at least" if the time ran out before that.
"""

from collections.abc import Iterator
from typing import Any

import jax

from genie_tk_jax.bench import judge, timing, trunk

# Sizes are multiples of STEP; the first two to try tell how memory grows.
STEP = 64
PROBES = (512, 1024)
LARGEST = 16384


def longest(options: Any, compiler: Any) -> Iterator[dict[str, Any]]:
    """One row for each contestant that is not chunked.

    Args:
      options, compiler: alphafold.Options and alphafold.Compiler.
    """
    limit = _limit(options)
    if not options.design_blocks or limit is None:
        return
    searches = {}
    for name in options.contestants:
        if not trunk.VARIANTS[name].chunked:
            sizes: dict[int, int] = {}
            searches[name] = (sizes, search(sizes, limit))
    reasons = dict.fromkeys(searches, "")
    while asked := _asked(searches, reasons):
        # All contestants' programs compile at the same time.
        futures = {name: _start(options, compiler, name, n) for name, n in asked.items()}
        for name, future in futures.items():
            sizes, _ = searches[name]
            try:
                sizes[asked[name]] = timing.peak_bytes(compiler.finish(future).program) or 0
            except TimeoutError:
                reasons[name] = "the time that the run was given is spent"
            except Exception as error:
                reasons[name] = ": ".join(judge.failure(error))
    for name, (sizes, _) in searches.items():
        yield _row(options, name, sizes, limit, reasons[name])


def _limit(options: Any) -> int | None:
    if options.memory is not None:
        return int(options.memory * 2**30)
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _start(options: Any, compiler: Any, name: str, n: int) -> Any:
    shapes = trunk.shapes(options.design_blocks, n, options.design_msa, options.dtype)
    return compiler.start(name, options.dtype, "fwd+bwd", shapes, **timing.UNTUNED)


def _asked(searches: dict, reasons: dict[str, str]) -> dict[str, int]:
    """The size that each search which goes on wants next."""
    asked = {}
    for name, (_, sizes) in searches.items():
        n = None if reasons[name] else next(sizes, None)
        if n is not None:
            asked[name] = n
    return asked


def search(sizes: dict[int, int], limit: int) -> Iterator[int]:
    """Yields sizes to measure until two of them, one step apart, lie on either side of `limit`.

    Args:
      sizes: bytes by size; whoever iterates puts in each size that was yielded.
    """
    yield from PROBES
    while True:
        fitting, too_large = bracket(sizes, limit)
        low, high = fitting or 0, too_large or LARGEST
        if high - low <= STEP:
            return
        yield max(low + STEP, min(high - STEP, _guess(sizes, limit)))


def bracket(sizes: dict[int, int], limit: int) -> tuple[int | None, int | None]:
    """The longest that fits and the shortest that does not."""
    fitting = [n for n, size in sizes.items() if size <= limit]
    too_large = [n for n, size in sizes.items() if size > limit]
    return max(fitting, default=None), min(too_large, default=None)


def _guess(sizes: dict[int, int], limit: int) -> int:
    """The longest that should fit, were memory a n^2 + b n^3 through the two nearest sizes.

    At most twice the longest that was measured, so that a poor guess costs little.
    """
    m, n = sorted(sizes, key=lambda n: abs(sizes[n] - limit))[:2]
    b = max(0.0, (sizes[n] / n**2 - sizes[m] / m**2) / (n - m))
    a = sizes[m] / m**2 - b * m
    candidates = range(STEP, 2 * max(sizes) + STEP, STEP)
    return max((k for k in candidates if (a + b * k) * k**2 <= limit), default=STEP)


def _row(options: Any, name: str, sizes: dict[int, int], limit: int, reason: str) -> dict[str, Any]:
    fitting, too_large = bracket(sizes, limit)
    closed = fitting and too_large and too_large - fitting <= STEP
    return {
        "contestant": name,
        "blocks": options.design_blocks,
        "msa": options.design_msa,
        "dtype": options.dtype,
        "limit_bytes": limit,
        "status": "ok" if closed else "at least",
        "reason": reason,
        "n": fitting,
        "peak_bytes": fitting and sizes[fitting],
        "next_n": too_large,
        "next_bytes": too_large and sizes[too_large],
    }
