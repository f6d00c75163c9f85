"""What every section of the configuration refuses."""

from __future__ import annotations

from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, field: ValidationInfo) -> object:
        """Python counts True as 1."""
        annotation = cls.model_fields[str(field.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            if (word := "on" if value else "off") in get_args(annotation):  # as YAML 1.1 reads these words
                return word
            raise ValueError(f"{str(value).lower()} is neither a number nor a name; write one, or leave it out")
        return value

    @classmethod
    def flag(cls, name: str) -> str:
        """What a setting is called outside of its section."""
        return name
