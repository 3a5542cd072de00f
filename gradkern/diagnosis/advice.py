"""What to do about a run: the article's five fixes and beyond, by the evidence of the run itself.

The fixes of "A Gentle Introduction to Exploding Gradients": redesign the network (fewer layers, smaller
batches, truncated backpropagation through time), ReLU, LSTM, clip gradients, penalise weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.detectors.precision import uses_fp16
from gradkern.diagnosis.detectors.spikes import GRADIENT_RATIO, LEAST, SPIKE_Z, WINDOW
from gradkern.diagnosis.findings import Advice, Finding
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import count, number, percent
from gradkern.record.schema import Record

# Clip at the 90th percentile of ordinary steps: it leaves nine in ten of them alone.
QUANTILE: Final = 0.9

# Pascanu, Mikolov, Bengio 2013: "values from half to ten times the average norm can still yield convergence".
RANGE: Final = (0.5, 10.0)

# With plain SGD a clipped step moves the weights by lr * threshold / (1 - momentum): at most 1 % of them.
SGD_STEP: Final = 0.01

# Fewer ordinary steps than these make no percentile.
LEAST_STEPS: Final = 20

# What "A Gentle Introduction to Exploding Gradients" and most published runs use, where data say nothing.
ARTICLE_NORM: Final = 1.0
ARTICLE_VALUE: Final = 0.5

# A rate that is too high is so by some powers of ten; more than four would be guessing.
MOST_LOWERED: Final = 1e4

# What a clip may help against.
CLIPPABLE: Final = (
    "exploding_gradient",
    "gradient_spike",
    "grad_nonfinite",
    "loss_unstable",
    "loss_diverging",
    "update_spike",
    "loss_nonfinite",
)

# The update ratio that a lowered learning rate is aimed at.
USUAL_RATIO: Final = 0.003


@dataclass(frozen=True)
class Threshold:
    """A recommended threshold.

    Attributes:
        max_norm: the threshold.
        steps: ordinary steps that it rests on: finite, no spikes, before the trouble.
        share: share of all recorded steps on which it would have fired, those that were not finite included.
        low: half the average norm of those steps; high: ten times.
        why: where the number comes from.
    """

    max_norm: float
    steps: int
    share: float
    low: float
    high: float
    why: str


@np.errstate(all="ignore")
def recommend_threshold(record: Record, before: int | None = None, *, of: str = "norm") -> Threshold:
    """A clipping threshold from the norms of a run: the 90th percentile of its ordinary steps.

    With plain SGD no more than moves the weights by 1 % a step. Without 20 ordinary steps the article's 1.0
    (0.5 by value), or less by that bound.

    Args:
        record: the run.
        before: only steps before this one are ordinary.
        of: "norm" for the joint norm, "value" for the largest element.
    """
    view = View.of(record)
    if of == "value":
        steps, rows = view.rows("grad_abs_max")
        with np.errstate(all="ignore"):
            norms = (
                np.where(np.isfinite(rows), rows, -1.0).max(axis=1).astype(np.float64)
                if rows.size
                else np.empty(0)
            )
        norms[norms < 0] = math.nan
    else:
        steps, norms = view.scalar("grad_finite_norm")
        if not len(steps):
            steps, norms = view.scalar("grad_norm")
    _, torch_norms = view.scalar("grad_norm")
    kept = np.isfinite(norms) & (norms > 0)
    kept[
        [p for p, _, _ in series.spikes(norms, window=WINDOW, least=LEAST, z=SPIKE_Z, ratio=GRADIENT_RATIO)]
    ] = False
    if before is not None:
        kept &= steps < before
    usual = norms[kept]
    lost = int((~np.isfinite(torch_norms)).sum())
    article = ARTICLE_NORM if of == "norm" else ARTICLE_VALUE
    if len(usual) >= LEAST_STEPS:
        limit, why = float(np.quantile(usual, QUANTILE)), f"90th percentile of {len(usual)} unspiked steps"
    else:
        there_is = f"there are only {len(usual)} ordinary steps" if len(usual) > 1 else "no step was ordinary"
        limit, why = article, f"the usual value, for {there_is}"
    bound = _sgd_bound(view)
    if of == "norm" and bound is not None and bound < limit:
        limit, why = bound, "moves the weights by 1 % a step at this learning rate"
    average = float(usual.mean()) if len(usual) else math.nan
    fired = float((norms[np.isfinite(norms)] > limit).sum() + lost) / max(len(norms), 1)
    return Threshold(limit, len(usual), min(fired, 1.0), RANGE[0] * average, RANGE[1] * average, why)


def _sgd_bound(view: View) -> float | None:
    optimizer = view.optimizer
    _, weights = view.scalar("weight_norm")
    _, lrs = view.scalar("lr")
    weight, lr = series.median(weights[:3]), series.median(lrs)
    if str(optimizer.get("type", "")) != "SGD" or not weight > 0 or not lr > 0:
        return None
    return SGD_STEP * weight * (1 - float(optimizer.get("momentum") or 0.0)) / lr


def advise(view: View, cause: Finding | None, findings: list[Finding]) -> list[Advice]:
    """Advice for a run with these findings, the best first."""
    kinds = {finding.kind: finding for finding in reversed(findings) if finding.is_alarm}
    advice = [
        *_data(view, kinds),
        *_dtype(view, kinds),
        *_clip(view, cause, kinds),
        *_rate(view, cause, kinds),
        *_structure(view, cause, findings),
        *_penalty(kinds),
        *_batch(cause, kinds),
        *_other(view, cause, kinds),
    ]
    return sorted(advice, key=lambda entry: -entry.score)


def _data(view: View, kinds: dict[str, Finding]) -> list[Advice]:
    found = []
    if bad := kinds.get("data_nonfinite"):
        found.append(
            Advice(
                "Find the bad values",
                f'assert torch.isfinite(batch).all(), "batch of step {bad.step}"',
                f"{count(bad.value, 'element')} of the batch of step {bad.step} are NaN or Inf",
                "nothing; a bad batch that is only skipped comes back in the next epoch",
                1.0,
            )
        )
    scale = kinds.get("data_scale")
    if scale is not None:
        what = str(scale.evidence["what"])
        if what.endswith("of a batch"):
            found.append(
                Advice(
                    "Look at that batch",
                    f"print(batch.abs().amax())  # of step {scale.step}",
                    f"its {what} reach {number(scale.value)}, {_evidence(scale, 'ratio')} times the usual",
                    "large values may be rare and right; then clip",
                    0.95,
                )
            )
        if what in ("inputs", "both"):
            found.append(
                Advice(
                    "Standardise the inputs",
                    "x = (x - x.mean(0)) / x.std(0)  # of the training set, for each feature",
                    f"they reach {_evidence(scale, 'data_abs_max')}, with a standard deviation of "
                    f"{_evidence(scale, 'data_std')}",
                    "the same numbers must be applied wherever the model is used",
                    0.95,
                )
            )
        if what in ("targets", "both"):
            found.append(
                Advice(
                    "Standardise the targets",
                    "y = (y - y.mean()) / y.std()  # of the training set, and back again for predictions",
                    f"they reach {number(float(scale.evidence['target_abs_max']))}",
                    "losses are then in other units",
                    0.95,
                )
            )
    return found


def _dtype(view: View, kinds: dict[str, Finding]) -> list[Advice]:
    found = []
    for kind in ("fp16_overflow", "fp16_underflow", "amp_backoff"):
        if finding := kinds.get(kind):
            found.append(
                Advice(
                    "Use bfloat16",
                    'with torch.autocast("cuda", dtype=torch.bfloat16): ...  # or "cpu"',
                    finding.sentence.rstrip("."),
                    "it keeps 8 bits of a number where float16 keeps 11",
                    0.95,
                )
            )
            break
    if lost := kinds.get("update_rounded_away"):
        found.append(
            Advice(
                "Keep the weights in float32",
                'model.float()  # and torch.autocast("cuda", dtype=torch.bfloat16) around the forward pass',
                lost.sentence.rstrip("."),
                "twice the memory for weights",
                0.95,
            )
        )
    if "fp16_underflow" in kinds:
        found.append(
            Advice(
                "Scale the loss",
                "scaler = torch.amp.GradScaler(); scaler.scale(loss).backward()",
                "float16 gradients are rounded to zero; a scale lifts them off its floor",
                "weights must stay in float32, and steps are skipped while it finds its scale",
                0.9,
            )
        )
    return found


def _clip(view: View, cause: Finding | None, kinds: dict[str, Finding]) -> list[Advice]:
    signs = [kind for kind in CLIPPABLE if kind in kinds]
    if not signs or "overclipped" in kinds or not len(view.scalar("grad_finite_norm")[0]):
        return []
    if cause is not None and (cause.kind in ("data_nonfinite", "fp16_overflow") or _is_lost_forward(cause)):
        return []
    # What depth or time do to gradients they do on every step; everything else has a step at which it began.
    onset = min((kinds[kind].step for kind in signs if not _is_structure(kinds[kind])), default=None)
    limit = recommend_threshold(view, onset)
    by_value = recommend_threshold(view, onset, of="value")
    fires = f"it would have fired on {percent(limit.share)}"
    around = (
        f"; half to ten times the average norm is {number(limit.low)}–{number(limit.high)}"
        if limit.steps >= LEAST_STEPS
        else ""
    )
    _, thresholds = view.scalar("clip_threshold")
    now = series.median(thresholds)
    score = 0.9 if "exploding_gradient" in kinds or "gradient_spike" in kinds else 0.6
    if now <= limit.max_norm:
        return []  # it is clipped at less already
    found = [
        Advice(
            f"Clip at {number(limit.max_norm)}",
            f"gradkern.clip_(model.named_parameters(), max_norm={limit.max_norm:.3g})",
            f"{limit.why}; {fires} of the steps{around}",
            "a clip hides what makes gradients large; where it fires always it sets the learning rate",
            score,
        )
    ]
    if by_value.steps or limit.steps:
        found.append(
            Advice(
                f"Or clip each value at {number(by_value.max_norm)}",
                f"gradkern.clip_(model.named_parameters(), clip_value={by_value.max_norm:.3g})",
                f"{by_value.why}; it would have fired on {percent(by_value.share)} of the steps",
                "it changes the direction of the gradient, and with many elements the norm stays large",
                max(score - 0.3, 0.0),
            )
        )
    return found


def _is_structure(finding: Finding) -> bool:
    return finding.evidence.get("axis") in ("depth", "time")


def _is_lost_forward(finding: Finding) -> bool:
    """Whether the first forward pass overflowed, so that neither a clip nor a rate has a say."""
    return finding.evidence.get("axis") == "forward" and finding.evidence["nonfinite"] == 1.0


def _rate(view: View, cause: Finding | None, kinds: dict[str, Finding]) -> list[Advice]:
    _, lrs = view.scalar("lr")
    lr = series.median(lrs)
    high, low, jump = kinds.get("update_ratio_high"), kinds.get("update_ratio_low"), kinds.get("update_spike")
    if not math.isfinite(lr) or (cause is not None and _is_lost_forward(cause)):
        return []
    if jump is not None and isinstance(jump.evidence["lr_ratio"], float) and jump.evidence["lr_ratio"] >= 3:
        return [
            Advice(
                "Look at the learning-rate schedule",
                f"print(optimizer.param_groups[0]['lr'])  # at step {jump.step}",
                f"it rose {number(jump.evidence['lr_ratio'])} times at step {jump.step}",
                "warm restarts do so on purpose",
                0.95,
            )
        ]
    if high is not None:
        # What the rate itself makes: later updates grow out of the damage that the first ones did.
        first = float(high.evidence["first"])
        better = 10.0 ** round(math.log10(lr * USUAL_RATIO / first)) if min(first, lr) > 0 else lr / 10
        better = min(max(better, lr / MOST_LOWERED), lr / 3)
        return [
            Advice(
                "Lower the learning rate",
                _all_groups("lr", better / lr if lr > 0 else 0.1),
                f"at {number(lr)} an update is {number(first)} times the weights; a thousandth is usual",
                "training takes longer",
                0.92 if cause is high else 0.5,
            )
        ]
    if low is not None and cause is low and "size" in low.evidence:
        better = min(float(low.evidence["size"]) / 1e3, 1e-8)
        return [
            Advice(
                "Lower eps",
                f"for group in optimizer.param_groups: group['eps'] = {better:.0e}",
                low.sentence.rstrip("."),
                "a very small eps lets elements without signal move at full speed",
                0.92,
            )
        ]
    if low is not None and cause is low and "peak_lr" in low.evidence:
        return [
            Advice(
                "Look at the learning-rate schedule",
                "print(scheduler.get_last_lr())  # scheduler.step() once a batch, or once an epoch?",
                f"the rate fell from {_evidence(low, 'peak_lr')} to {_evidence(low, 'lr')}",
                "nothing, if the run was to end there",
                0.95,
            )
        ]
    if low is not None and cause is low:
        better = 10.0 ** round(math.log10(lr * 1e-3 / max(low.value, 1e-12))) if lr > 0 else 1e-3
        return [
            Advice(
                "Raise the learning rate",
                _all_groups("lr", better / lr if lr > 0 else 0.1),
                f"updates are {number(low.value)} of the weights at {number(lr)}",
                "raise it in steps of ten, and watch the loss",
                0.92,
            )
        ]
    if {"exploding_gradient", "loss_diverging", "loss_unstable"} & set(kinds):
        return [
            Advice(
                "Lower the learning rate",
                _all_groups("lr", 0.1),
                f"the loss does not hold at {number(lr)}",
                "training takes longer, and it does not make gradients smaller",
                0.45,
            )
        ]
    return []


def _structure(view: View, cause: Finding | None, findings: list[Finding]) -> list[Advice]:
    found = []
    alarms = [finding for finding in findings if finding.is_alarm]
    types = {module.type for module in view.modules}
    is_recurrent = any(parameter.role == "recurrent" for parameter in view.parameters.values())
    unstable = {"exploding_gradient", "loss_nonfinite", "loss_diverging", "loss_unstable", "gradient_spike"}
    if is_recurrent and not len(view.rows("time_grad_norm")[0]) and any(f.kind in unstable for f in alarms):
        found.append(
            Advice(
                "Look at the time steps",
                "print(monitor.probe_time(step_fn))  # step_fn runs a forward pass and returns the loss",
                "the network is recurrent, and how its gradients change through time was not measured",
                "it runs one more forward and backward pass, one time step at a time",
                0.85,
            )
        )
    for finding in alarms:
        axis = finding.evidence.get("axis")
        explodes = finding.kind == "exploding_gradient"
        if axis == "depth":
            each = _evidence(finding, "factor")
            found.append(
                Advice(
                    "Initialise for depth" if explodes else "Normalise between layers",
                    "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')"
                    if explodes
                    else "torch.nn.Sequential(layer, torch.nn.LayerNorm(width), activation)",
                    f"gradients change by a factor of {each} a layer; 1 is right",
                    "only for a new run" if explodes else "another network, to be trained anew",
                    0.93,
                )
            )
            found.append(
                Advice(
                    "Use fewer layers, or add each layer's input to its output",
                    "h = h + block(h)",
                    f"{_evidence(finding, 'layers')} layers at {each} make {_evidence(finding, 'total')}",
                    "another network, to be trained anew",
                    0.7,
                )
            )
        if axis in ("forward", "uneven", "scale"):
            found.append(
                Advice(
                    "Initialise so that layers keep the size of what they are given",
                    "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')",
                    finding.sentence.rstrip("."),
                    "only for a new run",
                    0.85,
                )
            )
            found.append(
                Advice(
                    "Normalise between layers",
                    "torch.nn.Sequential(layer, torch.nn.LayerNorm(width), activation)",
                    "what one layer magnifies the next one does not see",
                    "another network, to be trained anew",
                    0.65,
                )
            )
        if axis == "time":
            steps = int(float(finding.evidence["steps"]))
            if "LSTM" not in types and "GRU" not in types:
                found.append(
                    Advice(
                        "Use an LSTM",
                        "torch.nn.LSTM(inputs, hidden)",
                        f"through {steps} steps gradients change {_evidence(finding, 'factor')} times each",
                        "four times the weights and the work",
                        0.8,
                    )
                )
            if explodes:
                length = max(steps // 5, 5)
                shorter = series.power10(length * math.log10(float(finding.evidence["factor"])))
                found.append(
                    Advice(
                        "Cut the sequence",
                        f"chunks = gradkern.truncated_bptt(x, None, steps={length})  # for chunk in chunks: "
                        "out, chunks.state = rnn(chunk, chunks.state)",
                        f"over {length} steps the factor is {number(shorter)} instead of "
                        f"{_evidence(finding, 'total')}",
                        "nothing is learned across the cuts",
                        0.6,
                    )
                )
        is_flat = finding.kind == "saturated_activation" or (
            finding.kind == "vanishing_gradient" and axis == "depth"
        )
        if is_flat and types & {"Sigmoid", "Tanh", "Softsign", "LogSigmoid"}:
            found.append(
                Advice(
                    "Use ReLU",
                    "torch.nn.ReLU()",
                    "sigmoid and tanh pass on a fraction of the gradient, saturated ones nearly nothing",
                    "units can die, and outputs have no bound",
                    0.8,
                )
            )
        if finding.kind == "dead_relu":
            found.append(
                Advice(
                    "Use an activation that cannot die",
                    "torch.nn.LeakyReLU(0.01)",
                    finding.sentence.rstrip("."),
                    "if a learning rate that is too high killed them, it will hurt elsewhere",
                    0.75 if cause is None or cause is finding else 0.35,
                )
            )
    return found


def _penalty(kinds: dict[str, Finding]) -> list[Advice]:
    growing = kinds.get("weights_growing")
    explodes = kinds.get("exploding_gradient")
    if growing is None and (explodes is None or explodes.evidence.get("axis") != "time"):
        return []
    recurrent = ", where=gradkern.recurrent" if growing is None else ""
    return [
        Advice(
            "Penalise large weights",
            f"gradkern.add_penalty_(model.named_parameters(), l2=1e-4{recurrent})",
            growing.sentence.rstrip(".")
            if growing
            else "smaller recurrent weights pass on smaller gradients",
            "slow: it holds weights back and repairs none; recurrent weights that are too small forget",
            0.6 if growing else 0.4,
        )
    ]


def _other(view: View, cause: Finding | None, kinds: dict[str, Finding]) -> list[Advice]:
    found = []
    if over := kinds.get("overclipped"):
        norms = series.finite(view.scalar("grad_finite_norm")[1])
        better = float(np.quantile(norms, QUANTILE)) if len(norms) else ARTICLE_NORM
        found.append(
            Advice(
                f"Clip at {number(better)}",
                f"gradkern.clip_(model.named_parameters(), max_norm={better:.3g})",
                f"90th percentile of {len(norms)} steps; now {number(over.value)} of the gradient is left",
                "or leave the clip and raise the learning rate, which does the same",
                0.95,
            )
        )
    if starved := kinds.get("clip_starvation"):
        found.append(
            Advice(
                "Lower eps, or raise the threshold",
                f"for group in optimizer.param_groups: group['eps'] = {starved.value / 1e3:.0e}",
                f"clipped gradients are {number(starved.value)} an element, eps is {number(starved.limit)}",
                "a very small eps lets elements without signal move at full speed",
                0.9,
            )
        )
    if shrinking := kinds.get("weights_shrinking"):
        decay = float(shrinking.evidence["weight_decay"])
        found.append(
            Advice(
                "Lower the weight decay",
                f"for group in optimizer.param_groups: group['weight_decay'] = {min(decay / 100, 0.01):.0e}",
                shrinking.sentence.rstrip("."),
                "without any, weights may grow",
                0.9,
            )
        )
    if "symmetric_units" in kinds:
        found.append(
            Advice(
                "Initialise with random numbers",
                "torch.nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')",
                kinds["symmetric_units"].sentence.rstrip("."),
                "nothing",
                0.9,
            )
        )
    if "unused_parameter" in kinds:
        found.append(
            Advice(
                "Look at the order of the calls",
                "optimizer.zero_grad(); loss.backward(); optimizer.step()",
                "no gradient came: backward() is missing, zero_grad() is after it, or the loss is detached",
                "nothing",
                0.95,
            )
        )
    if left := kinds.get("unstepped_parameter"):
        found.append(
            Advice(
                "Hand them to the optimizer",
                f"optimizer.add_param_group({{'params': [model.get_parameter({left.names[0]!r})]}})",
                left.sentence.rstrip("."),
                "what is meant to stay as it is had better not ask for gradients",
                0.9,
            )
        )
    if zero := kinds.get("zero_gradient"):
        found.append(
            Advice(
                "Look for where the graph ends",
                f"print(model.get_parameter({zero.names[0]!r}).grad)",
                zero.sentence.rstrip("."),
                "weights that are zero on both sides of a layer do the same: then initialise them",
                0.7 if cause is None or cause is zero else 0.3,
            )
        )
    if cause is not None and cause.kind in ("loss_nonfinite", "grad_nonfinite", "weights_nonfinite"):
        where = " and in float16 even 1e-8 is 0" if uses_fp16(view) else ""
        found.append(
            Advice(
                "Find the operation",
                "print(gradkern.trace_nonfinite(step_fn, model))  # step_fn runs that step",
                f"no number was large before: log or root of 0, or 0 / 0, makes NaN of sound numbers{where}",
                "the step is run once more, operation by operation; Monitor(keep_batch=True) has its batch",
                0.95,
            )
        )
    if cause is not None and cause.kind == "loss_diverging":
        falls = cause.value < 0
        found.append(
            Advice(
                "Check the sign of the loss",
                "loss.backward()  # of what is to become smaller; and no maximize=True",
                "the loss has no lower bound, and is on its way there"
                if falls
                else "small updates have made the loss worse from the first step on",
                "nothing",
                0.9,
            )
        )
    return found


def _all_groups(key: str, factor: float) -> str:
    """A line that multiplies a setting of all groups, which need not be the same in all of them."""
    return f"for group in optimizer.param_groups: group[{key!r}] *= {factor:.0e}"


def _batch(cause: Finding | None, kinds: dict[str, Finding]) -> list[Advice]:
    explodes = kinds.get("exploding_gradient")
    if explodes is None or explodes.evidence["axis"] != "training" or (cause and cause.kind == "data_scale"):
        return []
    return [
        Advice(
            "Use a smaller batch, or the mean of its losses",
            "loss = losses.mean()  # not losses.sum()",
            "a sum over the batch makes gradients, and updates, as many times larger",
            "a smaller batch is noisier; where losses are averaged already it changes little",
            0.25,
        )
    ]


def _evidence(finding: Finding, name: str) -> str:
    """A number of the evidence, as text."""
    return number(float(finding.evidence[name]))
