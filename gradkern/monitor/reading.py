"""What a step's numbers mean, once they are on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradkern.monitor.host import Floats
from gradkern.monitor.ledger import Ledger, Step
from gradkern.monitor.updates import norms_and_errors


class Reader:
    """Fills in the scalars of steps, in their order, and names where NaN or Inf came from first.

    Attributes:
        origin_known: whether that has been named: once a run.
        is_scaled: whether a GradScaler calls the optimizer; None while it was not called yet.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._skipped = 0.0  # steps that the clipper has skipped so far
        self.origin_known = False
        self.is_scaled: bool | None = None

    def read(self, step: Step, values: dict[str, Floats]) -> None:
        """Scalars and rows of a step from what came to the host."""
        scalars, times = step.scalars, step.times
        for name in ("loss", "lr", "clip_threshold"):
            if name in values:
                scalars[name] = float(values[name].reshape(-1)[0])
        if step.kept is not None:
            step.rows, step.kept = np.asarray(step.kept), None
        if "rows" in values:
            step.rows, step.total = values["rows"], values["total"].tolist()
        is_cleared = step.total is not None and step.ran is False and not any(step.total[:4])
        if is_cleared and self.is_scaled:
            step.rows = step.total = None  # zero_grad() came before what was skipped could be looked at
            scalars.pop("grad_norm", None)
        if step.columns and max(step.columns) < 0:
            step.rows = None  # of parameters that nobody knows: only the totals mean something
        if step.total is not None:
            self._read_gradients(step, values, step.total)
        self._read_skip(step, values, is_cleared)
        if "data" in values or "target" in values:
            self._read_batch(step, values)
        if "weights" in values:
            scalars["weight_norm"] = math.sqrt(float(values["weights"][:, 0].sum()))
            times["weights"] = values["weights"]
        if "updates" in values:
            pairs = times["updates"] = norms_and_errors(values["updates"], times["sizes"])
            if "moved" in times:  # nobody knows what became of those that the optimizer does not hold
                times["updates"] = np.full((len(self._ledger.kinds["update_norm"]), 2), np.nan)
                times["updates"][times["moved"]] = pairs
            scalars["update_norm"] = math.hypot(*pairs[:, 0].tolist())
        if "exponents" in values:
            times["exponents"] = values["exponents"]

    def _read_skip(self, step: Step, values: dict[str, Floats], is_cleared: bool) -> None:
        """Whether the optimizer was kept from moving, and by whom.

        A GradScaler says so by its scale, which falls; in `found_inf`; or by not calling the optimizer.
        Before that was called for the first time nobody knows who does not call it, and a scaler that begins
        too high is by far the likeliest.
        """
        scalars, ran = step.scalars, step.ran
        is_bad = scalars.get("nonfinite_count", 0.0) > 0
        verdicts = []
        if "tally" in values:
            skipped, before = float(values["tally"][1]), self._skipped
            self._skipped = skipped
            verdicts.append(skipped > before)
        if "found_inf" in values:
            verdicts.append(bool(values["found_inf"] != 0))
        if ran is False and (is_bad or (is_cleared and self.is_scaled)):
            verdicts.append(True)
        fell = False
        if "scale" in values:
            now = float(values["scale"])
            before = float(values.get("scale_before", values["scale"]))
            fell = now < before or (ran is None and is_bad and "scale_before" not in values)
            if ran is False and is_bad:  # before the first step nobody had looked
                before /= step.times.get("backoff", 1.0)
            scalars["loss_scale"] = before
            verdicts.append(fell and not ran)
        if verdicts:
            scalars["skipped"] = float(any(verdicts))
        is_scaled = self.is_scaled or (self.is_scaled is None and ran is False)
        if fell or (is_scaled and any(verdicts) and (is_bad or is_cleared)):
            self._ledger.event(step.number, "amp_backoff", {"scale": now} if "scale" in values else {})
        elif any(verdicts):
            self._ledger.event(step.number, "skip", {})

    def _read_gradients(self, step: Step, values: dict[str, Floats], total: Sequence[float]) -> None:
        scalars = step.scalars
        finite, norm = math.sqrt(total[0]), norm_of(total)
        scalars["nonfinite_count"] = total[2] + total[3]
        before = float(values["norm_before"]) if "norm_before" in values else step.norm_before
        if before is not None:
            # Somebody else has clipped, and what was measured is what is left, of all gradients alike.
            if step.rows is not None and before > norm > 0 and math.isfinite(before):
                step.rows = step.rows * np.array([(before / norm) ** 2, before / norm, 1, 1, 1])
            scalars["grad_norm"], scalars["grad_clipped_norm"] = before, norm
            scalars["grad_finite_norm"] = before if math.isfinite(before) else finite
            scalars["clip_coef"] = norm / before if before > 0 and math.isfinite(before) else 1.0
            return
        scalars["grad_norm"], scalars["grad_finite_norm"] = norm, finite
        if step.coef is None:
            coef = values.get("coef")
            scalars["clip_coef"] = 1.0 if coef is None or not coef.size else float(coef.min())
            clipped = float(values["clipped_norm"]) if "clipped_norm" in values else norm
        else:
            scalars["clip_coef"] = step.coef
            clipped = (norm if step.propagates else finite) * step.coef
            is_cut = total[1] * step.coef > step.bound or (step.propagates and total[3] > 0)
            if step.bound < math.inf and is_cut:
                clipped = math.nan
        if not math.isnan(clipped) or math.isnan(norm):
            scalars["grad_clipped_norm"] = clipped
        if scalars["clip_coef"] < 1 and "clip_threshold" not in scalars and math.isfinite(clipped):
            scalars["clip_threshold"] = clipped

    def _read_batch(self, step: Step, values: dict[str, Floats]) -> None:
        bad = 0.0
        for word in ("data", "target"):
            if word in values:
                total = values[word].tolist()
                step.scalars[f"{word}_abs_max"] = total[1]
                bad += total[2] + total[3]
        step.scalars["data_nonfinite"] = bad
        if "data_sum" in values and not bad:
            numel = step.times["data_numel"]
            mean = float(values["data_sum"]) / numel
            step.scalars["data_std"] = math.sqrt(max(float(values["data"][0]) / numel - mean**2, 0.0))

    def look_for_origin(self, step: Step, values: dict[str, Floats]) -> None:
        """Name the first tensor that is not finite, and what came first: once a run."""
        scalars = step.scalars
        is_lost = not math.isfinite(scalars.get("loss", 0.0))
        bad_grads = scalars.get("nonfinite_count", 0.0) > 0
        weights = values.get("suspect", values.get("weights"))
        bad_weights = [] if weights is None else np.flatnonzero(weights[:, 2] + weights[:, 3] > 0).tolist()
        bad_data = scalars.get("data_nonfinite", 0.0) > 0
        if not (is_lost or bad_grads or bad_weights or bad_data):
            return
        if scalars.get("skipped") and not is_lost and (self.is_scaled or step.ran is False):
            return  # a GradScaler at work, or somebody like it: no harm was done
        self.origin_known = True
        where, name = "forward", ""
        if bad_data:
            where = "data"
        elif bad_weights:
            where, name = "optimizer", self._ledger.kinds["weight_norm"][bad_weights[0]]
        elif is_lost:
            where, name = ("unknown", "") if weights is None else self._first_bad_module(step)
        elif bad_grads:
            where, name = "backward", self._last_bad_gradient(step)
        self._ledger.event(
            step.number, "first_nonfinite", {"where": where, "name": name, "step": step.number}
        )

    def _first_bad_module(self, step: Step) -> tuple[str, str]:
        """Where a loss was lost although weights and data were sound: the first module, or the loss."""
        seen = step.times.get("activations")
        if seen is None:
            return "forward", ""
        found = seen.open()
        rows = {name[4:]: row for name, row in found.items() if name.startswith("act/")}
        for module in self._ledger.meta.get("modules", []):
            row = rows.get(module["name"])
            if row is not None and row[2] + row[3] > 0:
                return "forward", str(module["name"])
        return ("loss", "") if rows else ("forward", "")

    def _last_bad_gradient(self, step: Step) -> str:
        """The last in forward order: backward comes to it first."""
        if step.rows is None:
            return ""
        bad = np.flatnonzero(step.rows[:, 2] + step.rows[:, 3] > 0).tolist()
        columns = bad if step.columns is None else [step.columns[row] for row in bad]
        order = {module["name"]: module["order"] for module in self._ledger.meta.get("modules", [])}
        known = [column for column in columns if column >= 0]
        if not known:
            return ""
        owner = {p["name"]: p["module"] for p in self._ledger.meta["parameters"]}
        last: str = max(
            (self._ledger.names[column] for column in known),
            key=lambda name: (order.get(owner.get(name, ""), -1), self._ledger.places[name]),
        )
        return last


def norm_of(total: Sequence[float]) -> float:
    """The norm as torch gives it, of the statistics of all gradients."""
    return math.nan if total[2] > 0 else math.inf if total[3] > 0 else math.sqrt(total[0])
