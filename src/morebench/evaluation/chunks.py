"""Which questions are answered together: a function of the questions alone. No torch.

A prompt has two pieces, cut after its last visual token: the *prefix* and the question. Prompts whose
prefixes have the same ids and images form a *group*, and the prefix is computed once for all of it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from morebench.data.chat import Encoded
from morebench.evaluation.items import StoredImage


@dataclass(frozen=True)
class Request:
    """`images`: one per image of the prompt, in order."""

    prompt: Encoded
    images: tuple[StoredImage, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Group:
    """Requests, by their places, that share the first `prefix_length` tokens; with 0 there is only one."""

    rows: tuple[int, ...]
    prefix_length: int


def prefix_length(request: Request) -> int:
    """Tokens up to the last visual one, if a question follows it."""
    visual = request.prompt.visual_mask.nonzero()[0]
    length = int(visual[-1]) + 1 if len(visual) else 0
    return length if length < len(request.prompt.input_ids) else 0


def groups_of(requests: Sequence[Request], shared: Callable[[Request], int] = prefix_length) -> list[Group]:
    """In the order of their first request. `shared`: how much of a prompt may be shared."""
    found: dict[Hashable, list[int]] = {}
    lengths = [shared(request) for request in requests]
    for place, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        ids, visual = (
            request.prompt.input_ids[:length].tobytes(),
            request.prompt.visual_mask[:length].tobytes(),
        )
        keys = tuple(image.key for image in request.images)
        found.setdefault((ids, visual, keys) if length else place, []).append(place)
    return [Group(tuple(rows), lengths[rows[0]]) for rows in found.values()]


def plan_chunks(
    requests: Sequence[Request], batch_size: int, max_positions: int | None = None
) -> list[list[int]]:
    """Places in `requests` of what is answered together, the longest first: out of memory shows at once.

    Up to `batch_size` requests a chunk, whose cache has up to `max_positions` positions even if every answer
    becomes as long as it may (a single group is never refused). A group lies in one chunk if it fits.
    The same requests ride together on any number of devices and after any resume.
    """
    pieces = [piece for group in groups_of(requests) for piece in _pieces(group, batch_size)]
    sizes = [most_positions(requests, piece) for piece in pieces]
    chunks: list[list[int]] = []
    num_groups = longest = 0
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        rows = pieces[i].rows
        fits = (
            bool(chunks)
            and len(chunks[-1]) + len(rows) <= batch_size
            # every group takes as much of the cache as the longest
            and (max_positions is None or (num_groups + 1) * longest <= max_positions)
        )
        if not fits:
            chunks.append([])
            num_groups, longest = 0, sizes[i]
        chunks[-1] += rows
        num_groups += 1
    return chunks


def most_positions(requests: Sequence[Request], group: Group) -> int:
    """Positions of the cache once every answer is as long as it may become."""
    shared = group.prefix_length
    return shared + sum(
        len(requests[i].prompt.input_ids) - shared + requests[i].max_new_tokens for i in group.rows
    )


def _pieces(group: Group, batch_size: int) -> list[Group]:
    """The group, or equal parts of it."""
    num_rows = len(group.rows)
    count = -(-num_rows // batch_size)
    borders = [n * num_rows // count for n in range(count + 1)]
    return [Group(group.rows[start:end], group.prefix_length) for start, end in pairwise(borders)]
