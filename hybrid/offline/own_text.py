"""Text that a model continued itself: what its predictors meet in an answer, which a corpus is not quite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

import numpy as np

from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import InputError
from profiler.common.progress import Progress
from profiler.corpus import TokenWindows

# Of prompts int64 [n, p], a length, a seed, and what is told of tokens as they are made: texts int64 [n, length].
Writer = Callable[[np.ndarray, int, int, Callable[[int], None]], np.ndarray]

_KIND = "partial own text"
_PROMPT_SHARE = 8  # one in so many of a window's tokens are the corpus's
_GROUP = 16  # windows between which what was made can be kept
_SAVE_SECONDS = 300.0  # after so long what was made is kept, once a group is done


def own_windows(
    corpus: TokenWindows, count: int, write: Writer, seed: int, path: Path, profile: ArtifactHeader, progress: Progress
) -> TokenWindows:
    """`count` windows that begin as the first of `corpus` do, for the `profile` of this header.

    A token belongs to the document that the window's prompt ends with. When interrupted, and now and then, what was
    made is kept in the file `path`, and a later call for the same profile goes on from there; the caller removes it.
    """
    window = corpus.tokens.shape[1]
    known = max(1, window // _PROMPT_SHARE)
    header = ArtifactHeader(_KIND, profile.model_fingerprint, profile.made_from)
    texts = _kept(path, header, window)[:count]
    done, saved, made = len(texts), monotonic(), window - known
    with progress("own text", count * made, "token", done * made) as advance:
        try:
            for start in range(done, count, _GROUP):
                prompts = corpus.tokens[start : min(start + _GROUP, count), :known]
                texts = np.concatenate([texts, write(prompts, window, seed + start, advance)])
                if monotonic() - saved > _SAVE_SECONDS:
                    write_tensors(path, header, {"texts": texts.astype(np.int32)})
                    saved = monotonic()
        except KeyboardInterrupt:
            if not len(texts):
                raise
            write_tensors(path, header, {"texts": texts.astype(np.int32)})
            raise KeyboardInterrupt(f"{len(texts)} of {count} texts are kept, run it again to go on") from None
    owners = corpus.documents[:count].copy()
    owners[:, known:] = owners[:, known - 1 : known]
    return TokenWindows(texts, owners)


def _kept(path: Path, header: ArtifactHeader, window: int) -> np.ndarray:
    """The texts int64 [n, window] that `path` holds for this profile; none where it holds no such."""
    try:
        found, tensors = read_tensors(path, _KIND, header.model_fingerprint, "hybrid profile")
        if found == header and tensors["texts"].shape[1:] == (window,):
            return tensors["texts"].astype(np.int64)
    except (InputError, KeyError):
        pass  # missing, of another model, or damaged: it only saves time, and is written anew
    return np.empty((0, window), np.int64)
