"""Objectives written out, a group and a sample at a time."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize


def sample_loss(logits, teacher_logits, label, temperature):
    """CE + T²·KL of one sample, from probabilities."""
    p = (teacher_logits / temperature).softmax(0)
    q = (logits / temperature).softmax(0)
    return -logits.softmax(0)[label].log() + temperature**2 * (p * (p / q).log()).sum()


def algorithm_1_loss(logits, teacher_logits, labels, groups, multipliers, temperature=4.0):
    """``L(B) + Σₐ λₐ·|L(B) − Lₐ(B)|`` over the groups present, as the paper prints it."""
    losses = [sample_loss(z, t, y, temperature) for z, t, y in zip(logits, teacher_logits, labels, strict=True)]
    overall = sum(losses) / len(losses)
    penalty = torch.zeros((), dtype=logits.dtype)
    for group, multiplier in enumerate(multipliers):
        own = [loss for loss, g in zip(losses, groups, strict=True) if g == group]
        if own:
            penalty = penalty + multiplier * (overall - sum(own) / len(own)).abs()
    return overall, overall + penalty


def algorithm_1(model, teacher, train, *, epochs, mu, lr, batch_size, seed, temperature=4.0):
    """A loop of plain SGD steps; returns λ after every epoch. The model is trained in place."""
    images = train.normalized()
    with torch.no_grad():
        targets = teacher.eval()(images)
    generator = torch.Generator().manual_seed(seed)
    multipliers = torch.zeros(train.num_groups)
    history = []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train), batch_size):
            index = order[start : start + batch_size]
            _, loss = algorithm_1_loss(
                model(images[index]), targets[index], train.labels[index], train.groups[index], multipliers, temperature
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(images)
            losses = torch.stack(
                [sample_loss(z, t, y, temperature) for z, t, y in zip(logits, targets, train.labels, strict=True)]
            )
            for group in range(train.num_groups):
                own = losses[train.groups == group]
                multipliers[group] += mu * (losses.mean() - own.mean()).abs()
        history.append(multipliers.clone())
    return history


def worst_reweighting(losses, factor):
    """``max Σ qᵢℓᵢ`` under ``mean (n·qᵢ − 1)² ≤ factor² − 1``, by a general solver."""
    losses = np.asarray(losses, float)
    n = len(losses)
    scale = np.abs(losses).max() or 1.0
    found = minimize(
        lambda q: -(q @ losses) / scale,
        np.full(n, 1 / n),
        jac=lambda q: -losses / scale,
        bounds=[(0, 1)] * n,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: factor**2 - 1 - np.mean((n * q - 1) ** 2)},
        ],
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return float(found.x @ losses)


def shifted_loss(logits, teacher_logits, label, counts, tau, temperature):
    """CE on ``z + τ·log π`` plus T²·KL to ``t − τ·log π`` of one sample, π from the counts of the classes."""
    shift = tau * torch.tensor([np.log(n / sum(counts)) for n in counts], dtype=logits.dtype)
    p = ((teacher_logits - shift) / temperature).softmax(0)
    q = (logits / temperature).softmax(0)
    return -(logits + shift).softmax(0)[label].log() + temperature**2 * (p * (p / q).log()).sum()


def adjusted_loss(logits, teacher_logits, label, counts, tau, temperature):
    """CE on ``z + τ·log π`` plus T²·KL to the teacher as it is, of one sample."""
    shift = tau * torch.tensor([np.log(n / sum(counts)) for n in counts], dtype=logits.dtype)
    p = (teacher_logits / temperature).softmax(0)
    q = (logits / temperature).softmax(0)
    return -(logits + shift).softmax(0)[label].log() + temperature**2 * (p * (p / q).log()).sum()


def effective_weights(counts, beta):
    """``1/n``, or ``(1 − β)/(1 − βⁿ)``, of each class or group, scaled so that their mean over samples is 1."""
    raw = [1 / n if beta is None else (1 - beta) / (1 - beta**n) for n in counts]
    mean = sum(n * w for n, w in zip(counts, raw, strict=True)) / sum(counts)
    return [w / mean for w in raw]


def group_dro(batches, sizes, step, adjustment, temperature=4.0):
    """``Σₐ qₐ·(Lₐ(B) + C/√nₐ)`` of each of some batches in turn, and q after each, a group at a time.

    A batch is logits, teacher's logits, labels and groups; q takes its step before the loss, and is a constant in it.
    """
    q = [1 / len(sizes)] * len(sizes)
    values, weights = [], []
    for logits, teacher_logits, labels, groups in batches:
        losses = [sample_loss(z, t, y, temperature) for z, t, y in zip(logits, teacher_logits, labels, strict=True)]
        adjusted = {}
        for group, n in enumerate(sizes):
            own = [loss for loss, g in zip(losses, groups, strict=True) if g == group]
            if own:
                adjusted[group] = sum(own) / len(own) + adjustment / n**0.5
        q = [w * np.exp(step * float(adjusted[g].detach())) if g in adjusted else w for g, w in enumerate(q)]
        q = [w / sum(q) for w in q]
        values.append(sum(q[g] * loss for g, loss in adjusted.items()))
        weights.append(q)
    return values, weights


def power_weights(counts, exponent):
    """``n^−exponent`` of each class or group, scaled so that their mean over samples is 1."""
    raw = [n**-exponent for n in counts]
    mean = sum(n * w for n, w in zip(counts, raw, strict=True)) / sum(counts)
    return [w / mean for w in raw]


def weighted_loss(logits, teacher_logits, label, ce_weight, kd_weight, temperature):
    """``a·CE + b·T²·KL`` of one sample."""
    p = (teacher_logits / temperature).softmax(0)
    q = (logits / temperature).softmax(0)
    return -ce_weight * logits.softmax(0)[label].log() + kd_weight * temperature**2 * (p * (p / q).log()).sum()


def mean_margins(teacher_logits, labels, cells, count):
    """The teacher's mean lead of the label over the best other class, a sample at a time."""
    leads = [[] for _ in range(count)]
    for z, y, c in zip(teacher_logits, labels.tolist(), cells.tolist(), strict=True):
        p = z.softmax(0).tolist()
        leads[c].append(p[y] - max(value for k, value in enumerate(p) if k != y))
    return [sum(own) / len(own) for own in leads]


