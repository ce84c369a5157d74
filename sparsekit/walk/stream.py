"""The stream of blocks: carries activations from one block to the next, and gathers what solvers may know of them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.maths import Norms, Stats
from sparsekit.model import Block, fill, filled, filled_in_turn, first_inputs, parts_of
from sparsekit.system import ActivationStore, Team, give_back, meet, room_on
from sparsekit.walk.commits import Commits
from sparsekit.walk.gathered import Gathered
from sparsekit.walk.turns import Given, in_turns

SMALL = 2048  # inputs of a linear whose Gram matrix is not worth asking the system for its memory back
ERROR_CORRECTIONS = ("prefix", "sequential", "none", "block", "model")
COUPLED = ("sequential", "block", "model")  # what a group is given depends on those of its block before it
ONWARD = ("prefix", "sequential", "model")  # what a pruned block gives is what the next one is given


class BlockStream:
    """What Trainer.fit takes as its data: iterates over the blocks and carries activations from one to the next.

    inputs: what enters the first block, chunk by chunk
    error_correction: what a linear's inputs and its target are
        prefix  inputs from the pruned blocks before, target from the block's own dense weights on the same inputs
        sequential  the same group after group: inputs from the groups of its own block too that are pruned already,
                target from the dense weights on these (the option true-sequential of SparseGPT's and GPTQ's code)
        none    dense inputs, dense targets
        block   the dense model's input to the block, pruned activations inside it, targets from the dense block
                (FISTAPruner, section 3.1); blocks do not depend on one another
        model   inputs from everything pruned before, targets from the dense model
    dense_inputs: for `model`, a second store that holds the same chunks
    grams: bytes of a block's Gram matrices at a time; where experts have more, they come in several turns
    stats: what is gathered of a linear's inputs; `Norms` where its solver needs no more
    gathered: where statistics are kept for other runs, or come from where an earlier one has gathered all; for `none`
    commits: blocks that are committed there are restored instead of walked: resuming is starting further on
    team: the processes that walk together. With `block` each takes other blocks; `rounds` are those of this process.
        Else each has some of the inputs, sums run over all of them, and all are at the same block.
    """

    def __init__(
        self,
        blocks: list[Block],
        inputs: ActivationStore,
        dense_inputs: ActivationStore | None = None,
        *,
        error_correction: str = "prefix",
        commits: Commits | None = None,
        grams: int = 4 * 10**9,
        stats: type[Norms] = Stats,
        gathered: Gathered | None = None,
        team: Team = Team(),  # noqa: B008 (frozen)
    ):
        if error_correction not in ERROR_CORRECTIONS:
            raise ValueError(f"error_correction is {error_correction!r}; it can be {', '.join(ERROR_CORRECTIONS)}")
        if (error_correction == "model") != (dense_inputs is not None):
            raise ValueError("dense_inputs belong to error_correction: model, and it needs them")
        self.blocks, self.inputs, self.dense_inputs, self.grams = blocks, inputs, dense_inputs, grams
        self.stats, self.gathered = stats, gathered
        self.error_correction, self.commits = error_correction, commits
        done = set() if commits is None else commits.done()
        remaining = [block for block in blocks if block.index not in done]
        self.start = len(blocks) - len(remaining)
        self.coupled = error_correction in COUPLED  # what a group is given depends on the groups before it
        self.team, lanes = (Team(), team) if error_correction == "block" else (team, Team())
        turns: list[Block | None] = list(remaining[lanes.rank :: lanes.size])
        self.rounds = turns + [None] * (-(-len(remaining) // lanes.size) - len(turns))  # None: nothing left to do
        self.pace = lanes.size  # blocks that are finished in a round
        self.device = torch.device("cpu")  # where blocks compute; see `move`
        # a decoder's first block -> what enters it, chunk by chunk, once the encoder is pruned
        self.starts: dict[int, Callable[[], Iterator[Tensor]]] = {}

    @classmethod
    def over(
        cls,
        model: nn.Module,
        blocks: list[Block],
        tokens: Tensor,
        *,
        batch: int = 1,
        budget: int = 4 * 10**9,
        folder: str | Path | None = None,
        error_correction: str = "prefix",
        team: Team = Team(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> "BlockStream":
        """The stream that starts with a model's embedding of `tokens` (sequences, length).

        batch: sequences in a chunk. budget, folder: of the activations, see `ActivationStore`. The rest: see the class.
        Raises ValueError for fewer sequences than processes that share them.
        """
        if error_correction != "block":
            if len(tokens) < team.size:
                raise ValueError(
                    f"{len(tokens)} sequences cannot be shared out to {team.size} processes; "
                    "give more samples, fewer devices, or error_correction: block"
                )
            tokens = tokens[team.rank :: team.size]
        first, *later = parts_of(blocks)
        if later and error_correction not in ("prefix", "sequential"):
            raise ValueError(f"a decoder reads what the pruned encoder gives, so it cannot have {error_correction}")
        count = 2 if error_correction == "model" else 1
        stores = [ActivationStore(budget // count, folder) for _ in range(count)]
        for hidden in first_inputs(model, first, tokens, batch):
            for store in stores:
                store.append(hidden)
        stream = cls(blocks, *stores, error_correction=error_correction, team=team, **options)
        for part in later:
            stream.starts[part[0].index] = partial(_enter, model, blocks, part, tokens, batch)
        return stream

    def move(self, device: torch.device) -> None:
        """Blocks compute there from now on; what leaves them stays there, up to half of what is free and the budget."""
        self.device = device
        stores = [store for store in (self.inputs, self.dense_inputs) if store is not None]
        for store in stores:
            store.room = min(room_on(device) // len(stores), store.budget)

    def close(self) -> None:
        """Forget the activations."""
        for store in (self.inputs, self.dense_inputs):
            if store is not None:
                store.close()

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[Block | None]:
        turns = [block for block in self.rounds if block is not None]
        for block in self.blocks[: turns[-1].index + 1 if turns else 0]:
            if block.index in self.starts:
                meet()  # the first process may still be writing the block before
                for index, hidden in enumerate(self.starts[block.index]()):
                    self.inputs[index] = hidden
            block.enter(*(store for store in (self.inputs, self.dense_inputs) if store is not None))
            with filled([block]):
                if block in turns:
                    yield block
                else:
                    self._replay(block)
        yield from self.rounds[len(turns) :]

    @torch.no_grad()
    def statistics(self, block: Block) -> Iterator[tuple[list[str], Norms]]:
        """Each group's linears and the one Stats they share, in call order but for experts that come in a later turn.

        How many tokens each expert was sent is in the block's notes afterwards. The caller writes a group's new weights
        before it asks for the next group: with `block` and `model` they change what the next group is given.
        """
        for experts in block.experts.values():
            experts.routed.zero_()
            experts.tokens = self.inputs.rows * self.team.size
        if not self.coupled:
            for turn in self._collect(block):
                for group in sorted(turn):
                    self.team.sum(turn[group].parts())
                for group in sorted(turn):
                    if turn[group].width > SMALL:
                        give_back()
                    yield block.groups[group], turn.pop(group)  # a Gram lives no longer than its group needs it
            return
        twin = None if self.error_correction == "sequential" else block.twin()
        for group, names in enumerate(block.groups):
            for experts in block.experts.values():
                experts.routed.zero_()
            collected = [self._collect_group(block, twin, group)]
            self.team.sum(collected[0].parts())
            if group == len(block.groups) - 1:  # earlier passes went over the same tokens
                self._count(block)
            give_back()
            yield names, collected.pop()
        if twin is not None and block is not self.blocks[-1]:
            _advance(twin, self.dense_inputs or self.inputs)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Turn the inputs of a pruned block into those of the next."""
        if self.error_correction in ONWARD and block is not self.blocks[-1]:
            _advance(block, self.inputs)

    def _collect(self, block: Block) -> Iterator[dict[int, Norms]]:
        """One pass with the block dense; with `none` its outputs are the next block's inputs at once.

        Experts whose Gram matrices do not fit beside the others come later, from what their module was given: a pruned
        block does not change it, nor the weights of experts that are still to come.
        """
        if self.gathered is not None and self.gathered.whole:
            yield self.gathered.read(block, self.device)
            return
        groups, *later = in_turns(block, self.grams) if self.stats is Stats else [list(range(len(block.groups)))]
        collected: dict[int, Norms] = {}
        see = partial(self._add, collected)
        outputs = self.error_correction == "none" and block is not self.blocks[-1]
        given = Given(block.experts if later else {}, self.inputs.budget, self.inputs.parent)
        with given.watching():
            for index, chunk in enumerate(self.inputs):
                if outputs or later:
                    with block.watching(groups, see, routed=True):
                        out = block(chunk)
                    if outputs:
                        self.inputs[index] = out
                else:
                    block.until(chunk, groups, see, routed=True)
        self._count(block)
        if self.gathered is not None:
            self.gathered.write(block, collected)
        yield collected
        for groups in later:
            collected.clear()
            with block.watching(groups, see, routed=True):
                given.again(block.device)
            yield collected
        given.close()

    def _count(self, block: Block) -> None:
        """Note how many tokens each expert was sent."""
        pruned = {name for name in block.experts if any(f".{name}." in linear for linear in block.linears)}
        for name in sorted(pruned):
            experts = block.experts[name]
            counts = experts.routed.to(self.device)
            self.team.sum([counts])
            block.notes.setdefault("tokens", {})[name] = counts.tolist()

    def _collect_group(self, block: Block, twin: Block | None, group: int) -> Norms:
        """One group's inputs in the pruned block, beside those in the dense one if there is a twin."""
        collected: dict[int, Norms] = {}
        same = self.dense_inputs is None and group == 0  # nothing before it has been pruned
        dense_chunks = iter(self.dense_inputs) if self.dense_inputs is not None else None
        for chunk in self.inputs:
            mine: dict[int, Tensor] = {}
            dense: dict[int, Tensor] = {}
            block.until(chunk, [group], mine.__setitem__, routed=True)
            if twin is not None and not same:  # second: its experts are given the tokens that the block's were given
                entering = next(dense_chunks) if dense_chunks else chunk
                twin.until(entering, [group], dense.__setitem__, routed=True)
            self._add(collected, group, mine[group], dense)
        return collected[group]

    def _add(
        self,
        collected: dict[int, Norms],
        group: int,
        inputs: Tensor,
        dense: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add what enters a group, and what enters it in the dense block if that is known."""
        if group not in collected:
            collected[group] = self.stats(inputs.shape[-1], device=inputs.device)
        collected[group].add(inputs, dense.get(group))

    @torch.no_grad()
    def _replay(self, block: Block) -> None:
        """Do for the activations what the walk did when this block was pruned, or does in another process."""
        known = self.gathered is not None and self.gathered.whole
        if self.error_correction not in ("prefix", "sequential") and block is not self.blocks[-1] and not known:
            _advance(block.to(self.device), self.dense_inputs or self.inputs)
        if self.commits is not None and block.index in self.commits.done():
            self.commits.restore(block.to("cpu"))
            fill(block)
        self.advance(block.to(self.device))
        block.to("cpu")


def _enter(model: nn.Module, blocks: list[Block], part: list[Block], tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """What enters a later part of a model, run through the parts before as they are now."""
    with filled_in_turn(blocks[: part[0].index]):
        yield from first_inputs(model, part, tokens, batch)


def _advance(block: Block, store: ActivationStore) -> None:
    for index, chunk in enumerate(store):
        store[index] = block(chunk)
