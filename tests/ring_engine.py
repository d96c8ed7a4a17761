"""An engine in Python, as far as rings of raw tokens see it: sequences that arrive, are read in chunks, decode with drafts that are
rejected, share blocks, are thrown out and come back. It knows which token every place of every ring holds.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.vllm.rings import IDLE, Launch, Plan, Rings

Token = tuple[Any, ...]
CPU = torch.device("cpu")


@dataclass
class Load:
    """What comes in.

    Attributes:
        sequences: running at once, at most.
        blocks, block: of the cache, and tokens of one.
        drafts: tokens after the first of a decoding row, at most.
        budget: tokens of a step.
        longest: of a prompt.
        missing: how often a running sequence misses a step.
        leaving: how often one is thrown out or ends.
        twins: how often a prompt is that of the one before, or ends a little after a block as they then do.
    """

    sequences: int = 12
    blocks: int = 90
    block: int = 16
    drafts: int = MAX_Q_LEN - 1
    budget: int = 96
    longest: int = 120
    missing: float = 0.1
    leaving: float = 0.03
    twins: float = 0.0


@dataclass(eq=False)
class Sequence:
    """A request.

    Attributes:
        tokens: all that are known.
        computed: how many of them are in the cache.
        decodes: whether the last ones of this step are a token that was sampled and drafts.
        blocks: where they lie.
        held: its ring, from which position on it can be read, its tokens and the step then; or None.
    """

    tokens: list[Token]
    computed: int = 0
    decodes: bool = False
    blocks: list[int] = field(default_factory=list)
    held: tuple[int, int, int, int] | None = None


class Engine:
    """Steps of a random load; every step is checked."""

    def __init__(self, rings: Rings, plan: Plan, load: Load, seed: int) -> None:
        self.rings, self.plan, self.load, self.random = rings, plan, load, random.Random(seed)
        self.free, self.users = list(range(1, load.blocks)), Counter[int]()
        self.cached: dict[tuple[Token, ...], int] = {}
        self.hash_of: dict[int, tuple[Token, ...]] = {}
        self.in_block: dict[tuple[int, int], Token] = {}
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.held: dict[int, Token] = {}
        self.user: dict[int, Sequence] = {}
        self.last: list[Token] = []
        self.written: set[int] = set()
        self.names, self.steps, self.seen = 0, 0, Counter[str]()

    # ---- blocks, as vLLM keeps them: full ones are found by their tokens until they are taken for others

    def _new_block(self) -> int:
        block = self.free.pop(0)
        known = self.hash_of.pop(block, None)
        if known is not None and self.cached.get(known) == block:
            del self.cached[known]
        self.users[block] = 1
        return block

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        sequence.blocks, sequence.computed, sequence.held = [], 0, None

    def _find_prefix(self, sequence: Sequence) -> None:
        size = self.load.block
        while (end := sequence.computed + size) < len(sequence.tokens):
            block = self.cached.get(tuple(sequence.tokens[:end]))
            if block is None:
                return
            if not self.users[block]:
                self.free.remove(block)
            self.users[block] += 1
            sequence.blocks.append(block)
            sequence.computed = end
            self.seen["blocks found"] += 1
            self.seen["found while they are written"] += block in self.written

    def _cache_full_blocks(self, sequence: Sequence, end: int) -> None:
        size = self.load.block
        for i, block in enumerate(sequence.blocks[: end // size]):
            key = tuple(sequence.tokens[: (i + 1) * size])
            if block not in self.hash_of and key not in self.cached:
                self.cached[key], self.hash_of[block] = block, key

    # ---- sequences

    def _token(self) -> Token:
        self.names += 1
        return (self.names,)

    def _arrive(self) -> Sequence:
        length, family = self.random.randint(1, self.load.longest), self.random.randrange(4)
        if self.random.random() < self.load.twins:
            if self.last and self.random.random() < 0.8:
                return Sequence(list(self.last))
            self.last = [
                self._token() for _ in range(length - length % self.load.block + self.random.randint(1, MAX_Q_LEN))
            ]
            return Sequence(list(self.last))
        shared = self.random.choice((0, length // 2, length, length))
        return Sequence([(family, p) if p < shared else self._token() for p in range(length)])

    def _come_and_go(self) -> None:
        for sequence in list(self.running):
            if self.random.random() < self.load.leaving:
                self.running.remove(sequence)
                self._release(sequence)
                if self.random.random() < 0.5:  # preempted: it comes back with all its tokens
                    self.waiting.insert(0, sequence)
                    self.seen["preempted"] += 1
        if len(self.waiting) < 3:
            self.waiting.append(self._arrive())
        while self.waiting and len(self.running) < self.load.sequences and self.random.random() < 0.7:
            self.running.append(self.waiting.pop(0))

    def _work(self) -> list[tuple[Sequence, int]]:
        """Rows of a step: sequences and their new tokens; blocks are taken, and drafts are made up. Blocks that a row fills are
        found by later rows of the same step.
        """
        rows, budget = [], self.load.budget
        self.written = set()
        for sequence in self.random.sample(self.running, len(self.running)):
            if self.random.random() < self.load.missing or not budget:
                continue
            if not sequence.blocks:
                self._find_prefix(sequence)
            ahead = len(sequence.tokens) - sequence.computed
            count = min(ahead, budget, self.random.choice((ahead, ahead, self.random.randint(0, ahead) + 1)))
            sequence.decodes, known = ahead == 0, max(len(sequence.tokens), sequence.computed + 1)
            if sequence.decodes:
                count = min(1 + self.random.randint(0, self.load.drafts), budget)
                sequence.tokens += [self._token() for _ in range(count)]
            needed = -(-(sequence.computed + count) // self.load.block) - len(sequence.blocks)
            if needed > len(self.free):
                self.running.remove(sequence)
                self._release(sequence)
                self.waiting.insert(0, sequence)
                self.seen["out of blocks"] += 1
                continue
            sequence.blocks += [self._new_block() for _ in range(needed)]
            self.written |= set(sequence.blocks[sequence.computed // self.load.block :])
            self._cache_full_blocks(sequence, min(sequence.computed + count, known))
            rows.append((sequence, count))
            budget -= count
        return rows

    # ---- steps

    def step(self) -> None:
        """One step: rings are given, tokens are stored, rows are looked at, drafts are rejected."""
        self.steps += 1
        self._come_and_go()
        if self.random.random() < 0.05:
            self._dummy_run()
        rows, padding = self._work(), self.random.randrange(3)
        if not rows:
            return
        slots = [
            s.blocks[p // self.load.block] * self.load.block + p % self.load.block
            for s, count in rows
            for p in range(s.computed, s.computed + count)
        ]
        table = [s.blocks for s, _ in rows] + [[0]] * padding
        lengths, counts = [s.computed + n for s, n in rows] + [0] * padding, [n for _, n in rows] + [0] * padding
        self._update(table, lengths, counts, slots + [-1] * padding)
        self._store(rows)
        self._check(rows, padding)
        for sequence, count in rows:
            self._after(sequence, count)

    def _update(self, table: list[list[int]], lengths: list[int], counts: list[int], slots: list[int]) -> None:
        width, device = max(map(len, table)) + 3, self.rings.slots.device
        blocks = [[*row, *[self.load.blocks - 1] * (width - len(row))] for row in table]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        expected = self._expected(table, lengths, counts, slots)
        self.rings.update(
            SimpleNamespace(
                num_reqs=len(table), num_actual_tokens=len(slots), slot_mapping=torch.tensor(slots, device=device),
                block_table_tensor=torch.tensor(blocks, dtype=torch.int32, device=device),
                seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device), query_start_loc=starts.to(device),
            ),
            self.load.blocks,
        )  # fmt: skip
        assert self.rings.slots.tolist()[: len(table)] == expected

    def _expected(self, table: list[list[int]], lengths: list[int], counts: list[int], slots: list[int]) -> list[int]:
        """Which row has which ring, by the rules: first those that know theirs, the first of those that know the same; then the
        others, from the ring on that has been unused longest. Where another row writes a block, nothing is known of it.
        """
        state = {name: x.tolist() for name, x in self.rings._state.items()}
        ring_of_block = self.rings._ring_of_block.tolist() or [-1] * self.load.blocks
        given, asking, end = [-1] * len(table), [], 0
        for row, (blocks, length, count) in enumerate(zip(table, lengths, counts, strict=True)):
            end, before = end + count, length - count
            if not count or slots[end - 1] < 0:
                continue
            block = blocks[(before - 1) // self.load.block]
            ring = ring_of_block[block] if before else -1
            if before % self.load.block == 0 and block in self.written:
                ring = -1
            knows = ring >= 0 and block in state["owners"][ring] and 0 <= state["next"][ring] - before <= MAX_Q_LEN
            if knows and ring not in given:
                given[row] = ring
            else:
                asking.append(row)
        ages = [state["clock"][0] + 1 - used for used in state["used"]]
        free = [ring for ring in range(self.plan.count) if ring not in given and ages[ring] > self.plan.idle]
        for row, ring in zip(asking, sorted(free, key=lambda ring: -ages[ring]), strict=False):
            given[row] = ring
            self.seen["taken from the last step"] += ages[ring] == 1
        return given

    def _dummy_run(self) -> None:
        """Rows that an engine makes up, whose tokens are not stored: on the null block, or on what the table held before."""
        self.seen["dummy runs"] += 1
        self.written = set()
        table = [[0] * 8] * 2 + [sequence.blocks + [0] * 8 for sequence in self.running[:3]]
        counts = [self.random.randint(1, 4) for _ in table]
        lengths = [self.random.choice((n, n + self.load.block)) for n in counts]
        self._update(table, lengths, counts, [-1] * sum(counts))
        assert not self.rings.counts.any() and (self.rings.slots == -1).all() and (self.rings.token_slots == -1).all()

    def _store(self, rows: list[tuple[Sequence, int]]) -> None:
        at, size = 0, self.load.block
        places = self.rings.token_slots.tolist()
        used = [place for place in places if place >= 0]
        assert len(set(used)) == len(used), "two tokens in one place"
        for sequence, count in rows:
            for position in range(sequence.computed, sequence.computed + count):
                self.in_block[sequence.blocks[position // size], position % size] = sequence.tokens[position]
                if places[at] >= 0:
                    self.held[places[at]] = sequence.tokens[position]
                at += 1
        assert all(place == -1 for place in places[at:])

    def _check(self, rows: list[tuple[Sequence, int]], padding: int) -> None:
        size, slots, counts = self.rings.size, self.rings.slots.tolist(), self.rings.counts.tolist()
        given = [slot for slot in slots if slot >= 0]
        assert len(set(given)) == len(given), "two rows have one ring"
        assert all(slot == -1 for slot in slots[len(rows) :]) and not any(counts[len(rows) :])
        for (sequence, count), slot, recent in zip(rows, slots, counts, strict=False):
            length = sequence.computed + count
            assert all(
                self.in_block[sequence.blocks[p // self.load.block], p % self.load.block] == sequence.tokens[p]
                for p in range(length)
            ), "the model's own cache is wrong"
            assert 0 <= recent <= min(size, length)
            for position in range(length - recent, length):
                assert self.held.get(slot * size + position % size) == sequence.tokens[position]
            first = self._first(sequence, slot, given, recent > count)
            if slot >= 0:
                assert recent >= min(size, length - first)
                self.user[slot] = sequence
                sequence.held = slot, length - recent if recent < size else first, length, self.steps
            else:
                sequence.held = None
                assert recent == 0
                assert self.plan.idle or len(given) == self.plan.count, "a row has no ring, and a ring no row"
                self.seen["rows without"] += 1
            self.seen["rows"] += 1
            self.seen["full"] += recent == min(size, length)

    def _first(self, sequence: Sequence, slot: int, given: list[int], older: bool) -> int:
        """What a row must be able to read from, at the latest: a sequence in every step keeps what it had."""
        if sequence.held is None:
            self.seen["inherited"] += older
            return sequence.computed
        ring, first, end, step = sequence.held
        if slot == ring and self.user[ring] is sequence:
            self.seen["kept"] += 1
            return min(max(first, end - self.rings.size), sequence.computed)
        assert ring in given or step < self.steps - 1, "a ring was taken away for nobody"
        self.seen["lost"] += 1  # to a sequence with the same prefix, or to any while this one missed steps
        return sequence.computed

    def _after(self, sequence: Sequence, count: int) -> None:
        end = sequence.computed + count
        if sequence.decodes and self.random.random() < 0.8:
            end -= self.random.randint(0, count - 1)
            self.seen["rejected"] += len(sequence.tokens) - end
            del sequence.tokens[end:]
        sequence.computed = end
        self._cache_full_blocks(sequence, end)


LOADS = {
    "drafts": Load(),
    "no drafts": Load(drafts=0),
    "little room": Load(blocks=40, leaving=0.01),
    "short prompts that share everything": Load(longest=34, blocks=120, sequences=20),
    "twins": Load(twins=0.9, longest=50, blocks=200, sequences=9, budget=200, missing=0.3),
    "few that stay": Load(sequences=4, leaving=0.002, missing=0.0),
    "many that miss steps": Load(sequences=70, blocks=600, budget=400, missing=0.6),
    "stragglers": Load(sequences=16, missing=0.93, leaving=0.005, longest=40),
    "larger blocks": Load(block=64, blocks=60, longest=300, budget=500),
    "long prompts": Load(longest=1500, budget=2048, blocks=700, sequences=6),
}


def engine_of(
    launch: Launch, load: Load, seed: int, size: int = 16, count: int = 12, device: torch.device = CPU
) -> Engine:
    """An engine with so many rings of so many tokens, on a device."""
    plan = Plan(size, count, IDLE if load.sequences > count else 0)
    most, tokens = load.sequences + 3, load.budget + 16
    return Engine(Rings(plan, load.block, most, tokens, device, launch), plan, load, seed)
