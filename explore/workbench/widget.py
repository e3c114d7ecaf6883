"""The workbench widget: it receives edits from the browser and returns the new model and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from explore.cost import HARDWARE, SEQ_LEN
from explore.figures.plan import MEMORY
from explore.model import ModelConfig
from explore.pattern import canonical
from explore.plan import PRECISIONS
from explore.presets import PRESETS, preset
from explore.roofline import GPUS, HERE
from explore.workbench.opening import Opened, fields_of, name_of
from explore.workbench.readout import BOUNDS, code, groups, letters, readout, styles
from explore.workbench.state import Controls, content_of
from explore.workbench.training import PARTS

_FOLDER = Path(__file__).parent
SCRIPTS = ("kit.js", "readout.js", "training.js", "workbench.js")


class Workbench(anywidget.AnyWidget):
    """A model editor in JupyterLab: the pattern as coloured letters, the sizes as sliders.

    Examples:
        >>> bench = Workbench("MEM*E", d_model=256)
        >>> bench.config.pattern
        'MEM*E'

    Attributes:
        edit: a change made in the browser: its number `n` and a new `state`, the name of a `preset`, or a request for
            the `best` layout of the training run.
        view: the answer to the change `n`: the `state` and an `error`, which may be empty. The `sliders`, the
            `readout`, the `plan` of the training run on its tab, and the config as `json` and as `code` are those of
            the last state without an error.
        pinned: the model to compare with: its `readout`, its `label` and the `use` of the readout; or empty.
    """

    _esm = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    _css = _FOLDER / "workbench.css"
    edit = traitlets.Dict().tag(sync=True, echo_update=False)
    view = traitlets.Dict().tag(sync=True)
    pinned = traitlets.Dict().tag(sync=True)
    offers = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        pattern: Opened = "MEM*E",
        *,
        against: Opened | None = None,
        runs: str | Path = "runs",
        seq_len: int = SEQ_LEN,
        batch_size: int = 1,
        hardware: str = HARDWARE,
        **fields: Any,
    ) -> None:
        """Opens a model.

        Args:
            pattern: a pattern, the name of a published system, a `ModelConfig`, an `Experiment`, a run or its folder,
                or a row of the table of runs. All sizes of a given model keep their values when others change.
            against: a second model, in one of these forms, to compare with.
            runs: folder of run folders that holds the run of a row.
            seq_len: tokens per sequence, and in the context of decoding.
            batch_size: number of sequences decoded at once.
            hardware: name of a device of `explore.roofline`, or `here`.
            fields: further fields of `ModelConfig`; default width and vocabulary are those of `explore cost`.

        Raises:
            TypeError: `pattern` or `against` is none of these.
            ValueError: the model is not valid; the message is one line.
        """
        super().__init__()
        model = fields_of(pattern, runs, fields)
        self.offers = {
            "hardware": [*GPUS, HERE],
            "presets": list(PRESETS),
            "groups": groups(),
            "bounds": dict(BOUNDS),
            "gpus": list(GPUS),
            "precisions": list(PRECISIONS),
            "memory": styles(MEMORY),
            "parts": styles(PARTS),
        }
        self._n = 0
        others = {"seq_len": seq_len, "batch_size": batch_size, "hardware": hardware}
        self._show(Controls.read({"model": model, "home": model, **others}))
        if against is not None:
            self._pin(Controls.read({"model": fields_of(against, runs, {}), **others}), against)

    @classmethod
    def from_config(cls, model: ModelConfig, **others: Any) -> Workbench:
        """Opens a model; all its sizes keep their values when others change.

        Args:
            others: `seq_len`, `batch_size` and `hardware`.
        """
        return cls(**content_of(model), **others)

    @property
    def config(self) -> ModelConfig:
        """The last valid model; setting it updates the workbench."""
        return self._config

    @config.setter
    def config(self, model: ModelConfig) -> None:
        fields = content_of(model)
        self._show(self._state.model_copy(update={"model": fields, "home": fields}))

    @property
    def readout(self) -> dict[str, Any]:
        """The numbers shown, as returned by `explore.workbench.evaluate`."""
        return dict(self.view["readout"])

    def _pin(self, state: Controls, given: Opened) -> None:
        """Pins a state for comparison, labelled with the name of the given model."""
        label = name_of(given, canonical(state.model["pattern"]))
        use = f"{state.batch_size:,} × {state.seq_len:,} tokens on {state.hardware}"
        self.pinned = {"label": label, "use": use, "readout": readout(state, state.build())}

    @traitlets.observe("edit")
    def _edited(self, change: Mapping[str, Any]) -> None:
        edit = change["new"]
        self._n = edit.get("n", 0)
        try:
            state = Controls.read(edit.get("state") or self._state.model_dump())
            if name := edit.get("preset"):
                fields = content_of(preset(name))
                state = state.model_copy(update={"model": fields, "home": fields})
            if edit.get("best"):
                state = state.model_copy(update={"training": state.training.best(state.build())})
            self._show(state)
        except ValueError as error:
            self.view = {**self.view, "n": self._n, "state": edit.get("state"), "error": str(error)}

    def _show(self, state: Controls) -> None:
        """Shows a state, if it can be evaluated."""
        model = state.build()
        shown = readout(state, model)
        self._state, self._config = state, model
        self.view = {
            "n": self._n,
            "state": state.model_dump(),
            "strip": canonical(state.model["pattern"]),
            "error": "",
            "letters": letters(model),
            "sliders": state.sliders(model),
            "readout": shown,
            "plan": state.training.readout(model) if state.tab == "training" else {},
            "json": model.model_dump_json(),
            "code": code(state.fields),
        }
