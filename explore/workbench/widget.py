"""The widget: it takes what was edited from the browser and gives back what that comes to."""

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
    """A model that is edited by hand in JupyterLab: its pattern as coloured letters, its sizes as sliders.

    Examples:
        >>> bench = Workbench("MEM*E", d_model=256)
        >>> bench.config.pattern
        'MEM*E'

    Attributes:
        edit: what the browser asks for: the number `n` of the change, and a new `state`, the name of a `preset`, or
            the `best` layout of the training run.
        view: the answer to the change `n`: the `state`, an `error` or none, and, of the last state without one,
            the `sliders`, the `readout`, the `plan` of the training run on its tab, and the config as `json` and
            as `code`.
        pinned: what is compared with: a `readout`, its `label` and the `use` it is for, or nothing.
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
        """Begins with a model.

        Args:
            pattern: its layers, the name of a published system, a `ModelConfig`, an `Experiment`, a run or its folder,
                or a row of the table of runs. All sizes of a model that was given stay when others are changed.
            against: a second one of these, with which the first is compared.
            runs: folder of run folders, in which a row of a table is looked up.
            seq_len: tokens of a sequence, and of the context of decoding.
            batch_size: sequences that are decoded at once.
            hardware: name of a device of `explore.roofline`, or `here`.
            fields: further fields of `ModelConfig`; width and vocabulary are those of `explore cost` unless given.

        Raises:
            TypeError: `pattern` or `against` is none of these.
            ValueError: the first thing that is wrong, in one line.
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
        """A workbench with a model, all of whose sizes stay as they are when others are changed.

        Args:
            others: `seq_len`, `batch_size` and `hardware`.
        """
        return cls(**content_of(model), **others)

    @property
    def config(self) -> ModelConfig:
        """The last valid model; setting it changes what is shown."""
        return self._config

    @config.setter
    def config(self, model: ModelConfig) -> None:
        fields = content_of(model)
        self._show(self._state.model_copy(update={"model": fields, "home": fields}))

    @property
    def readout(self) -> dict[str, Any]:
        """The numbers that are shown: those that `explore.workbench.evaluate` returns."""
        return dict(self.view["readout"])

    def _pin(self, state: Controls, given: Opened) -> None:
        """Makes a state what the browser compares with, under the name of what was given."""
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
        """Makes a state the one that is shown, if it can be evaluated."""
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
