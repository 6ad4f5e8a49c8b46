"""`EngineFigures`: what a serving engine does and has done, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFigures:
    """Now: answers that run (with the one that is read) and wait; blocks of the KV pool, those that answers hold, and
    those that are kept as known prefixes, of which answers may hold some.

    Since the start (`_total`): prompt tokens found in prefixes, and computed with their seconds; tokens generated, with
    the seconds of their steps; steps, and rows in them; requests taken, given up before their end, and answers set back
    for want of blocks. Shares are of decode steps: neurons computed, and firings that hot neurons served; None where
    there were none. longest_pause_seconds: that reading a prompt has held up answers, since the
    start or `restart_longest_pause`.
    """

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_hit_tokens_total: int
    prompt_tokens_total: int
    prompt_seconds_total: float
    generated_tokens_total: int
    generated_seconds_total: float
    steps_total: int
    rows_total: int
    requests_total: int
    cancelled_total: int
    preempted_total: int
    hot_share: float | None
    active_share: float | None
    cpu_wait_seconds_total: float
    longest_pause_seconds: float