def lowered_loss(logits, teacher_logits, label, margin, temperature):
    """``CE + T²·KL`` of one sample with its label's logit lowered."""
    lowered = torch.stack([z - margin if k == label else z for k, z in enumerate(logits)])
    return sample_loss(lowered, teacher_logits, label, temperature)


def long_tail_losses(logits, teacher_logits, parts, strength, temperature):
    """T²·(across + within) of each sample, parts being lists of classes; masses are sums of probabilities."""
    p = (teacher_logits / temperature).softmax(1)
    q = (logits / temperature).softmax(1)
    mean = [p[:, part].sum(1).mean() for part in parts]
    losses = []
    for a, b in zip(p, q, strict=True):
        mass = [a[part].sum() for part in parts]
        moved = [m / over**strength for m, over in zip(mass, mean, strict=True)]
        target = [m / sum(moved) for m in moved]
        weight = [m ** (1 - strength) for m in mass]
        loss = sum(t * (t / b[part].sum()).log() for t, part in zip(target, parts, strict=True))
        for w, part in zip(weight, parts, strict=True):
            own_a, own_b = a[part] / a[part].sum(), b[part] / b[part].sum()
            loss = loss + w / sum(weight) * (own_a * (own_a / own_b).log()).sum()
        losses.append(temperature**2 * loss)
    return torch.stack(losses)


def drop_cost(measure, logits, label):
    """What one image costs: −log p, 1 − p, or whether another class is chosen."""
    p = logits.softmax(0)[label]
    if measure == "loss":
        return -p.log()
    return 1 - p if measure == "probability" else (logits.argmax() != label).to(logits)


def drops(measure, logits, teacher_logits, labels, groups, count, excess=False):
    """What each group loses against the teacher, beyond what all lose where asked; None of an absent group."""
    lost = [
        drop_cost(measure, z, y) - drop_cost(measure, t, y)
        for z, t, y in zip(logits, teacher_logits, labels, strict=True)
    ]
    overall = sum(lost) / len(lost) if excess else 0
    found = []
    for group in range(count):
        own = [value for value, member in zip(lost, groups, strict=True) if member == group]
        found.append(sum(own) / len(own) - overall if own else None)
    return found


def drop_lagrangian(logits, teacher_logits, labels, groups, multipliers, epsilon, measure, excess=False):
    """``L + Σₐ λₐ·(ρₐ − ε)`` over the groups present; an accuracy's place is taken by the cross-entropy."""
    losses = [sample_loss(z, t, y, 4.0) for z, t, y in zip(logits, teacher_logits, labels, strict=True)]
    value = sum(losses) / len(losses)
    smooth = "loss" if measure == "accuracy" else measure
    lost = drops(smooth, logits, teacher_logits, labels, groups, len(multipliers), excess)
    for multiplier, drop in zip(multipliers, lost, strict=True):
        if drop is not None:
            value = value + multiplier * (drop - epsilon)
    return value


def primal_dual(model, teacher, train, val, *, epochs, epsilon, measure, excess, step, lr, batch_size, seed):
    """Plain SGD on the Lagrangian, and an ascent on the validation part after each epoch; returns every λ."""
    images, held_out = train.normalized(), val.normalized()
    with torch.no_grad():
        targets, held_out_targets = teacher.eval()(images), teacher(held_out)
    generator = torch.Generator().manual_seed(seed)
    multipliers = [0.0] * train.num_groups
    history = []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train), batch_size):
            index = order[start : start + batch_size]
            groups = train.groups[index].tolist()
            logits = model(images[index])
            loss = drop_lagrangian(
                logits, targets[index], train.labels[index], groups, multipliers, epsilon, measure, excess
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            lost = drops(
                measure,
                model(held_out),
                held_out_targets,
                val.labels,
                val.groups.tolist(),
                train.num_groups,
                excess,
            )
        multipliers = [max(0.0, m + step * (float(d) - epsilon)) for m, d in zip(multipliers, lost, strict=True)]
        history.append(multipliers)
    return history
