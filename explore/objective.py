"""What training minimises: the loss of the next token, or that of a student of a trained teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from explore.config import Config, added_later
from explore.foreign import echo
from explore.model import ModelConfig
from explore.weights import TrainedModel


class NextToken(Config):
    """Cross-entropy of the next token, and of later tokens if the model has multi-token prediction."""

    kind: Literal["next_token"] = "next_token"


class Distillation(Config):
    """KL divergence from a teacher's next-token distribution, plus other terms; routers keep their balance loss.

    Attributes:
        teacher: trained model with the student's vocabulary and tokenizer.
        temperature: divisor of both models' logits.
        kl_weight: weight of KL(teacher || student) times the squared temperature.
        ce_weight: weight of the cross-entropy of the next token.
        hidden_weight: weight of 1 - cosine between layer outputs, averaged over `hidden_layers`.
        hidden_layers: pairs of student layer and teacher layer, counted from 0.
        hidden_channels: channels of the teacher that the student has, ascending; None if it has all of them.
        teacher_precision: precision of the teacher's forward pass: `fp32`, or `bf16` for its matrix products.
    """

    kind: Literal["distillation"] = "distillation"
    teacher: TrainedModel
    temperature: PositiveFloat = 1.0
    kl_weight: NonNegativeFloat = 1.0
    ce_weight: NonNegativeFloat = 0.0
    hidden_weight: NonNegativeFloat = 0.0
    hidden_layers: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    hidden_channels: tuple[NonNegativeInt, ...] | None = added_later(None)

    @model_validator(mode="after")
    def _check(self) -> Distillation:
        if not self.kl_weight + self.ce_weight + self.hidden_weight:
            raise ValueError("kl_weight: one of kl_weight, ce_weight and hidden_weight must be above 0, got 0 for all")
        if bool(self.hidden_weight) != bool(self.hidden_layers):
            raise ValueError(
                f"hidden_layers: must name layers if hidden_weight is above 0, and none otherwise, "
                f"got {len(self.hidden_layers)} pairs and hidden_weight={self.hidden_weight:g}"
            )
        if self.hidden_channels is not None and not self.hidden_layers:
            raise ValueError("hidden_channels: must come with hidden_layers, whose channels they are, got no layers")
        return self

    def check_student(self, student: ModelConfig) -> None:
        """Checks that the teacher can teach this student.

        Raises:
            ValueError: vocabularies or hidden widths differ, or a layer does not exist.
        """
        teacher = self.teacher.model
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"model.vocab_size: must be {teacher.vocab_size}, that of the teacher {self.teacher.path}, "
                f"got {student.vocab_size}"
            )
        for whose, model, layers in zip(
            ("student", "teacher"), (student, teacher), zip(*self.hidden_layers, strict=True), strict=False
        ):
            if max(layers) >= model.n_layers:
                raise ValueError(
                    f"train.objective.hidden_layers: layers of the {whose} must be 0 to {model.n_layers - 1}, "
                    f"got {max(layers)}"
                )
        every, kept = range(teacher.d_model), self.hidden_channels
        valid = tuple(sorted({*every}.intersection(every if kept is None else kept)))
        if self.hidden_layers and (len(valid) != student.d_model or kept not in (None, valid)):
            raise ValueError(
                f"train.objective.hidden_channels: must be {student.d_model} channels of the teacher's "
                f"{teacher.d_model}, ascending, one for each channel of the student, got {echo(kept)}"
            )


Objective = Annotated[NextToken | Distillation, Field(discriminator="kind")]
"""Training objective; `explore.train.objectives` implements each kind."""
