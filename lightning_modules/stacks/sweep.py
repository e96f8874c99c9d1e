"""A queue of nets that train side by side: finished ones leave the stack, waiting ones take their places.

Nothing that a member computes depends on its neighbours: batches are a function of (its stream, its step), products of
a stack give each net the bits it gets alone, and passes over whole sets go in tiles of a fixed size. So its result is
bit-equal (on a CPU, one thread) in any stack, shard or world size, and after a resume.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.stacks.architectures import Architecture
from lightning_modules.stacks.batches import counter_subsets, take_points
from lightning_modules.stacks.dynamics import (
    counter_normals,
    descent,
    is_fitted,
    margin_loss,
    sde_delta,
    unfitted_first,
)
from lightning_modules.stacks.grid import Member, Points, Rules, outputs_in_tiles, result_row

GROUP = 16
"""Nets that are evaluated at a time; bounds the memory."""
DIVERGED = 1e12
"""alpha |o| beyond which a net has diverged."""


class Sweep:
    """The stack and its queue.

    Args:
        arch: of all members.
        rules: see there.
        points: see there.
        members: id -> member, in the order in which they start.
        slots: nets of the stack.
        rows: results that are there already, by member id; these members do not train.
    """

    def __init__(
        self,
        arch: Architecture,
        rules: Rules,
        points: Points,
        members: dict[str, Member],
        slots: int,
        rows: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.arch, self.rules, self.points, self.members = arch, rules, points, members
        self.slots = slots
        self.rows = {name: row for name, row in (rows or {}).items() if name in members}
        self.queue = [name for name in members if name not in self.rows]
        self.names: list[str] = []
        self.waiting: dict[str, dict[str, Any]] = {}
        self.weights: list[Tensor] = [layer[:0].clone() for layer in points.starts]
        self.steps = self.last = torch.zeros(0, dtype=torch.int64, device=points.rows.device)
        self.net_steps = 0
        self._refill(self.steps.bool())

    @property
    def alive(self) -> int:
        """Members that train or wait."""
        return len(self.names) + len(self.queue)

    @torch.no_grad()
    def burst(self) -> float:
        """`check` steps of every net in the stack; then some leave it and others come.

        Returns:
            Median over the nets of alpha times their mean batch loss; 0 for an empty stack.
        """
        if not self.names:
            return 0.0
        margins = self._train()
        size = margins.abs().amax(dim=(0, 2))
        # NaN must count as diverged
        diverged = ~(size <= DIVERGED)
        if self.rules.loss == "mse":
            moved = torch.ones_like(margins[..., 0], dtype=torch.bool)
        else:
            moved = (margins < 1).any(-1)
        counts = torch.arange(1, self.rules.check + 1, device=moved.device).unsqueeze(-1)
        latest = (moved * counts).amax(0)
        self.last = torch.where(latest > 0, self.steps + latest, self.last)
        self.steps = self.steps + self.rules.check
        self.net_steps += self.rules.check * len(self.names)
        # a net that still moved in the second half of a burst is looked at after a later one: t* is exact all the same
        quiet = latest <= self.rules.check // 2 if self.rules.loss != "mse" else torch.ones_like(diverged)
        self._retire(diverged, quiet | (self.steps >= self.rules.max_steps))
        losses = margin_loss(margins, self.rules.loss).mean((0, 2))[~diverged]
        return float(losses.median()) if len(losses) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Members in training with their weights, and the results so far; any number of shards can take it up."""
        running = {
            name: {
                "weights": [layer[slot].cpu().clone() for layer in self.weights],
                "steps": int(self.steps[slot]),
                "last": int(self.last[slot]),
            }
            for slot, name in enumerate(self.names)
        } | self.waiting
        return {"running": running, "rows": list(self.rows.values()), "net_steps": self.net_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues; members that the state does not know start anew."""
        self.rows |= {row["member_id"]: row for row in state["rows"] if row["member_id"] in self.members}
        running = {name: s for name, s in state["running"].items() if name in self.members and name not in self.rows}
        # those that run come first; what finds no slot keeps its place and its state
        self.waiting = dict(running)
        names = [name for name in self.members if name not in self.rows]
        self.queue = sorted(names, key=lambda name: name not in running)
        self.names, self.net_steps = [], state["net_steps"]
        self.weights = [layer[:0].clone() for layer in self.weights]
        self.steps = self.last = self.steps[:0]
        self._refill(self.steps.bool())

    def _train(self) -> Tensor:
        """Margins z (S, N, B) of the points of each step, before it."""
        p, rules, members = self.points, self.rules, [self.members[name] for name in self.names]
        device, dtype = self.weights[0].device, self.weights[0].dtype
        replica = torch.tensor([m.replica for m in members], device=device)
        alpha, lr = (
            torch.tensor([getattr(m, k) for m in members], device=device, dtype=dtype) for k in ("alpha", "lr")
        )
        count = torch.tensor([m.points for m in members], device=device)
        keys, column = p.keys[replica], alpha.unsqueeze(-1)
        picks = self._picks(keys, count)
        noise = None
        if rules.dynamics == "gd_sde":
            noise = counter_normals(keys, self.steps, rules.check, int(count[0])).to(dtype)
        margins, memory = [], p.pool.new_empty(0)
        seen = [] if picks is None else self._seen(replica, column, lr, picks)
        for step in range(rules.check):
            if picks is None:
                chosen = self._unfitted(replica, column, keys, self.steps + step, count)
                ((rows, offset, labels, moves),) = self._seen(replica, column, lr, chosen.unsqueeze(0))
            else:
                rows, offset, labels, moves = seen[step]

            def delta(output: Tensor, step: int = step, labels: Tensor = labels, moves: Tensor = moves) -> Tensor:
                margins.append(output * labels)
                force = descent(margins[-1], rules.loss)
                if noise is not None:
                    return sde_delta(force, labels / column, lr, rules.batch, noise[step])
                return force.mul_(moves)

            self.arch.update_(self.weights, take_points(p.pool, rows, memory), offset, delta)
        return torch.stack(margins)

    def _seen(self, replica: Tensor, alpha: Tensor, lr: Tensor, picks: Tensor) -> list[tuple[Tensor, ...]]:
        """For each step rows of the pool, f(w_0, x), alpha y and lr y / B of the points picked, (N, B) each.

        Fetched for all steps at once: a small stack spends its time on calls, not on numbers.
        """
        p = self.points
        # full batches are the same in every step
        once = picks[:1] if picks.stride(0) == 0 else picks
        rows, offset = p.rows[replica.unsqueeze(-1), once], p.offset[replica.unsqueeze(-1), once]
        labels = p.label[rows]
        found = rows, offset, alpha * labels, labels * (lr / picks.shape[-1]).unsqueeze(-1)
        return list(zip(*(part.expand(len(picks), -1, -1).unbind() for part in found), strict=True))

    def _picks(self, keys: Tensor, count: Tensor) -> Tensor | None:
        """Points (S, N, B) of the burst's steps in each replica's order; None where they depend on the weights."""
        if self.rules.dynamics == "only_unfit":
            return None
        if self.rules.dynamics == "sgd":
            return counter_subsets(keys, self.steps, self.rules.check, count, self.rules.batch)
        return torch.arange(int(count[0]), device=keys.device).expand(self.rules.check, len(keys), -1)

    def _unfitted(self, replica: Tensor, alpha: Tensor, keys: Tensor, steps: Tensor, count: Tensor) -> Tensor:
        """Points of a step of `only_unfit`."""
        p = self.points
        output = outputs_in_tiles(self.arch, self.weights, p.pool, p.rows[replica]) - p.offset[replica]
        margin = alpha * output * p.label[p.rows[replica]]
        return unfitted_first(margin, keys, steps, count, self.rules.batch)

    def _retire(self, diverged: Tensor, look: Tensor) -> None:
        """Evaluates the nets that may have finished; those that have leave a row."""
        gone = torch.zeros_like(diverged)
        chosen = (diverged | look).nonzero().flatten()
        for slots in chosen.split(GROUP) if len(chosen) else ():
            stack = [layer[slots] for layer in self.weights]
            names = [self.names[slot] for slot in slots.tolist()]
            replica = torch.tensor([self.members[name].replica for name in names], device=slots.device)
            p = self.points
            most = max(self.members[name].points for name in names)
            train = outputs_in_tiles(self.arch, stack, p.pool, p.rows[replica, :most]) - p.offset[replica, :most]
            for at, (slot, name) in enumerate(zip(slots.tolist(), names, strict=True)):
                member = self.members[name]
                labels = p.label[p.rows[member.replica, : member.points]]
                product = train[at, : member.points] * labels
                own = [layer[at : at + 1] for layer in stack]
                if bool(look[slot]) and not bool(diverged[slot]):
                    product = self._settle(member, own, product)
                fitted = bool(is_fitted(member.alpha * product.unsqueeze(0), self.rules.loss))
                if not (bool(diverged[slot]) or fitted or int(self.steps[slot]) >= self.rules.max_steps):
                    continue
                status = "diverged" if bool(diverged[slot]) else "fitted" if fitted else "unfinished"
                gone[slot] = True
                outcome = {"member_id": name, "status": status, "steps": int(self.steps[slot])}
                last = int(self.last[slot])
                self.rows[name] = result_row(self.arch, self.rules, p, member, own, product, outcome, last)
        if bool(gone.any()):
            self._refill(~gone)

    def _settle(self, member: Member, weights: list[Tensor], product: Tensor) -> Tensor:
        """o y where a whole set's products see a few points unfitted that batches may see fitted.

        The two round differently. A net at rest for which only batches see every point fitted would wait for ever, so
        the products of a batch's shape, which moved it, decide.
        """
        places = (member.alpha * product < 1).nonzero().flatten()
        batch, p = self.rules.batch, self.points
        if self.rules.dynamics != "sgd" or not 0 < len(places) <= 4 * batch:
            return product
        padded = places[torch.arange(-(-len(places) // batch) * batch, device=places.device) % len(places)]
        rows, offset = p.rows[member.replica], p.offset[member.replica]
        parts = [
            self.arch.forward(weights, p.pool[rows[at]].unsqueeze(0))[0] - offset[at] for at in padded.split(batch)
        ]
        return product.index_copy(0, padded, torch.cat(parts) * p.label[rows[padded]])

    def _refill(self, keep: Tensor) -> None:
        """Keeps some nets of the stack, closes the gaps and lets waiting members in."""
        stay = keep.nonzero().flatten()
        names = [self.names[slot] for slot in stay.tolist()]
        room = max(self.slots - len(names), 0)
        new, self.queue = self.queue[:room], self.queue[room:]
        states = [self.waiting.pop(name) if name in self.waiting else self._fresh(name) for name in new]
        for number, layer in enumerate(self.weights):
            added = [state["weights"][number].to(layer).unsqueeze(0) for state in states]
            self.weights[number] = torch.cat([layer[stay], *added])
        counts = {
            k: torch.tensor([s[k] for s in states], dtype=torch.int64, device=stay.device) for k in ("steps", "last")
        }
        self.steps = torch.cat([self.steps[stay], counts["steps"]])
        self.last = torch.cat([self.last[stay], counts["last"]])
        self.names = [*names, *new]

    def _fresh(self, name: str) -> dict[str, Any]:
        replica = self.members[name].replica
        return {"weights": [layer[replica] for layer in self.points.starts], "steps": 0, "last": 0}
